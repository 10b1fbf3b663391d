// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
)

// TestOverHTTP: a whole life over real connections, to an emulation without TLS.
func TestOverHTTP(t *testing.T) {
	w := newWorld(t, fakearm.Config{Timing: fakearm.Instant})
	s := httptest.NewServer(w.arm)
	defer s.Close()
	w.cfg.Endpoint, w.cfg.AuthorityHost = s.URL, s.URL+"/"
	w.cfg.Transport = nil
	p := w.provider()
	defer p.Close()
	if err := p.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	inst := w.create(p, request(p))
	if list, err := p.List(t.Context(), owner); err != nil || len(list) != 1 || list[0].ID != inst.ID || len(list[0].Addrs) != 1 {
		t.Errorf("List: %+v, %v", list, err)
	}
	w.gone(p, inst.ID)
	if l := w.arm.Leaks(nil); len(l) != 0 {
		t.Errorf("left: %v", l)
	}
}

// TestNoRedirect: a service that sends us elsewhere does not get our token there.
func TestNoRedirect(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("request to elsewhere: %s %s", r.Method, r.Header.Get("Authorization"))
	}))
	defer elsewhere.Close()
	w := newWorld(t, fakearm.Config{Timing: fakearm.Instant})
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/virtualMachines"):
			http.Redirect(rw, r, elsewhere.URL, http.StatusTemporaryRedirect)
		case strings.HasSuffix(r.URL.Path, "/disks"):
			fmt.Fprintf(rw, `{"value":[],"nextLink":"%s/disks"}`, elsewhere.URL)
		default:
			w.arm.ServeHTTP(rw, r)
		}
	}))
	defer s.Close()
	w.cfg.Endpoint, w.cfg.AuthorityHost, w.cfg.Transport = s.URL, s.URL, nil
	p := w.provider()
	defer p.Close()
	if _, err := p.getVMs(t.Context()); err == nil || strings.Contains(err.Error(), "Bearer") {
		t.Errorf("list that is redirected: %v", err)
	}
	if _, err := p.List(t.Context(), owner); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("List with a next page elsewhere: %v", err)
	}
}

// TestRetryAfter: no request goes out before the time that a 429 names, whoever makes
// it.
func TestRetryAfter(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		first, second := request(p), request(p)
		w.arm.Inject(fakearm.Fault{Method: http.MethodPut, Type: vms, Status: http.StatusTooManyRequests, Code: "TooManyRequests", RetryAfter: 17 * time.Second})
		begin := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() { w.create(p, first) })
		wg.Go(func() {
			time.Sleep(5 * time.Second)
			w.create(p, second)
		})
		time.Sleep(16 * time.Second)
		if n := w.count(http.MethodPut, vms); n != 1 {
			t.Errorf("%d PUTs before the time named", n)
		}
		wg.Wait()
		if d := time.Since(begin); d > 22*time.Second || w.count(http.MethodPut, vms) != 3 {
			t.Errorf("done after %v, with %d PUTs", d, w.count(http.MethodPut, vms))
		}
	})
	// What cannot wait says so at once.
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		inst := w.create(p, request(p))
		w.arm.Inject(fakearm.Fault{Method: http.MethodGet, Type: vms, Status: http.StatusTooManyRequests, Code: "TooManyRequests", RetryAfter: time.Minute})
		for range 3 {
			begin, gets := time.Now(), w.count(http.MethodGet, vms)
			if _, err := p.Get(w.Context(), inst.ID); !errdefs.IsUnavailable(err) || time.Since(begin) > time.Second {
				t.Errorf("Get after %v: %v", time.Since(begin), err)
			}
			if n := w.count(http.MethodGet, vms) - gets; n > 1 {
				t.Errorf("%d requests", n)
			}
			time.Sleep(10 * time.Second)
		}
		time.Sleep(time.Minute)
		if _, err := p.Get(w.Context(), inst.ID); err != nil {
			t.Error(err)
		}
	})
}

// TestBuckets: however often callers ask, the service never has to refuse.
func TestBuckets(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		inst := w.create(p, request(p))
		ok := 0
		for range 200 {
			if _, err := p.Get(w.Context(), inst.ID); err == nil {
				ok++
			} else if !errdefs.IsUnavailable(err) {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if th := w.arm.Throttled(); len(th) != 0 || ok < 20 {
			t.Errorf("%d reads, throttled: %v", ok, th)
		}
	})
	for _, limits := range []map[family]limit{wholeLimits, eachLimits} {
		for f, l := range limits {
			if l.burst < 1 || l.refill <= 0 {
				t.Errorf("%s: %+v lets nothing through", f, l)
			}
		}
	}
}

// TestBucketsAreDropped: buckets of VMs that are gone do not pile up.
func TestBucketsAreDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := newThrottle()
		for n := range 10 * tidyAbove {
			if err := th.wait(t.Context(), subject{familyGet, fmt.Sprint(n)}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if len(th.each) > tidyAbove {
			t.Errorf("%d buckets", len(th.each))
		}
	})
}

// TestTokens: one that ends early is replaced; a new secret is taken when the next token
// is due, and at once where the old one is refused.
func TestTokens(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		now := w.cfg.Credentials
		p := w.provider(func(c *Config) { c.Reload = func() (Credentials, error) { return now, nil } })
		req := request(p)
		inst := w.create(p, req)
		w.arm.ExpireTokens()
		if _, err := p.Get(w.Context(), inst.ID); err != nil {
			t.Errorf("Get with a token that has ended: %v", err)
		}
		w.arm.SetSecret(fakearm.DefaultClient, "second-secret")
		w.arm.ExpireTokens()
		_, err := p.Get(w.Context(), inst.ID)
		if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "AZURE_CLIENT_SECRET") || strings.Contains(err.Error(), now.ClientSecret) {
			t.Errorf("Get with a secret that was replaced: %v", err)
		}
		now.ClientSecret = "second-secret"
		w.cfg.Credentials = now
		if _, err := p.Get(w.Context(), inst.ID); err != nil {
			t.Errorf("Get with the new secret: %v", err)
		}
	})
}

var runs atomic.Int64

func TestCredentials(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("header."+jwtClaims+".sig"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		with  func(*Credentials)
		fault fakearm.Fault
		want  string // of the error; "": none
		class func(error) bool
	}{
		"client secret":           {with: func(c *Credentials) {}},
		"the secret wins":         {with: func(c *Credentials) { c.FederatedTokenFile = "/does/not/exist" }},
		"workload identity":       {with: func(c *Credentials) { *c = Credentials{c.TenantID, "federated", "", file} }},
		"managed identity":        {with: func(c *Credentials) { *c = Credentials{} }},
		"managed identity, named": {with: func(c *Credentials) { *c = Credentials{ClientID: "managed"} }},
		"wrong secret":            {with: func(c *Credentials) { c.ClientSecret = "hush" }, want: "AADSTS7000215", class: errdefs.IsPermissionDenied},
		"wrong client":            {with: func(c *Credentials) { c.ClientID = "nobody" }, want: "AADSTS700016", class: errdefs.IsPermissionDenied},
		"no such file":            {with: func(c *Credentials) { *c = Credentials{c.TenantID, "federated", "", file + "x"} }, want: file + "x", class: errdefs.IsUnavailable},
		"authority down":          {with: func(c *Credentials) {}, fault: fakearm.Fault{Type: "token", Status: 503, Count: -1}, want: "503", class: errdefs.IsUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := fakearm.Config{Principals: []fakearm.Principal{
				{Client: fakearm.DefaultClient, Secret: fakearm.DefaultSecret},
				{Client: "federated", Federated: &fakearm.Federated{Issuer: "https://cluster", Subject: "system:serviceaccount:ns:caa"}},
				{Client: "managed", Managed: true},
			}}
			inWorld(t, cfg, func(w *world) {
				if tc.fault.Type != "" {
					w.arm.Inject(tc.fault)
				}
				// The SDK keeps a managed identity's token in the process, past the
				// emulation that gave it.
				time.Sleep(time.Duration(runs.Add(1)) * 24 * time.Hour)
				p := w.provider(func(c *Config) { tc.with(&c.Credentials) })
				err := p.Check(w.Context())
				if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want) || !tc.class(err)) {
					t.Errorf("Check: %v, want %q", err, tc.want)
				}
				if err != nil && (strings.Contains(err.Error(), "hush") || strings.Count(err.Error(), "\n") > 3) {
					t.Errorf("error: %v", err)
				}
			})
		})
	}
}

// jwtClaims are {"iss":"https://cluster","sub":"system:serviceaccount:ns:caa",
// "aud":["api://AzureADTokenExchange"],"exp":4102444800}.
const jwtClaims = "eyJpc3MiOiJodHRwczovL2NsdXN0ZXIiLCJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQ6bnM6Y2FhIiwiYXVkIjpbImFwaTovL0F6dXJlQURUb2tlbkV4Y2hhbmdlIl0sImV4cCI6NDEwMjQ0NDgwMH0"

// TestSecretsAreNotShown by any way of printing.
func TestSecretsAreNotShown(t *testing.T) {
	c := Config{Credentials: Credentials{"t", "c", "hush", ""}}
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "c", c.Credentials, "config", c)
	js, err := json.Marshal(c.Credentials)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{log.String(), string(js), fmt.Sprint(c), fmt.Sprintf("%v %+v %#v %s", c.Credentials, c, c, c.Credentials)} {
		if strings.Contains(s, "hush") {
			t.Errorf("shown: %s", s)
		}
	}
}

func TestErrors(t *testing.T) {
	reply := func(status int, body string) error {
		return replyError(&http.Response{StatusCode: status}, []byte(body), time.Time{})
	}
	for _, tc := range []struct {
		err   error
		class func(error) bool // nil: unknown
		text  string
	}{
		{reply(409, `{"error":{"code":"SkuNotAvailable","message":"not here."}}`), errdefs.IsResourceExhausted, "SkuNotAvailable: not here"},
		{reply(409, `{"error":{"code":"DeploymentFailed","message":"x","details":[{"code":"Wrapped","details":[{"code":"ZonalAllocationFailed","message":"full"}]}]}}`), errdefs.IsResourceExhausted, "ZonalAllocationFailed: full"},
		{reply(409, `{"error":{"code":"OperationNotAllowed","message":"exceeding approved Cores Quota"}}`), errdefs.IsResourceExhausted, "az quota"},
		{reply(409, `{"error":{"code":"OperationNotAllowed","message":"VM is marked for deletion"}}`), errdefs.IsUnavailable, "marked"},
		{reply(403, `{"error":{"code":"AuthorizationFailed","message":"The client 'c' does not have authorization to perform action 'Microsoft.Compute/virtualMachines/write' over scope '/s'."}}`), errdefs.IsPermissionDenied, "action 'Microsoft.Compute/virtualMachines/write'"},
		{reply(401, ``), errdefs.IsPermissionDenied, "HTTP 401"},
		{reply(404, `{"error":{"code":"ResourceNotFound","message":"m"}}`), errdefs.IsNotFound, "ResourceNotFound"},
		{reply(404, `<html>no such site</html>`), nil, "HTTP 404"},
		{reply(404, `{"error":{"code":"ResourceGroupNotFound","message":"m"}}`), errdefs.IsInvalidArgument, "AZURE_RESOURCE_GROUP"},
		{reply(429, `{"error":{"code":"OperationNotAllowed","message":"quota of requests","details":[{"code":"TooManyRequests"}]}}`), errdefs.IsUnavailable, "OperationNotAllowed"},
		{reply(502, `<html>bad gateway</html>`), errdefs.IsUnavailable, "HTTP 502"},
		{reply(400, `{"code":"BareCode","message":"m"}`), errdefs.IsInvalidArgument, "BareCode: m"},
		{reply(418, `{}`), nil, "HTTP 418"},
		{newAPIError(0, odata{Code: "SomethingNew"}, time.Time{}), nil, "SomethingNew"},
		{newAPIError(0, odata{Code: "InternalExecutionError"}, time.Time{}), errdefs.IsUnavailable, "InternalExecutionError"},
		{sendError(context.Background(), io.ErrUnexpectedEOF), errdefs.IsUnavailable, "unexpected EOF"},
	} {
		if !strings.Contains(tc.err.Error(), tc.text) {
			t.Errorf("text %q lacks %q", tc.err, tc.text)
		}
		if tc.class != nil && !tc.class(tc.err) {
			t.Errorf("class of %v", tc.err)
		}
		if tc.class == nil {
			for _, class := range []error{errdefs.ErrUnavailable, errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrPermissionDenied, errdefs.ErrResourceExhausted} {
				if errors.Is(tc.err, class) {
					t.Errorf("%v is %v, want unknown", tc.err, class)
				}
			}
		}
	}
	long := newAPIError(400, odata{Code: "x", Message: strings.Repeat("ü ", maxMessage)}, time.Time{})
	if len(long.message) > maxMessage+3 || strings.Contains(long.message, "\uFFFD") {
		t.Errorf("a long message has %d bytes", len(long.message))
	}
}

func TestRetryAfterHeader(t *testing.T) {
	now := time.Date(2026, 11, 22, 1, 0, 0, 0, time.UTC)
	for v, want := range map[string]time.Duration{"": -1, "7": 7 * time.Second, "0": 0, "1.5": 1500 * time.Millisecond, "x": -1, "-3": -1, "1e99": -1,
		now.Add(90 * time.Second).Format(http.TimeFormat): 90 * time.Second, now.Add(-time.Hour).Format(http.TimeFormat): -1} {
		got := retryAfter(&http.Response{Header: http.Header{"Retry-After": {v}}}, now)
		if want < 0 && !got.IsZero() || want >= 0 && got.Sub(now) != want {
			t.Errorf("Retry-After %q is %v", v, got)
		}
	}
}

func TestKeyed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &keyed{held: map[string]chan struct{}{}}
		unlock, err := k.lock(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := k.try("a"); ok {
			t.Error("a key was given twice")
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := k.lock(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("wait for a key: %v", err)
		}
		unlock()
		again, ok := k.try("a")
		if !ok {
			t.Fatal("a key that is free was not given")
		}
		again()
		if len(k.held) != 0 {
			t.Errorf("held: %v", k.held)
		}
	})
}
