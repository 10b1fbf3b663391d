// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
)

const vms = "Microsoft.Compute/virtualMachines"

// TestReadyBeforeTheOperation: the VM runs after 3 s, its operation ends after 12 and
// asks to be polled every 10.
func TestReadyBeforeTheOperation(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		req := request(p)
		begin := time.Now()
		inst := w.create(p, req)
		if d := time.Since(begin); d < 3*time.Second || d > 4*time.Second {
			t.Errorf("Create took %v; the VM runs after 3 s", d)
		}
		if inst.State != cloud.StateRunning || len(inst.Addrs) != 1 || inst.Addrs[0].String() != w.only().Addr {
			t.Errorf("instance %+v, VM %+v", inst, w.only())
		}
		if n := w.count(http.MethodPut, vms); n != 1 {
			t.Errorf("%d PUTs", n)
		}
		// With a second of instance time, as the benchmark has it, the poll costs
		// less than half a second.
		if got, err := p.Get(w.Context(), inst.ID); err != nil || !slices.Equal(got.Addrs, inst.Addrs) {
			t.Errorf("Get: %+v, %v", got, err)
		}
	})
	for _, start := range []time.Duration{time.Second, 1900 * time.Millisecond} {
		inWorld(t, fakearm.Config{Timing: fakearm.Timing{Start: start, Create: 30 * time.Second}}, func(w *world) {
			p := w.provider()
			req := request(p)
			begin := time.Now()
			w.create(p, req)
			if d := time.Since(begin) - start; d > 250*time.Millisecond {
				t.Errorf("VM after %v, Create %v later", start, d)
			}
		})
	}
}

// TestMachineAnswersFirst: the machine's own word ends the wait, between two looks at
// Azure; and a machine that never answers holds nothing up.
func TestMachineAnswersFirst(t *testing.T) {
	const boot = 27100 * time.Millisecond // looks are 6 s apart by then
	inWorld(t, fakearm.Config{Timing: fakearm.Timing{Start: 60 * time.Second, Create: 70 * time.Second}}, func(w *world) {
		p := w.provider()
		req := request(p)
		begin := time.Now()
		asked := 0
		var asks netip.Addr
		req.Answers = func(ctx context.Context, addr netip.Addr) error {
			asked++
			asks = addr
			return cloud.Pause(ctx, time.Until(begin.Add(boot)))
		}
		inst := w.create(p, req)
		if d := time.Since(begin); d != boot || asked != 1 {
			t.Errorf("Create took %v, and asked the machine %d times; it answered after %v", d, asked, boot)
		}
		if inst.State != cloud.StateRunning || !slices.Equal(inst.Addrs, []netip.Addr{asks}) {
			t.Errorf("got %+v, the machine at %v answered", inst, asks)
		}
	})
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		req := request(p)
		ended := false
		req.Answers = func(ctx context.Context, _ netip.Addr) error {
			<-ctx.Done()
			ended = true
			return ctx.Err()
		}
		if inst := w.create(p, req); inst.State != cloud.StateRunning || !ended {
			t.Errorf("got %+v; the question has ended: %v", inst, ended)
		}
	})
}

// TestSlowOperation: a VM that takes minutes is followed within Azure's limits.
func TestSlowOperation(t *testing.T) {
	inWorld(t, fakearm.Config{Timing: fakearm.Timing{Start: 4 * time.Minute, Create: 5 * time.Minute}}, func(w *world) {
		p := w.provider()
		req := request(p)
		begin := time.Now()
		w.create(p, req)
		if d := time.Since(begin); d > 4*time.Minute+vmEvery(time.Hour)+time.Second {
			t.Errorf("Create took %v", d)
		}
		if th := w.arm.Throttled(); len(th) != 0 {
			t.Errorf("throttled: %v", th)
		}
	})
}

// TestCapacity: all the ways in which there can be none.
func TestCapacity(t *testing.T) {
	for _, tc := range []struct {
		name   string
		faults []fakearm.Fault
		cfg    func(*Config)
		want   candidate
		puts   int
		within time.Duration // without the time of operations that fail (10 s each)
	}{
		{name: "size refused", faults: []fakearm.Fault{{Code: "SkuNotAvailable", Size: small}}, want: candidate{Size: large}, puts: 2},
		{name: "at the end", faults: []fakearm.Fault{{Code: "AllocationFailed", Size: small, AtEnd: true}}, want: candidate{Size: large}, puts: 2, within: 25 * time.Second},
		{name: "at the end, spot", faults: []fakearm.Fault{{Code: "OverconstrainedAllocationRequest", Spot: true, AtEnd: true}},
			cfg: func(c *Config) { c.Spot = MarketSpot }, want: candidate{Size: small}, puts: 2, within: 25 * time.Second},
		{name: "zone", faults: []fakearm.Fault{{Code: "ZonalAllocationFailed", Zone: "1", Count: -1}},
			cfg: func(c *Config) { c.Zones = []string{"1", "2"} }, want: candidate{Size: small, Zone: "2"}, puts: 0},
		{name: "quota of a family is one of all zones", faults: []fakearm.Fault{{Code: "OperationNotAllowed", Size: small, Count: -1}},
			cfg: func(c *Config) { c.Zones = []string{"1", "2"} }, want: candidate{Size: large, Zone: "*"}, puts: 2},
		{name: "parts are left", faults: []fakearm.Fault{{Code: "AllocationFailed", Size: small, Leave: true}}, want: candidate{Size: large}, puts: 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inWorld(t, fakearm.Config{}, func(w *world) {
				change := []func(*Config){}
				if tc.cfg != nil {
					change = append(change, tc.cfg)
				}
				p := w.provider(change...)
				req := request(p)
				for _, f := range tc.faults {
					f.Type, f.Method = vms, http.MethodPut
					w.arm.Inject(f)
				}
				begin := time.Now()
				inst := w.create(p, req)
				if d := time.Since(begin) - tc.within; d > 10*time.Second {
					t.Errorf("Create took %v more than it may", d)
				}
				vm := w.only()
				got := candidate{vm.Size, vm.Zone, vm.Spot}
				if tc.want.Zone == "*" {
					got.Zone = "*"
				}
				if got != tc.want {
					t.Errorf("VM is %v, want %v", got, tc.want)
				}
				if n := w.count(http.MethodPut, vms); tc.puts != 0 && n != tc.puts {
					t.Errorf("%d PUTs, want %d", n, tc.puts)
				}
				w.gone(p, inst.ID)
			})
		})
	}
}

// TestScarceRemembered: for three minutes nobody asks again for what there was none of.
func TestScarceRemembered(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		req := request(p)
		w.arm.Inject(fakearm.Fault{Method: http.MethodPut, Type: vms, Code: "SkuNotAvailable", Count: -1})
		_, err := p.Create(w.Context(), req)
		if !errdefs.IsResourceExhausted(err) {
			t.Fatalf("Create without capacity: %v", err)
		}
		for _, s := range []string{small, large, "AZURE_INSTANCE_SIZES", "SkuNotAvailable"} {
			if !strings.Contains(err.Error(), s) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q does not name %s in one line", err, s)
			}
		}
		w.arm.Heal()
		puts := w.count(http.MethodPut, vms)
		time.Sleep(scarceFor - time.Second)
		if _, err := p.Create(w.Context(), request(p)); !errdefs.IsResourceExhausted(err) || w.count(http.MethodPut, vms) != puts {
			t.Errorf("%v, after %d more PUTs", err, w.count(http.MethodPut, vms)-puts)
		}
		time.Sleep(2 * time.Second)
		w.create(p, req)
	})
}

// TestOnlyOneZoneOffered: the SKU list's restrictions keep a zone from being asked.
func TestOnlyOneZoneOffered(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		w.arm.Restrict(small, "2")
		p := w.provider(func(c *Config) { c.Zones = []string{"2", "1"} })
		w.create(p, request(p))
		if vm := w.only(); vm.Zone != "1" || w.count(http.MethodPut, vms) != 1 {
			t.Errorf("VM %+v after %d PUTs", vm, w.count(http.MethodPut, vms))
		}
	})
}

func TestZonesSpread(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider(func(c *Config) { c.Zones = []string{"1", "2"} })
		zones := map[string]int{}
		for range 8 {
			w.create(p, request(p))
		}
		for _, vm := range w.arm.VMs() {
			zones[vm.Zone]++
		}
		if zones["1"]+zones["2"] != 8 {
			t.Errorf("VMs by zone: %v", zones)
		}
		// Which token goes where is fixed: the same one always begins in the same zone.
		m := &making{p: p, req: cloud.CreateRequest{Token: "a", Plan: cloud.Plan{Type: small}}, sizes: p.sizes}
		n := &making{p: p, req: cloud.CreateRequest{Token: "b", Plan: cloud.Plan{Type: small}}, sizes: p.sizes}
		if a, b := m.candidates(), n.candidates(); len(a) != 2 || a[0] != b[1] || a[1] != b[0] {
			t.Errorf("candidates of two tokens: %v and %v", a, b)
		}
	})
}

// TestNote: the place is on disk before anything is asked, and a note that fails stops
// the request.
func TestNote(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider(func(c *Config) { c.Zones = []string{"1"} })
		req := request(p)
		var notes []string
		req.Note = func(_ context.Context, text string) error {
			if len(notes) == 0 && w.count(http.MethodPut, vms) != 0 {
				t.Error("the first note came after the request")
			}
			notes = append(notes, text)
			return nil
		}
		w.create(p, req)
		var first, second progress
		if len(notes) != 2 || json.Unmarshal([]byte(notes[0]), &first) != nil || json.Unmarshal([]byte(notes[1]), &second) != nil {
			t.Fatalf("notes: %q", notes)
		}
		want := progress{candidate: candidate{Size: small, Zone: "1"}}
		if first != want || second.candidate != want.candidate || !strings.Contains(second.Operation, "/operations/") {
			t.Errorf("notes: %+v, %+v", first, second)
		}

		puts := w.count(http.MethodPut, vms)
		req = request(p)
		full := errors.New("no space left on device")
		req.Note = func(context.Context, string) error { return full }
		if _, err := p.Create(w.Context(), req); !errors.Is(err, full) || w.count(http.MethodPut, vms) != puts {
			t.Errorf("Create with a note that fails: %v, %d PUTs", err, w.count(http.MethodPut, vms)-puts)
		}
	})
}

// TestResume: another process goes on with the progress of one that died, at any
// moment, and neither makes a second VM nor loses one.
func TestResume(t *testing.T) {
	for _, after := range []time.Duration{time.Millisecond, time.Second, 5 * time.Second, 11 * time.Second, time.Minute} {
		inWorld(t, fakearm.Config{Timing: fakearm.Timing{Start: 8 * time.Second}}, func(w *world) {
			p := w.provider()
			req := request(p)
			var kept string
			req.Note = func(_ context.Context, text string) error { kept = text; return nil }
			ctx, cancel := context.WithTimeout(w.Context(), min(after, 7*time.Second))
			if _, err := p.Create(ctx, req); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("Create cut off after %v: %v", after, err)
			}
			cancel()
			time.Sleep(after)
			puts := w.count(http.MethodPut, vms)
			req.Progress = kept
			inst := w.create(w.provider(), req)
			if inst.State != cloud.StateRunning || w.count(http.MethodPut, vms) != puts {
				t.Errorf("resumed after %v: %+v, %d more PUTs", after, inst, w.count(http.MethodPut, vms)-puts)
			}
			w.only()
		})
	}
}

// TestResumeFailed: the operation failed while nobody looked. The next process learns it
// from the operation, removes what is left, and goes on with the next size.
func TestResumeFailed(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		req := request(p)
		var kept string
		req.Note = func(_ context.Context, text string) error { kept = text; return nil }
		w.arm.Inject(fakearm.Fault{Method: http.MethodPut, Type: vms, Code: "ZonalAllocationFailed", AtEnd: true})
		ctx, cancel := context.WithTimeout(w.Context(), time.Second)
		defer cancel()
		if _, err := p.Create(ctx, req); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		req.Progress = kept
		w.create(w.provider(), req)
		if vm := w.only(); vm.Size != large {
			t.Errorf("VM %+v", vm)
		}
	})
}

// TestLostReply: the VM is made and the answer is lost, also when all the answers are.
func TestLostReply(t *testing.T) {
	for _, count := range []int{1, 3, 20} {
		inWorld(t, fakearm.Config{}, func(w *world) {
			p := w.provider()
			req := request(p)
			w.arm.Inject(fakearm.Fault{Method: http.MethodPut, Type: vms, Lost: true, Count: count})
			inst, err := p.Create(w.Context(), req)
			for n := 0; errdefs.IsUnavailable(err); n++ { // as the adaptor does
				if n > 20 {
					t.Fatal(err)
				}
				inst, err = p.Create(w.Context(), req)
			}
			if err != nil {
				t.Fatal(err)
			}
			if vm := w.only(); !strings.EqualFold(vm.ID, string(inst.ID)) {
				t.Errorf("instance %s, VM %s", inst.ID, vm.ID)
			}
		})
	}
}

// TestBadReplies: replies that cannot be read, and errors of the service.
func TestBadReplies(t *testing.T) {
	for name, f := range map[string]fakearm.Fault{
		"PUT cut":           {Method: http.MethodPut, Type: vms, Malformed: true},
		"GET cut":           {Method: http.MethodGet, Type: vms, Malformed: true, Count: 2},
		"interface cut":     {Method: http.MethodGet, Type: "Microsoft.Network/networkInterfaces", Malformed: true, Count: 2},
		"PUT 500":           {Method: http.MethodPut, Type: vms, Code: "InternalExecutionError", Count: 2},
		"GET 503":           {Method: http.MethodGet, Type: vms, Code: "ServerBusy", Count: 5},
		"PUT slow":          {Method: http.MethodPut, Type: vms, Slow: 5 * time.Second},
		"PUT never":         {Method: http.MethodPut, Type: vms, Never: true},
		"GET never":         {Method: http.MethodGet, Type: vms, Never: true},
		"operation is gone": {Type: "operations", Status: http.StatusNotFound, Code: "NotFound", Count: -1},
		"operation cut":     {Type: "operations", Malformed: true, Count: -1},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, fakearm.Config{Timing: fakearm.Timing{Start: 18 * time.Second, Create: 20 * time.Second}}, func(w *world) {
				p := w.provider()
				req := request(p)
				w.arm.Inject(f)
				w.create(p, req)
				w.only()
			})
		})
	}
}

// TestRefusedThoughMade: a refusal does not take away what another process has made with
// the token, nor what a lost answer was about.
func TestRefusedThoughMade(t *testing.T) {
	for _, code := range []string{"SkuNotAvailable", "OperationNotAllowed", "SomethingNew"} {
		inWorld(t, fakearm.Config{}, func(w *world) {
			p := w.provider()
			req := request(p)
			made := w.create(p, req)
			id := w.only().MachineID
			w.arm.Inject(fakearm.Fault{Method: http.MethodPut, Type: vms, Code: code, Count: -1})
			if again := w.create(w.provider(), req); again.ID != made.ID || w.only().MachineID != id {
				t.Errorf("%s: %s, then %s", code, made.ID, again.ID)
			}
		})
	}
}

// TestFailedBesides: a VM of the token that has failed, for no lack of what is asked for
// now, makes room for one.
func TestFailedBesides(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider(func(c *Config) { c.Zones = []string{"1"} })
		req := request(p)
		w.arm.Inject(fakearm.Fault{Method: http.MethodPut, Type: vms, Code: "ZonalAllocationFailed", AtEnd: true})
		ctx, cancel := context.WithTimeout(w.Context(), time.Second)
		defer cancel()
		if _, err := p.Create(ctx, req); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		w.create(w.provider(func(c *Config) { c.Zones = []string{"2"} }), req)
		if vm := w.only(); vm.Zone != "2" || vm.Size != small {
			t.Errorf("VM %+v", vm)
		}
	})
}

// TestFailsForGood: an operation that fails at its end for no lack of capacity ends the
// request, and leaves nothing.
func TestFailsForGood(t *testing.T) {
	for _, tc := range []struct {
		f     fakearm.Fault
		class func(error) bool
		names string
	}{
		{fakearm.Fault{Code: "VMStartTimedOut", AtEnd: true}, errdefs.IsUnavailable, "VMStartTimedOut"},
		{fakearm.Fault{Code: "SubnetIsFull"}, errdefs.IsResourceExhausted, "AZURE_SUBNET_ID"},
		{fakearm.Fault{Code: "RequestDisallowedByPolicy"}, errdefs.IsPermissionDenied, "policy"},
		{fakearm.Fault{Code: "ResourceNotFound", Status: http.StatusNotFound}, errdefs.IsInvalidArgument, "ResourceNotFound"},
		{fakearm.Fault{Code: "SomethingNew", Status: http.StatusBadRequest, Leave: true}, errdefs.IsInvalidArgument, "SomethingNew"},
	} {
		t.Run(tc.names, func(t *testing.T) {
			inWorld(t, fakearm.Config{Timing: fakearm.Timing{Reserve: -1}}, func(w *world) {
				p := w.provider()
				req := request(p)
				tc.f.Method, tc.f.Type = http.MethodPut, vms
				w.arm.Inject(tc.f)
				_, err := p.Create(w.Context(), req)
				if !tc.class(err) || !strings.Contains(err.Error(), tc.names) || errdefs.IsNotFound(err) {
					t.Errorf("Create: %v", err)
				}
				if l := w.arm.Leaks(nil); len(l) != 0 {
					t.Errorf("left behind: %v", l)
				}
			})
		})
	}
}

// TestReserved: what a failed create has left is reserved for three minutes. The error
// comes before that is over, and says that something is still there, so that the
// adaptor looks for it.
func TestReserved(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider(func(c *Config) { c.PublicIP = true })
		req := request(p)
		w.arm.Inject(fakearm.Fault{Method: http.MethodPut, Type: vms, Code: "AllocationFailed", AtEnd: true, Count: -1})
		begin := time.Now()
		_, err := p.Create(w.Context(), req)
		if !errdefs.IsResourceExhausted(err) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Create: %v", err)
		}
		if d := time.Since(begin); d > 75*time.Second {
			t.Errorf("Create took %v", d)
		}
		if l := w.arm.Leaks(nil); len(l) != 2 { // interface and address
			t.Fatalf("left: %v", l)
		}
		other := w.provider()
		list, err := other.List(w.Context(), owner)
		if err != nil || len(list) != 1 || list[0].Token != req.Token || list[0].SandboxID != req.SandboxID || list[0].State != cloud.StateDeleting ||
			!strings.Contains(list[0].Detail, nicSuffix) {
			t.Fatalf("List: %+v, %v", list, err)
		}
		got, err := other.Get(w.Context(), list[0].ID)
		if err != nil || got.State != cloud.StateDeleting || got.Owner != owner {
			t.Errorf("Get: %+v, %v", got, err)
		}
		deletes := w.count(http.MethodDelete, "/networkInterfaces/")
		if d := w.gone(other, list[0].ID); d < 100*time.Second || d > 200*time.Second {
			t.Errorf("gone after %v", d)
		}
		if n := w.count(http.MethodDelete, "/networkInterfaces/") - deletes; n > 25 {
			t.Errorf("%d DELETEs of an interface that is reserved", n)
		}
		if _, err := other.Get(w.Context(), list[0].ID); !errdefs.IsNotFound(err) {
			t.Errorf("Get of what is gone: %v", err)
		}
	})
}

// TestManyAtOnce: many pods come up within what one takes; nothing is throttled. (The
// benchmark makes 200.)
func TestManyAtOnce(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		const pods = 50
		errs := make(chan error, pods)
		begin := time.Now()
		for range pods {
			req := request(p)
			go func() {
				_, err := p.Create(w.Context(), req)
				errs <- err
			}()
		}
		for range pods {
			if err := <-errs; err != nil {
				t.Fatal(err)
			}
		}
		if d := time.Since(begin); d > 4*time.Second {
			t.Errorf("%d creates took %v", pods, d)
		}
		if th := w.arm.Throttled(); len(th) != 0 || len(w.arm.VMs()) != pods {
			t.Errorf("%d VMs, throttled: %v", len(w.arm.VMs()), th)
		}
	})
}
