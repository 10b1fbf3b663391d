// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// Server is the emulation. All methods are safe for concurrent use.
type Server struct {
	cfg    Config
	limits map[string]Limit
	sizes  map[string]Size // by lower-case name
	dir    string          // for uploads; made when first needed

	ctx  context.Context // ends with Close; what runs behind the instances
	stop context.CancelFunc
	work sync.WaitGroup
	wake chan struct{} // the first event has changed

	mu         sync.Mutex
	resources  map[string]*resource // by key; guarded by mu
	gone       []*resource          // deleted, but still in lists; guarded by mu
	operations map[string]*operation
	events     []event // in the order of time
	tokens     map[string]token
	buckets    map[string]*bucket
	throttled  map[string]int
	faults     []*armed
	capacity   map[pool]int
	quota      map[string]int // vCPUs, by lower-case family; "" for all
	actions    map[string]int // what principals have done
	requests   []string
	serial     int // for MACs and public addresses
	uploads    map[string]*upload
	foreign    map[string]Image // by lower-case id
}

// New makes an emulation. Config errors are programming errors and panic.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg.withDefaults(), limits: Limits(), sizes: map[string]Size{}, wake: make(chan struct{}, 1),
		resources: map[string]*resource{}, operations: map[string]*operation{}, tokens: map[string]token{},
		buckets: map[string]*bucket{}, throttled: map[string]int{}, capacity: map[pool]int{}, quota: map[string]int{},
		actions: map[string]int{}, uploads: map[string]*upload{}, foreign: map[string]Image{}}
	maps.Copy(s.limits, cfg.Limits)
	s.cfg.Principals = slices.Clone(s.cfg.Principals)
	s.ctx, s.stop = context.WithCancel(context.Background())
	for _, z := range s.cfg.Sizes {
		s.sizes[strings.ToLower(z.Name)] = z
	}
	s.preload()
	if s.cfg.Host != nil {
		s.work.Add(1)
		go s.run()
	}
	return s
}

// Config is the one that the emulation was made of, with all defaults.
func (s *Server) Config() Config { return s.cfg }

// Close stops every machine and removes what uploads have left.
func (s *Server) Close() {
	s.mu.Lock()
	var ids []string
	for _, r := range s.resources {
		if r.vm != nil && r.vm.real {
			ids = append(ids, r.vm.id)
		}
	}
	s.mu.Unlock()
	s.stop()
	s.work.Wait()
	for _, id := range ids {
		if err := s.cfg.Host.Stop(context.Background(), id); err != nil {
			s.cfg.Log.Error("stop machine", "id", id, "error", err)
		}
	}
	if s.dir != "" {
		if err := os.RemoveAll(s.dir); err != nil {
			s.cfg.Log.Error("remove uploads", "error", err)
		}
	}
}

// run does what is due without waiting for a request, so that machines start and end
// when they should. It runs until Close.
func (s *Server) run() {
	defer s.work.Done()
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.wake:
		case <-t.C:
		}
		s.mu.Lock()
		now := s.cfg.Now()
		s.catchUp(now)
		next := time.Hour
		if len(s.events) > 0 {
			next = s.events[0].at.Sub(now)
		}
		s.mu.Unlock()
		t.Reset(max(next, time.Millisecond))
	}
}

// call is one request.
type call struct {
	s         *Server
	r         *http.Request
	now       time.Time
	version   string
	principal Principal
	path      route
	body      map[string]any
	raw       []byte
	fault     *Fault
}

func (c *call) query(name string) string {
	for k, v := range c.r.URL.Query() {
		if strings.EqualFold(k, name) && len(v) > 0 {
			return v[0]
		}
	}
	return ""
}

// base is this server as the client knows it.
func (c *call) base() string { return base(c.r) }

func base(r *http.Request) string {
	if r.TLS != nil || r.URL.Scheme == "https" {
		return "https://" + r.Host
	}
	return "http://" + r.Host
}

// reply is the answer to a request. A body of nil is empty.
type reply struct {
	status int
	header http.Header
	body   any
}

// apiError is a refusal. It becomes {"error": {...}}.
type apiError struct {
	status                int
	code, message, target string
	details               []map[string]any
	retryAfter            int // seconds
}

func (e *apiError) Error() string { return e.code + ": " + e.message }

func (e *apiError) inner() map[string]any {
	m := map[string]any{"code": e.code, "message": e.message}
	if e.target != "" {
		m["target"] = e.target
	}
	if e.details != nil {
		m["details"] = e.details
	}
	return m
}

func badRequest(code, target, format string, args ...any) *apiError {
	return &apiError{status: http.StatusBadRequest, code: code, target: target, message: fmt.Sprintf(format, args...)}
}

func conflict(code, target, format string, args ...any) *apiError {
	return &apiError{status: http.StatusConflict, code: code, target: target, message: fmt.Sprintf(format, args...)}
}

// maxBody is what ARM takes (4 MiB), and a page blob's largest write.
const maxBody = 4 << 20

// maxRequests is how many are kept for Requests.
const maxRequests = 100_000

// ServeHTTP answers for the login endpoint, the resource manager, page blobs and the
// managed-identity endpoint; their paths do not overlap.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody+1))
	if err != nil {
		http.Error(w, "request body: "+err.Error(), http.StatusRequestEntityTooLarge)
		return
	}
	c := &call{s: s, r: r, raw: raw}
	rep, fail := s.answer(c)
	if c.fault != nil && c.fault.Never {
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
	if fail != nil {
		rep = &reply{status: fail.status, header: http.Header{}, body: map[string]any{"error": fail.inner()}}
		if fail.retryAfter > 0 {
			rep.header.Set("Retry-After", fmt.Sprint(fail.retryAfter))
		}
		if fail.status == http.StatusUnauthorized {
			rep.header.Set("Www-Authenticate", fmt.Sprintf(`Bearer authorization_uri="%s/%s", error="invalid_token", error_description="%s"`, c.base(), s.cfg.Tenant, fail.message))
		}
	}
	s.cfg.Log.Debug("request", "method", r.Method, "path", r.URL.Path, "status", rep.status)
	c.write(w, rep)
}

func (s *Server) answer(c *call) (*reply, *apiError) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.now = s.cfg.Now()
	s.catchUp(c.now)
	if s.requests = append(s.requests, c.r.Method+" "+c.r.URL.Path); len(s.requests) > maxRequests {
		s.requests = s.requests[len(s.requests)-maxRequests/2:]
	}
	return s.route(c)
}

// write sends a reply, or what a fault makes of it.
func (c *call) write(w http.ResponseWriter, rep *reply) {
	f := c.fault
	if f == nil {
		f = &Fault{}
	}
	if f.Lost {
		panic(http.ErrAbortHandler) // the server ends the connection
	}
	var body []byte
	switch b := rep.body.(type) {
	case nil:
	case []byte:
		body = b
	default:
		var err error
		if body, err = json.Marshal(b); err != nil {
			panic(fmt.Sprintf("fakearm: a reply of plain values does not marshal: %v", err))
		}
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
	}
	maps.Copy(w.Header(), rep.header)
	w.Header().Set("X-Ms-Request-Id", newUUID())
	w.Header().Set("X-Ms-Correlation-Request-Id", newUUID())
	if f.Malformed {
		body = body[:len(body)/2]
	}
	c.pause(f.Slow)
	w.WriteHeader(rep.status)
	if f.Slow > 0 && len(body) > 1 {
		half := len(body) / 2
		w.Write(body[:half])
		if fl, ok := w.(http.Flusher); ok {
			fl.Flush()
		}
		c.pause(f.Slow)
		body = body[half:]
	}
	w.Write(body)
}

func (c *call) pause(d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-c.r.Context().Done():
	}
}

// route finds who answers. It needs mu.
func (s *Server) route(c *call) (*reply, *apiError) {
	p := c.r.URL.Path
	switch {
	case strings.HasPrefix(p, blobPrefix):
		c.fault = s.fault(c.r.Method, "blob", "", nil)
		return s.blob(c)
	case p == "/metadata/identity/oauth2/token":
		return s.identityToken(c, "")
	case p == "/metadata/endpoints":
		return &reply{status: http.StatusOK, body: map[string]any{"authentication": map[string]any{
			"loginEndpoint": c.base(), "audiences": []string{c.base(), "https://management.core.windows.net/", "https://management.azure.com/"}}}}, nil
	case p == "/common/discovery/instance" || strings.HasSuffix(p, "/.well-known/openid-configuration"):
		return s.discovery(c)
	case strings.HasSuffix(p, "/oauth2/v2.0/token"):
		return s.token(c)
	}
	return s.resourceManager(c)
}

// newUUID makes a random one.
func newUUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Requests returns the method and path of every request so far, at least of the last
// 50,000.
func (s *Server) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.requests...)
}

// transport answers requests without a network.
type transport struct{ s *Server }

// Transport is a way to the emulation without a network, for clients in this process:
// it works inside a synctest bubble. A lost reply is io.ErrUnexpectedEOF.
func (s *Server) Transport() http.RoundTripper { return transport{s} }

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	in := r.Clone(r.Context())
	if in.Host == "" {
		in.Host = r.URL.Host
	}
	if in.Body == nil {
		in.Body = http.NoBody
	}
	in.RequestURI = r.URL.RequestURI()
	in.URL = &url.URL{Scheme: r.URL.Scheme, Host: r.URL.Host, Path: r.URL.Path, RawPath: r.URL.RawPath, RawQuery: r.URL.RawQuery}
	rec := &recorder{header: http.Header{}}
	if err := rec.serve(t.s, in); err != nil {
		return nil, err
	}
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: rec.status, Status: fmt.Sprintf("%d %s", rec.status, http.StatusText(rec.status)),
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: rec.header, Request: r,
		Body: io.NopCloser(strings.NewReader(rec.body.String())), ContentLength: int64(rec.body.Len())}, nil
}

type recorder struct {
	header http.Header
	status int
	body   strings.Builder
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }

func (r *recorder) serve(h http.Handler, in *http.Request) (err error) {
	defer func() {
		if v := recover(); v == http.ErrAbortHandler {
			if err = in.Context().Err(); err == nil {
				err = io.ErrUnexpectedEOF
			}
		} else if v != nil {
			panic(v)
		}
	}()
	h.ServeHTTP(r, in)
	return nil
}
