// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
)

// TestDelete: the VM takes its parts with it, callers may ask as often as they like, and
// few of their questions reach Azure.
func TestDelete(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider(func(c *Config) { c.PublicIP = true })
		inst := w.create(p, request(p))
		if len(inst.Addrs) != 2 || inst.Addrs[0].IsPrivate() || !inst.Addrs[1].IsPrivate() {
			t.Errorf("addresses %v, want the public one first", inst.Addrs)
		}
		if l := w.arm.Leaks(nil); len(l) != 4 {
			t.Fatalf("there is: %v", l)
		}
		before := len(w.arm.Requests())
		took := w.gone(p, inst.ID)
		if took > 10*time.Second { // forced: a third of 15 s
			t.Errorf("gone after %v", took)
		}
		if n := len(w.arm.Requests()) - before; n > 20 {
			t.Errorf("%d requests", n)
		}
		if l := w.arm.Leaks(nil); len(l) != 0 {
			t.Errorf("left: %v", l)
		}
		if _, err := p.Get(w.Context(), inst.ID); !errdefs.IsNotFound(err) {
			t.Errorf("Get: %v", err)
		}
	})
}

// TestDeleteGoesOn: another process finishes what one has begun, whatever is left.
func TestDeleteGoesOn(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		inst := w.create(p, request(p))
		if err := p.Delete(w.Context(), inst.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		w.gone(w.provider(), inst.ID)
	})
}

func TestDeleteFaults(t *testing.T) {
	const nics = "Microsoft.Network/networkInterfaces"
	for name, f := range map[string]fakearm.Fault{
		"reply lost":           {Method: http.MethodDelete, Type: vms, Lost: true, Count: 2},
		"VM 503":               {Method: http.MethodDelete, Type: vms, Code: "ServerBusy", Count: 3},
		"VM throttled":         {Method: http.MethodDelete, Type: vms, Status: http.StatusTooManyRequests, Code: "TooManyRequests", RetryAfter: 30 * time.Second},
		"VM fails at the end":  {Method: http.MethodDelete, Type: vms, Code: "InternalExecutionError", AtEnd: true},
		"looking throttled":    {Method: http.MethodGet, Type: vms, Status: http.StatusTooManyRequests, Code: "TooManyRequests", RetryAfter: 20 * time.Second, Count: 3},
		"interface refused":    {Method: http.MethodDelete, Type: nics, Code: "RetryableError", Status: http.StatusTooManyRequests, Count: 2},
		"interface 500":        {Method: http.MethodDelete, Type: nics, Code: "InternalExecutionError", Count: 10},
		"disk held":            {Method: http.MethodDelete, Type: "Microsoft.Compute/disks", Code: "OperationNotAllowed", Status: http.StatusConflict, Count: 3},
		"VM in some operation": {Method: http.MethodDelete, Type: vms, Code: "AnotherOperationInProgress", Status: http.StatusConflict, Count: 2},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, fakearm.Config{}, func(w *world) {
				p := w.provider()
				inst := w.create(p, request(p))
				w.arm.Inject(f)
				w.gone(p, inst.ID)
			})
		})
	}
}

// TestDeleteForbidden: what may not be deleted is an error, again and again, and no
// NotFound.
func TestDeleteForbidden(t *testing.T) {
	inWorld(t, fakearm.Config{Principals: []fakearm.Principal{
		{Client: fakearm.DefaultClient, Secret: fakearm.DefaultSecret, NotActions: []string{"Microsoft.Compute/virtualMachines/delete"}},
		{Client: "owner", Secret: "s"},
	}}, func(w *world) {
		p := w.provider()
		inst := w.create(p, request(p))
		for range 3 {
			if err := p.Delete(w.Context(), inst.ID); !errdefs.IsPermissionDenied(err) {
				t.Errorf("Delete: %v", err)
			}
		}
		w.cfg.Credentials.ClientID, w.cfg.Credentials.ClientSecret = "owner", "s"
		w.gone(w.provider(), inst.ID)
	})
}

// TestDeleteDuringCreate: a create that was abandoned is preempted.
func TestDeleteDuringCreate(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		ctx, cancel := context.WithTimeout(w.Context(), time.Second)
		defer cancel()
		if _, err := p.Create(ctx, request(p)); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second) // the list lags
		list, err := p.List(w.Context(), owner)
		if err != nil || len(list) != 1 {
			t.Fatalf("List: %v, %v", list, err)
		}
		w.gone(p, list[0].ID)
	})
}

// TestOthersAreLeftAlone: neither a VM that bears our tags, nor one of another cluster,
// nor an id that leads elsewhere is touched.
func TestOthersAreLeftAlone(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		req := request(p)
		inst := w.create(p, req)
		foreign := request(p)
		foreign.Owner.Cluster = "c2"
		other := w.create(p, foreign)
		time.Sleep(ListSettle)

		m := &making{p: p, req: req, things: things{p.place, "somebodys"}, sizes: p.sizes, key: testKey}
		z, _ := p.sizes.named(small)
		if _, err := p.arm.do(w.Context(), call{method: http.MethodPut, path: m.vm(), version: apiVM, counts: subject{familyPut, m.vm()},
			body: p.body(m.req, m.things, candidate{Size: small}, z, m.key)}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		list, err := p.List(w.Context(), cloud.Owner{Cluster: "c1"})
		if err != nil || len(list) != 1 || list[0].ID != inst.ID {
			t.Errorf("List: %v, %v", list, err)
		}
		for _, id := range []cloud.InstanceID{things{p.place, "somebodys"}.id(), inst.ID + "/../somebodys", "/subscriptions/x/resourceGroups/y/providers/Microsoft.Compute/virtualMachines/z"} {
			if err := p.Delete(w.Context(), id); !errdefs.IsNotFound(err) {
				t.Errorf("Delete(%s): %v", id, err)
			}
			if _, err := p.Get(w.Context(), id); !errdefs.IsNotFound(err) {
				t.Errorf("Get(%s): %v", id, err)
			}
		}
		if len(w.arm.VMs()) != 3 {
			t.Errorf("VMs: %+v", w.arm.VMs())
		}
		w.gone(p, other.ID)
		somebodys := things{p.place, "somebodys"}
		if _, err := p.arm.remove(w.Context(), call{path: somebodys.vm(), version: apiVM, counts: subject{family: familyOther}}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
	})
}

// TestAnotherGroup: an instance stays where it was made, whatever the configuration says
// later.
func TestAnotherGroup(t *testing.T) {
	inWorld(t, fakearm.Config{Groups: []string{"pods", "Other.Group"}}, func(w *world) {
		inst := w.create(w.provider(), request(w.provider()))
		p := w.provider(func(c *Config) { c.ResourceGroup = "Other.Group" })
		if got, err := p.Get(w.Context(), inst.ID); err != nil || got.ID != inst.ID {
			t.Errorf("Get: %+v, %v", got, err)
		}
		w.gone(p, inst.ID)
	})
}

// TestLostMachines: what ends of its own accord is a failed instance, or none.
func TestLostMachines(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider(func(c *Config) { c.Spot = MarketOnly })
		inst := w.create(p, request(p))
		if !w.only().Spot {
			t.Error("the VM is not spot")
		}
		if err := w.arm.Evict(w.only().ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if got, err := p.Get(w.Context(), inst.ID); !errdefs.IsNotFound(err) {
			t.Errorf("Get of an evicted VM: %+v, %v", got, err)
		}
	})
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		inst := w.create(p, request(p))
		time.Sleep(time.Minute) // until the operation is over
		t0 := things{p.place, w.only().Name}
		if _, err := p.arm.do(w.Context(), call{method: http.MethodPost, path: t0.vm() + "/powerOff", version: apiVM, counts: subject{family: familyOther}}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		got, err := p.Get(w.Context(), inst.ID)
		if err != nil || got.State != cloud.StateFailed || got.Detail == "" {
			t.Errorf("Get of a VM that was stopped: %+v, %v", got, err)
		}
	})
}
