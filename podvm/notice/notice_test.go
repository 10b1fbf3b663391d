// SPDX-License-Identifier: Apache-2.0

package notice

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
)

// service is a metadata service whose documents a test sets. What it has not is 404.
type service struct {
	mu   sync.Mutex
	docs map[string]string // by path; "!503" is a status
	get  func(r *http.Request) bool
}

func (s *service) set(path, doc string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.docs[path] = doc
}

func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	doc, ok := s.docs[r.URL.Path]
	s.mu.Unlock()
	var status int
	if n, _ := fmt.Sscanf(doc, "!%d", &status); n == 1 {
		w.WriteHeader(status)
		return
	}
	if !ok || !s.get(r) {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	fmt.Fprint(w, doc)
}

func onEC2(t *testing.T, docs map[string]string) (*service, source) {
	t.Helper()
	s := &service{docs: docs, get: func(r *http.Request) bool {
		return r.Method == http.MethodPut && r.URL.Path == "/latest/api/token" || r.Header.Get("X-aws-ec2-metadata-token") == "token=="
	}}
	s.docs["/latest/api/token"] = "token=="
	srv := httptest.NewServer(s)
	w := EC2(srv.URL)
	t.Cleanup(func() { w.src.close(); srv.Close() })
	return s, w.src
}

func TestEC2(t *testing.T) {
	ctx := context.Background()
	const action, rebalance = "/latest/meta-data/spot/instance-action", "/latest/meta-data/events/recommendations/rebalance"
	s, src := onEC2(t, map[string]string{"/latest/meta-data/instance-life-cycle": "spot"})
	if ok, err := src.subject(ctx); !ok || err != nil {
		t.Errorf("a spot instance: %v, %v", ok, err)
	}
	want := func(want ...Notice) {
		t.Helper()
		got, err := src.poll(ctx)
		if d := cmp.Diff(want, got); d != "" || err != nil {
			t.Errorf("%v: %s", err, d)
		}
	}
	want()
	s.set(rebalance, `{"noticeTime": "2026-11-22T08:20:00Z"}`)
	want(Notice{ID: "rebalance/2026-11-22T08:20:00Z", Kind: podvmpb.NoticeKind_NOTICE_KIND_AT_RISK, Reason: "rebalance recommendation"})
	s.set(action, `{"action": "terminate", "time": "2026-11-22T08:22:00Z"}`)
	spot := Notice{
		ID: "spot/terminate/2026-11-22T08:22:00Z", Kind: podvmpb.NoticeKind_NOTICE_KIND_TAKEN,
		Deadline: time.Date(2026, 11, 22, 8, 22, 0, 0, time.UTC), Reason: "spot interruption",
	}
	want(spot)
	s.set(rebalance, "!503")
	want(spot)
	for _, bad := range []string{"!503", "{", `{"time": "soon"}`} {
		s.set(action, bad)
		if got, err := src.poll(ctx); err == nil {
			t.Errorf("%s: %v", bad, got)
		}
	}
	_, src = onEC2(t, map[string]string{"/latest/meta-data/instance-life-cycle": "on-demand"})
	if ok, err := src.subject(ctx); ok || err != nil {
		t.Errorf("no spot instance: %v, %v", ok, err)
	}
}

func onAzure(t *testing.T, docs map[string]string) (*service, source) {
	t.Helper()
	s := &service{docs: docs, get: func(r *http.Request) bool {
		return r.Header.Get("Metadata") == "true" && r.URL.Query().Get("api-version") != ""
	}}
	srv := httptest.NewServer(s)
	w := Azure(srv.URL)
	t.Cleanup(func() { w.src.close(); srv.Close() })
	return s, w.src
}

func TestAzure(t *testing.T) {
	ctx := context.Background()
	const events = "/metadata/scheduledevents"
	s, src := onAzure(t, map[string]string{"/metadata/instance/compute/priority": "Spot", "/metadata/instance/compute/name": "podvm-a"})
	if ok, err := src.subject(ctx); !ok || err != nil {
		t.Errorf("a spot instance: %v, %v", ok, err)
	}
	s.set(events, `{"DocumentIncarnation": 1, "Events": []}`)
	if got, err := src.poll(ctx); len(got) != 0 || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	s.set(events, `{"DocumentIncarnation": 2, "Events": [
		{"EventId": "1", "EventStatus": "Scheduled", "EventType": "Freeze", "ResourceType": "VirtualMachine", "Resources": ["podvm-a"], "NotBefore": "Sun, 22 Nov 2026 08:30:00 GMT"},
		{"EventId": "2", "EventStatus": "Scheduled", "EventType": "Preempt", "ResourceType": "VirtualMachine", "Resources": ["podvm-b"], "NotBefore": "Sun, 22 Nov 2026 08:22:00 GMT"},
		{"EventId": "3", "EventStatus": "Scheduled", "EventType": "Preempt", "ResourceType": "VirtualMachine", "Resources": ["podvm-b", "PODVM-A"], "NotBefore": "Sun, 22 Nov 2026 08:22:00 GMT"},
		{"EventId": "4", "EventStatus": "Scheduled", "EventType": "Terminate", "ResourceType": "VirtualMachine", "Resources": ["podvm-a"], "NotBefore": ""}]}`)
	got, err := src.poll(ctx)
	for i := range got {
		got[i].Deadline = got[i].Deadline.UTC()
	}
	if d := cmp.Diff([]Notice{
		{ID: "3", Kind: podvmpb.NoticeKind_NOTICE_KIND_TAKEN, Deadline: time.Date(2026, 11, 22, 8, 22, 0, 0, time.UTC), Reason: "spot eviction"},
		{ID: "4", Kind: podvmpb.NoticeKind_NOTICE_KIND_TAKEN, Reason: "deletion"},
	}, got); d != "" || err != nil {
		t.Errorf("%v: %s", err, d)
	}
	s.set(events, `{"Events": [{"EventId": "5", "EventStatus": "Started", "EventType": "Redeploy", "Resources": ["podvm-a"], "NotBefore": ""}]}`)
	if got, err := src.poll(ctx); err != nil || len(got) != 1 || got[0].Deadline.IsZero() {
		t.Errorf("one that has begun: %v, %v", got, err)
	}
	s.set(events, "{")
	if got, err := src.poll(ctx); err == nil {
		t.Errorf("garbage: %v", got)
	}
	_, src = onAzure(t, map[string]string{"/metadata/instance/compute/priority": "Regular"})
	if ok, err := src.subject(ctx); ok || err != nil {
		t.Errorf("no spot instance: %v, %v", ok, err)
	}
}

// scripted is a cloud on the clock of synctest.
type scripted struct {
	start    time.Time
	subjects func(at time.Duration) (bool, error)
	polls    func(at time.Duration) ([]Notice, error)
	asked    []time.Duration
}

func (s *scripted) subject(context.Context) (bool, error) { return s.subjects(time.Since(s.start)) }

func (s *scripted) poll(context.Context) ([]Notice, error) {
	s.asked = append(s.asked, time.Since(s.start))
	return s.polls(time.Since(s.start))
}

func (s *scripted) close() {}

// TestWatch: the service is not up at first, a question fails, then there are notices, one
// of which somebody waits for and another nobody does.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := errors.New("down")
		s := &scripted{start: time.Now()}
		s.subjects = func(at time.Duration) (bool, error) {
			if at < 10*time.Second {
				return false, down
			}
			return true, nil
		}
		s.polls = func(at time.Duration) ([]Notice, error) {
			switch {
			case at < 15*time.Second:
				return nil, nil
			case at < 20*time.Second:
				return nil, down
			case at < 25*time.Second:
				return []Notice{{ID: "a"}}, nil
			}
			return []Notice{{ID: "a"}, {ID: "b"}}, nil
		}
		w := newWatch(s)
		ctx, cancel := context.WithTimeout(t.Context(), 32*time.Second)
		defer cancel()
		ended := make(chan struct{})
		go func() { w.Run(ctx); close(ended) }()
		if n, err := w.Next(ctx, ""); err != nil || n.ID != "a" || time.Since(s.start) != 20*time.Second {
			t.Errorf("%+v, %v at %v", n, err, time.Since(s.start))
		}
		if n, err := w.Next(ctx, "a"); err != nil || n.ID != "b" || time.Since(s.start) != 25*time.Second {
			t.Errorf("%+v, %v at %v", n, err, time.Since(s.start))
		}
		for _, seen := range []string{"", "of another life"} {
			if n, err := w.Next(ctx, seen); err != nil || n.ID != "a" {
				t.Errorf("%+v, %v", n, err)
			}
		}
		if _, err := w.Next(ctx, "b"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after the last: %v", err)
		}
		<-ended
		if want := []time.Duration{10, 15, 20, 25, 30}; !slices.EqualFunc(s.asked, want, func(a, b time.Duration) bool { return a == b*time.Second }) {
			t.Errorf("asked at %v", s.asked)
		}
	})
}

// TestWatchNone: a machine that is not taken back asks no more, and says so.
func TestWatchNone(t *testing.T) {
	for _, err := range []error{nil, fmt.Errorf("no such path: %w", errdefs.ErrNotFound)} {
		synctest.Test(t, func(t *testing.T) {
			w := newWatch(&scripted{subjects: func(time.Duration) (bool, error) { return false, err }})
			got := make(chan error)
			go func() {
				_, err := w.Next(t.Context(), "")
				got <- err
			}()
			synctest.Wait()
			w.Run(t.Context())
			if err := <-got; !errdefs.IsNotFound(err) {
				t.Error(err)
			}
		})
	}
}
