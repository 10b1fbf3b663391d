// SPDX-License-Identifier: Apache-2.0

package cloudtest

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

const otherCluster = "cloudtest-other"

// cases is the contract, one promise each.
var cases = []struct {
	name string
	run  func(*suite)
}{
	{"life of an instance", life},
	{"plan", plan},
	{"check", check},
	{"token, many callers at once", tokenConcurrent},
	{"token, another request", tokenReused},
	{"unknown instance", unknown},
	{"delete again", deleteAgain},
	{"list by owner", listByOwner},
	{"abandoned create", abandoned},
	{"ended context", endedContext},
	{"refused requests", refused},
	{"restart", restart},
	{"note", note},
	{"progress", progress},
}

func life(s *suite) {
	before := time.Now().Add(-time.Minute) // clocks may differ a little
	req := s.request()
	made := s.create(req)
	inst := s.running(made.ID)
	if inst.ID != made.ID || inst.Name != req.Name || inst.Token != req.Token || inst.SandboxID != req.SandboxID || inst.Owner != req.Owner {
		s.Errorf("Get returned %+v, made from name %q, token %q, sandbox %q, owner %+v", inst, req.Name, req.Token, req.SandboxID, req.Owner)
	}
	if inst.CreatedAt.Before(before) {
		s.Errorf("created at %v, the test began at %v", inst.CreatedAt, before)
	}
	for _, a := range inst.Addrs {
		if !a.IsValid() || a.IsUnspecified() || a.IsLoopback() {
			s.Errorf("address %v is of no use", a)
		}
	}
	s.listed(s.p, req.Owner, made.ID)
	if got := s.list(s.p, req.Owner)[made.ID]; got.Token != req.Token || got.SandboxID != req.SandboxID {
		s.Errorf("List shows token %q and sandbox %q, want %q and %q", got.Token, got.SandboxID, req.Token, req.SandboxID)
	}
	s.gone(s.ctx, made.ID)
	if _, err := s.p.Get(s.ctx, made.ID); !errdefs.IsNotFound(err) {
		s.Errorf("Get after Delete said NotFound: %v, want NotFound", err)
	}
	s.listed(s.p, req.Owner)
}

func plan(s *suite) {
	pl, err := s.p.Plan(s.ctx, cloud.Size{})
	if err != nil {
		s.Fatalf("Plan of nothing in particular: %v", err)
	}
	if pl.VCPUs < 1 || pl.MemoryMiB < 64 {
		s.Errorf("the default plan %+v is no machine", pl)
	}
	for _, size := range []cloud.Size{
		{VCPUs: 1 << 20}, {MemoryMiB: 1 << 30}, {GPUs: 1 << 10}, {Type: "no-such-type"}, {VCPUs: -1}, {MemoryMiB: -1},
	} {
		if pl, err := s.p.Plan(s.ctx, size); !errdefs.IsInvalidArgument(err) && !errdefs.IsResourceExhausted(err) {
			s.Errorf("Plan(%+v) = %+v, %v; want InvalidArgument or ResourceExhausted", size, pl, err)
		}
	}
}

func check(s *suite) {
	if err := s.p.Check(s.ctx); err != nil {
		s.Errorf("Check of a working provider: %v", err)
	}
}

func tokenConcurrent(s *suite) {
	const callers = 16
	req := s.request()
	providers := []cloud.Provider{s.p, s.New(s.T)} // two processes
	ids := make([]cloud.InstanceID, callers)
	errs := make([]error, callers)
	var wg sync.WaitGroup
	for n := range callers {
		wg.Go(func() {
			inst, err := providers[n%2].Create(s.ctx, req)
			ids[n], errs[n] = inst.ID, err
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		s.Fatalf("Create with the same token and request, at once: %v", err)
	}
	if slices.Sort(ids); ids[0] != ids[callers-1] {
		s.Fatalf("one token made instances %s and %s", ids[0], ids[callers-1])
	}
	s.running(ids[0])
	if again := s.create(req); again.ID != ids[0] {
		s.Errorf("the same token later made %s beside %s", again.ID, ids[0])
	}
	pause(s.ctx, s.Lag)
	s.listed(s.p, req.Owner, ids[0])
}

func tokenReused(s *suite) {
	req := s.request()
	made := s.create(req)
	for what, change := range map[string]func(*cloud.CreateRequest){
		"user data": func(r *cloud.CreateRequest) { r.UserData = append(bytes.Clone(r.UserData), "# more\n"...) },
		"sandbox":   func(r *cloud.CreateRequest) { r.SandboxID += "x" },
		"name":      func(r *cloud.CreateRequest) { r.Name += "x" },
		"owner":     func(r *cloud.CreateRequest) { r.Owner.Node += "x" },
	} {
		other := req
		change(&other)
		if inst, err := s.p.Create(s.ctx, other); !errdefs.IsAlreadyExists(err) {
			s.Errorf("used token with other %s: %+v, %v; want AlreadyExists", what, inst, err)
		}
	}
	pause(s.ctx, s.Lag)
	s.listed(s.p, req.Owner, made.ID)
}

func unknown(s *suite) {
	for _, id := range []cloud.InstanceID{"", "no-such-instance", "../../etc", "i-0123456789abcdef0"} {
		if _, err := s.p.Get(s.ctx, id); !errdefs.IsNotFound(err) {
			s.Errorf("Get(%q): %v, want NotFound", id, err)
		}
		if err := s.p.Delete(s.ctx, id); !errdefs.IsNotFound(err) {
			s.Errorf("Delete(%q): %v, want NotFound", id, err)
		}
	}
}

func deleteAgain(s *suite) {
	made := s.create(s.request())
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := s.p.Delete(s.ctx, made.ID); err != nil && !errdefs.IsNotFound(err) {
				s.Errorf("Delete at once with others: %v, want nil or NotFound", err)
			}
		})
	}
	wg.Wait()
	if inst, err := s.p.Get(s.ctx, made.ID); err == nil && s.Lag == 0 && inst.State != cloud.StateDeleting {
		s.Errorf("deleted instance is %v, want deleting", inst.State)
	} else if err != nil && !errdefs.IsNotFound(err) {
		s.Errorf("Get of a deleted instance: %v", err)
	}
	s.gone(s.ctx, made.ID)
	for range 3 {
		if err := s.p.Delete(s.ctx, made.ID); !errdefs.IsNotFound(err) {
			s.Errorf("Delete of what is gone: %v, want NotFound", err)
		}
	}
}

func listByOwner(s *suite) {
	mine := s.request()
	neighbour, foreign := s.request(), s.request()
	neighbour.Owner.Node = "node-b"
	foreign.Owner.Cluster = otherCluster
	a := s.create(mine).ID
	all := []cloud.InstanceID{a}
	if s.Max >= 2 {
		b := s.create(neighbour).ID
		all = append(all, b)
		s.listed(s.p, neighbour.Owner, b)
	}
	var f cloud.InstanceID
	if s.Max >= 3 {
		f = s.create(foreign).ID
		s.listed(s.p, foreign.Owner, f)
	}
	pause(s.ctx, s.Lag)
	s.listed(s.p, cloud.Owner{Cluster: cluster}, all...)
	s.listed(s.p, mine.Owner, a)
	s.listed(s.p, cloud.Owner{Cluster: cluster, Node: "node"})
	s.listed(s.p, cloud.Owner{Cluster: "cloud"})
	if _, err := s.p.List(s.ctx, cloud.Owner{}); !errdefs.IsInvalidArgument(err) {
		s.Errorf("List of nobody's instances: %v, want InvalidArgument", err)
	}
}

// abandoned checks that a Create whose caller went away leaves either nothing or
// an instance that List finds, Delete removes, and the same token returns.
func abandoned(s *suite) {
	for n, after := range s.CancelAfter {
		req := s.request()
		ctx, cancel := context.WithTimeout(s.ctx, after)
		inst, err := s.p.Create(ctx, req)
		cancel()
		if err == nil {
			s.gone(s.ctx, inst.ID)
			continue
		}
		if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
			s.Errorf("Create abandoned after %v: %v, want the context's error", after, err)
		}
		pause(s.ctx, s.Lag)
		var found []cloud.InstanceID
		for id, i := range s.list(s.p, req.Owner) {
			if i.Token == req.Token {
				found = append(found, id)
			}
		}
		if len(found) > 1 {
			s.Fatalf("Create abandoned after %v made %v", after, found)
		}
		if n%2 == 0 { // the restarted adaptor goes on
			again := s.create(req)
			if len(found) == 1 && again.ID != found[0] {
				s.Fatalf("the token returned %s, List had shown %s", again.ID, found[0])
			}
			s.running(again.ID)
			found = []cloud.InstanceID{again.ID}
		}
		for _, id := range found { // the restarted adaptor gives up
			s.gone(s.ctx, id)
		}
		if s.Lag == 0 {
			s.listed(s.p, req.Owner)
			for _, l := range s.Leaks() {
				s.Errorf("Create abandoned after %v left behind: %s", after, l)
			}
		}
	}
}

func endedContext(s *suite) {
	req := s.request()
	ctx, cancel := context.WithCancel(s.ctx)
	cancel()
	_, createErr := s.p.Create(ctx, req)
	_, getErr := s.p.Get(ctx, "no-such-instance")
	_, listErr := s.p.List(ctx, req.Owner)
	for call, err := range map[string]error{"Create": createErr, "Get": getErr, "List": listErr, "Delete": s.p.Delete(ctx, "no-such-instance")} {
		if !errors.Is(err, context.Canceled) && !(errdefs.IsNotFound(err) && call != "Create") {
			s.Errorf("%s with an ended context: %v, want the context's error", call, err)
		}
	}
	pause(s.ctx, s.Lag)
	s.listed(s.p, req.Owner)
}

func refused(s *suite) {
	for what, breakIt := range map[string]func(*cloud.CreateRequest){
		"no token":         func(r *cloud.CreateRequest) { r.Token = "" },
		"token with slash": func(r *cloud.CreateRequest) { r.Token = "a\nb" },
		"bad name":         func(r *cloud.CreateRequest) { r.Name = "No Name" },
		"no owner":         func(r *cloud.CreateRequest) { r.Owner = cloud.Owner{} },
		"reserved tag":     func(r *cloud.CreateRequest) { r.Tags = map[string]string{cloud.TagToken: "x"} },
		"empty plan":       func(r *cloud.CreateRequest) { r.Plan = cloud.Plan{} },
	} {
		req := s.request()
		breakIt(&req)
		if inst, err := s.p.Create(s.ctx, req); !errdefs.IsInvalidArgument(err) {
			s.Errorf("%s: %+v, %v; want InvalidArgument", what, inst, err)
		}
	}
	pause(s.ctx, s.Lag)
	s.listed(s.p, cloud.Owner{Cluster: cluster})
}

func restart(s *suite) {
	req := s.request()
	made := s.create(req)
	was := s.running(made.ID)
	s.p = s.New(s.T)
	is := s.running(made.ID)
	if is.Name != was.Name || is.Token != was.Token || is.SandboxID != was.SandboxID || is.Owner != was.Owner ||
		!slices.Equal(is.Addrs, was.Addrs) || !is.CreatedAt.Equal(was.CreatedAt) {
		s.Errorf("after a restart %+v, before %+v", is, was)
	}
	pause(s.ctx, s.Lag)
	s.listed(s.p, req.Owner, made.ID)
	if again := s.create(req); again.ID != made.ID {
		s.Errorf("after a restart the token made %s beside %s", again.ID, made.ID)
	}
	s.gone(s.ctx, made.ID)
	if _, err := s.New(s.T).Get(s.ctx, made.ID); !errdefs.IsNotFound(err) {
		s.Errorf("Get by another provider after Delete: %v, want NotFound", err)
	}
}

// note checks that what a provider notes is kept before it makes anything, and that
// it makes nothing when it cannot be kept.
func note(s *suite) {
	req := s.request()
	full := errors.New("no space left on device")
	notes := 0
	req.Note = func(context.Context, string) error { notes++; return full }
	inst, err := s.p.Create(s.ctx, req)
	if notes == 0 { // nothing to note: then there is no promise
		if err != nil {
			s.Fatalf("Create by a provider without notes: %v", err)
		}
		s.gone(s.ctx, inst.ID)
		return
	}
	if !errors.Is(err, full) {
		s.Errorf("Create whose note was not kept: %+v, %v; want the note's error", inst, err)
	}
	pause(s.ctx, s.Lag)
	s.listed(s.p, req.Owner)
	for _, l := range s.Leaks() {
		s.Errorf("made before the note was kept: %s", l)
	}
	notes = 0
	req.Note = func(_ context.Context, text string) error {
		if notes++; text == "" {
			s.Error("an empty note says as much as none")
		}
		if bytes.Contains([]byte(text), bytes.TrimSpace(req.UserData)) {
			s.Error("the note holds the user data, which is secret")
		}
		for _, l := range s.Leaks() {
			if notes == 1 { // later ones may be of what was made meanwhile
				s.Errorf("made before the first note: %s", l)
			}
		}
		return nil
	}
	made := s.create(req)
	s.gone(s.ctx, made.ID)
}

// progress checks that a Create which is repeated with what was noted, by the same
// process or by the next one, comes to the same instance; wherever the one before
// was interrupted.
func progress(s *suite) {
	req := s.request()
	kept := ""
	req.Note = func(_ context.Context, text string) error { kept = text; return nil }
	made := s.create(req)
	req.Progress = kept
	if again := s.create(req); again.ID != made.ID {
		s.Errorf("the same provider made %s, then %s", made.ID, again.ID)
	}
	s.p = s.New(s.T)
	if again := s.create(req); again.ID != made.ID {
		s.Errorf("one provider made %s, the next one %s", made.ID, again.ID)
	}
	other := req
	other.UserData = append(bytes.Clone(req.UserData), "# more\n"...)
	if inst, err := s.New(s.T).Create(s.ctx, other); !errdefs.IsAlreadyExists(err) {
		s.Errorf("the progress of another request: %+v, %v; want AlreadyExists", inst, err)
	}
	pause(s.ctx, s.Lag)
	s.listed(s.p, req.Owner, made.ID)
	s.gone(s.ctx, made.ID)

	for _, after := range s.CancelAfter {
		req := s.request()
		kept := ""
		req.Note = func(_ context.Context, text string) error { kept = text; return nil }
		ctx, cancel := context.WithTimeout(s.ctx, after)
		inst, err := s.p.Create(ctx, req)
		cancel()
		req.Progress = kept
		s.p = s.New(s.T)
		again := s.create(req)
		if err == nil && again.ID != inst.ID {
			s.Errorf("made %s, and after a restart %s", inst.ID, again.ID)
		}
		pause(s.ctx, s.Lag)
		s.listed(s.p, req.Owner, again.ID)
		s.gone(s.ctx, again.ID)
	}
}
