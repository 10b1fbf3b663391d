// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// service is a metadata service on loopback. It refuses what the real ones refuse.
func service(t *testing.T, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Forwarded-For") != "" || r.Header.Get("Accept-Encoding") != "" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

const ec2Token = "AQAEAHn_-token=="

// ec2 answers as EC2 does: a token against a PUT with a time to live, all else against the
// token.
func ec2(userData, hostname http.HandlerFunc) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /latest/api/token", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-aws-ec2-metadata-token-ttl-seconds") == "" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		fmt.Fprint(w, ec2Token)
	})
	with := func(h http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("X-aws-ec2-metadata-token") != ec2Token {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			h(w, r)
		}
	}
	mux.HandleFunc("GET /latest/user-data", with(userData))
	mux.HandleFunc("GET /latest/meta-data/local-hostname", with(hostname))
	return mux
}

func says(s string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, s) }
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
}

// firstThen answers n times in one way and then in another.
func firstThen(n int32, first, then http.HandlerFunc) http.HandlerFunc {
	var asked atomic.Int32
	return func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) <= n {
			first(w, r)
			return
		}
		then(w, r)
	}
}

// cutShort promises more than it sends.
func cutShort(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Length", "1000")
	fmt.Fprint(w, goodUserData[:40])
}

func packed(t *testing.T, doc string) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write([]byte(doc)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestEC2 and the services' bad days: what is wrong for now is asked for again.
func TestEC2(t *testing.T) {
	for name, c := range map[string]struct {
		userData, hostname http.HandlerFunc
		host               string
	}{
		"plain":             {says(goodUserData), says("ip-10-0-0-5.ec2.internal"), "ip-10-0-0-5.ec2.internal"},
		"gzip":              {says(packed(t, goodUserData)), says("h\n"), "h"},
		"no host name":      {says(goodUserData), status(404), ""},
		"no such host name": {says(goodUserData), says("a b"), ""},
		"unavailable first": {firstThen(2, status(503), says(goodUserData)), says("h"), "h"},
		"throttled first":   {firstThen(1, status(429), says(goodUserData)), says("h"), "h"},
		"token gone":        {firstThen(1, status(401), says(goodUserData)), says("h"), "h"},
		"cut short first":   {firstThen(1, cutShort, says(goodUserData)), says("h"), "h"},
		"in pieces": {func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, goodUserData[:9])
			w.(http.Flusher).Flush()
			fmt.Fprint(w, goodUserData[9:])
		}, says("h"), "h"},
		"connection dropped": {firstThen(1, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, says(goodUserData)), says("h"), "h"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, err := Read(context.Background(), EC2{URL: service(t, ec2(c.userData, c.hostname))})
			if err != nil {
				t.Fatal(err)
			}
			if len(cfg.Files) != 2 || cfg.Hostname != c.host || cfg.Links != nil {
				t.Errorf("got %+v", cfg)
			}
		})
	}
}

// TestServiceRefuses: what will not be otherwise ends the question at once, with a class
// and a sentence.
func TestServiceRefuses(t *testing.T) {
	token := func(h http.HandlerFunc) http.Handler {
		mux := http.NewServeMux()
		mux.HandleFunc("PUT /latest/api/token", h)
		return mux
	}
	big := says(strings.Repeat("x", MaxDocument+1))
	azure := func(h http.HandlerFunc) http.Handler { return azureService(h) }
	for name, c := range map[string]struct {
		source func(url string) Source
		h      http.Handler
		none   bool // NotFound, else InvalidArgument
		want   string
	}{
		"no user data":        {ec2Source, ec2(status(404), status(404)), true, "GET /latest/user-data: the answer is 404 Not Found"},
		"empty":               {ec2Source, ec2(says(""), status(404)), true, "the user data is empty"},
		"switched off":        {ec2Source, token(status(403)), false, "HttpEndpoint"},
		"another cloud":       {ec2Source, token(status(405)), true, "it is not EC2's"},
		"another cloud's 404": {ec2Source, token(status(404)), true, "PUT /latest/api/token: the answer is 404"},
		"redirected":          {ec2Source, ec2(func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "http://127.0.0.1:1/", 302) }, status(404)), false, "the answer is 302 Found"},
		"too large":           {ec2Source, ec2(big, status(404)), false, "the answer has more than 1048576 bytes"},
		"too large unpacked":  {ec2Source, ec2(says(packed(t, goodUserData+strings.Repeat("#", MaxDocument))), status(404)), false, "user-data: gzip: the document has more than"},
		"bad gzip":            {ec2Source, ec2(says("\x1f\x8bs3cret"), status(404)), false, "user-data: gzip: "},
		"gzip cut short":      {ec2Source, ec2(says(packed(t, goodUserData)[:60]), status(404)), false, "user-data: gzip: it is cut short"},
		"no cloud-config":     {ec2Source, ec2(says("#!/bin/sh\necho s3cret"), status(404)), false, "user-data: the first line"},
		"Azure: empty":        {azureSource, azure(says("\n")), true, "userData is empty"},
		"Azure: not base64":   {azureSource, azure(says("s3cret!")), false, "userData is not base64"},
		"Azure: refused":      {azureSource, azure(status(400)), false, "GET /metadata/instance/compute/userData: the answer is 400"},
		"Azure: too large":    {azureSource, azure(big), false, "the answer has more than"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Read(context.Background(), c.source(service(t, c.h)))
			if errdefs.IsNotFound(err) != c.none || errdefs.IsInvalidArgument(err) == c.none || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "\n") {
				t.Errorf("%q shows a value, or is more than a line", err)
			}
		})
	}
}

func ec2Source(url string) Source   { return EC2{URL: url} }
func azureSource(url string) Source { return AzureService{URL: url} }

// azureService answers as Azure's does: only with its header, and a version that it knows.
func azureService(userData http.HandlerFunc) http.Handler {
	mux := http.NewServeMux()
	with := func(h http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Metadata") != "true" || r.URL.Query().Get("api-version") < "2021-01-01" || r.URL.Query().Get("format") != "text" {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			h(w, r)
		}
	}
	mux.HandleFunc("GET /metadata/instance/compute/userData", with(userData))
	mux.HandleFunc("GET /metadata/instance/compute/name", with(says("podvm-default-0123")))
	return mux
}

func TestAzureService(t *testing.T) {
	doc := base64.StdEncoding.EncodeToString([]byte(goodUserData))
	for name, h := range map[string]http.HandlerFunc{
		"plain":      says(doc),
		"in lines":   says(doc[:76] + "\r\n" + doc[76:] + "\r\n"),
		"gone first": firstThen(1, status(410), says(doc)),
		"500 first":  firstThen(1, status(500), says(doc)),
	} {
		t.Run(name, func(t *testing.T) {
			cfg, err := Read(context.Background(), AzureService{URL: service(t, azureService(h))})
			if err != nil {
				t.Fatal(err)
			}
			if len(cfg.Files) != 2 || cfg.Hostname != "podvm-default-0123" {
				t.Errorf("got %+v", cfg)
			}
		})
	}
}

// TestNotUpYet: a service that is not there yet is asked until it is.
func TestNotUpYet(t *testing.T) {
	// A port that is ours and refuses, until it listens.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "socket")
	defer file.Close()
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	url := fmt.Sprintf("http://127.0.0.1:%d", name.(*unix.SockaddrInet4).Port)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	asking := make(chan struct{})
	var got error
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, got = Read(ctx, After(func(context.Context) error {
			select {
			case asking <- struct{}{}:
			case <-ctx.Done():
			}
			return nil
		}, EC2{URL: url}))
	}()
	for range 3 { // it has been asked in vain
		select {
		case <-asking:
		case <-ended:
			t.Fatalf("ended with %v before the service was there", got)
		}
	}
	if err := unix.Listen(fd, 8); err != nil {
		t.Fatal(err)
	}
	l, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(ec2(says(goodUserData), status(404)))
	s.Listener.Close()
	s.Listener = l
	s.Start()
	defer s.Close()
	for {
		select {
		case <-asking:
		case <-ended:
			if got != nil {
				t.Error(got)
			}
			return
		}
	}
}

// scripted is a source that says something after a time, on the clock of synctest.
type scripted struct {
	name  string
	after time.Duration // negative: it never answers
	err   error         // nil: it has user data that are good
}

func (s scripted) Name() string { return s.name }

func (s scripted) Seed(ctx context.Context) (*Seed, error) {
	if s.after < 0 {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	t := time.NewTimer(s.after)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if s.err != nil {
		return nil, s.err
	}
	return &Seed{UserData: []byte(goodUserData)}, nil
}

var (
	errNone  = fmt.Errorf("nothing: %w", errdefs.ErrNotFound)
	errLater = fmt.Errorf("not now: %w", errdefs.ErrUnavailable)
	errWrong = fmt.Errorf("wrong: %w", errdefs.ErrInvalidArgument)
)

// TestPreference: which source wins, and when.
func TestPreference(t *testing.T) {
	const ms = time.Millisecond
	for name, c := range map[string]struct {
		sources []Source
		want    string // the winner; or the error's text
		class   error  // of the error
		took    time.Duration
	}{
		"first alone":                {[]Source{scripted{"a", 5 * ms, nil}}, "a", nil, 5 * ms},
		"first and faster":           {[]Source{scripted{"a", 0, nil}, scripted{"b", 0, nil}}, "a", nil, 0},
		"first a little later":       {[]Source{scripted{"a", 150 * ms, nil}, scripted{"b", 0, nil}}, "a", nil, 150 * ms},
		"first is dead":              {[]Source{scripted{"a", -1, nil}, scripted{"b", 20 * ms, nil}}, "b", nil, 220 * ms},
		"two are dead":               {[]Source{scripted{"a", -1, nil}, scripted{"b", -1, nil}, scripted{"c", 0, nil}}, "c", nil, 200 * ms},
		"last is dead":               {[]Source{scripted{"a", 30 * ms, nil}, scripted{"b", -1, nil}}, "a", nil, 30 * ms},
		"first has nothing":          {[]Source{scripted{"a", 10 * ms, errNone}, scripted{"b", 0, nil}}, "b", nil, 10 * ms},
		"first is wrong":             {[]Source{scripted{"a", 10 * ms, errWrong}, scripted{"b", 40 * ms, nil}}, "b", nil, 40 * ms},
		"first comes up in the wait": {[]Source{scripted{"a", 300 * ms, nil}, scripted{"b", 250 * ms, nil}}, "a", nil, 300 * ms},
		"nothing anywhere":           {[]Source{scripted{"a", 0, errNone}, scripted{"b", 7 * ms, errNone}}, "no user data: a: nothing: not found; b: nothing: not found", errdefs.ErrNotFound, 7 * ms},
		"one wrong":                  {[]Source{scripted{"a", 0, errNone}, scripted{"b", 7 * ms, errWrong}}, "no valid user data: a: nothing: not found; b: wrong: invalid argument", errdefs.ErrInvalidArgument, 7 * ms},
		"never up":                   {[]Source{scripted{"a", 0, errNone}, scripted{"b", 0, errLater}}, "no user data: a: nothing: not found; b: not now: unavailable", errdefs.ErrUnavailable, Budget},
		"never answers":              {[]Source{scripted{"a", -1, nil}}, "no user data: a: context deadline exceeded: unavailable", errdefs.ErrUnavailable, Budget},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				cfg, err := Read(context.Background(), c.sources...)
				if took := time.Since(start); took != c.took {
					t.Errorf("took %v, want %v", took, c.took)
				}
				if c.class == nil && (err != nil || cfg.Source != c.want) {
					t.Errorf("got %+v, %v; want %s", cfg, err, c.want)
				}
				if c.class != nil && (!errors.Is(err, c.class) || err.Error() != c.want) {
					t.Errorf("got %v, want %q of class %v", err, c.want, c.class)
				}
			})
		})
	}
}

func TestDetect(t *testing.T) {
	for name, c := range map[string]struct {
		fields map[string]string
		want   Platform
	}{
		"EC2":           {map[string]string{"sys_vendor": "Amazon EC2\n", "product_name": "m6a.large\n"}, PlatformEC2},
		"Azure":         {map[string]string{"sys_vendor": "Microsoft Corporation\n", "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77\n"}, PlatformAzure},
		"Hyper-V":       {map[string]string{"sys_vendor": "Microsoft Corporation\n", "chassis_asset_tag": "1234\n"}, PlatformUnknown},
		"QEMU":          {map[string]string{"sys_vendor": "QEMU\n", "product_name": "Standard PC (Q35 + ICH9, 2009)\n"}, PlatformUnknown},
		"without table": {nil, PlatformUnknown},
	} {
		sys := t.TempDir()
		dir := filepath.Join(sys, "class", "dmi", "id")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for field, value := range c.fields {
			if err := os.WriteFile(filepath.Join(dir, field), []byte(value), 0o444); err != nil {
				t.Fatal(err)
			}
		}
		if got := Detect(sys); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// TestReportReady: as Azure's documentation has it, from what is unavailable first.
func TestReportReady(t *testing.T) {
	const state = `<?xml version="1.0" encoding="utf-8"?>
<GoalState xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><Version>2012-11-30</Version><Incarnation>7</Incarnation>
<Machine><ExpectedState>Started</ExpectedState></Machine><Container><ContainerId>c-1</ContainerId><RoleInstanceList>
<RoleInstance><InstanceId>i-1._podvm</InstanceId><State>Started</State></RoleInstance></RoleInstanceList></Container></GoalState>`
	reports := make(chan string, 8)
	serve := func(goal http.HandlerFunc) http.Handler {
		mux := http.NewServeMux()
		mux.HandleFunc("GET /machine/", goal)
		mux.HandleFunc("POST /machine", func(w http.ResponseWriter, r *http.Request) {
			b, err := io.ReadAll(r.Body)
			if err != nil || r.Header.Get("x-ms-version") != "2012-11-30" || !strings.HasPrefix(r.Header.Get("Content-Type"), "text/xml") || r.URL.RawQuery != "comp=health" {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			reports <- string(b)
		})
		return mux
	}
	if err := reportReady(context.Background(), service(t, serve(firstThen(1, status(503), says(state))))); err != nil {
		t.Fatal(err)
	}
	const want = "<Health><GoalStateIncarnation>7</GoalStateIncarnation><Container><ContainerId>c-1</ContainerId><RoleInstanceList><Role><InstanceId>i-1._podvm</InstanceId><Health><State>Ready</State></Health></Role></RoleInstanceList></Container></Health>"
	if got := <-reports; got != want {
		t.Errorf("got %q", got)
	}
	for _, goal := range []string{"", "<html/>", "<GoalState/>"} {
		if err := reportReady(context.Background(), service(t, serve(says(goal)))); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", goal, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := reportReady(ctx, service(t, serve(says(state)))); !errdefs.IsUnavailable(err) {
		t.Errorf("after the end: %v", err)
	}
}
