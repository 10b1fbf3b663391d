// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// part is what is read of everything that is not a VM.
type part struct {
	ID         string             `json:"id"`
	Name       string             `json:"name"`
	Tags       map[string]*string `json:"tags"`
	Properties struct {
		ProvisioningState string     `json:"provisioningState"`
		TimeCreated       time.Time  `json:"timeCreated"` // disks
		IPAddress         string     `json:"ipAddress"`   // public addresses
		IPConfigurations  []struct { // interfaces
			Properties struct {
				PrivateIPAddress string               `json:"privateIPAddress"`
				PublicIPAddress  *struct{ ID string } `json:"publicIPAddress"`
			} `json:"properties"`
		} `json:"ipConfigurations"`
	} `json:"properties"`
}

// vmView is what is read of a VM. The SDK's type would take ten times as long to decode,
// and a VM is read often.
type vmView struct {
	Name       string             `json:"name"`
	Tags       map[string]*string `json:"tags"`
	Zones      []string           `json:"zones"`
	Properties struct {
		ProvisioningState string    `json:"provisioningState"`
		TimeCreated       time.Time `json:"timeCreated"`
		Priority          string    `json:"priority"`
		HardwareProfile   struct {
			VMSize string `json:"vmSize"`
		} `json:"hardwareProfile"`
		NetworkProfile struct {
			NetworkInterfaces []struct {
				ID string `json:"id"`
			} `json:"networkInterfaces"`
		} `json:"networkProfile"`
		StorageProfile struct {
			OSDisk struct {
				ManagedDisk struct {
					ID string `json:"id"`
				} `json:"managedDisk"`
			} `json:"osDisk"`
		} `json:"storageProfile"`
		InstanceView struct {
			Statuses []struct {
				Code    string `json:"code"`
				Message string `json:"message"`
			} `json:"statuses"`
		} `json:"instanceView"` // only where it was asked for
	} `json:"properties"`
}

// versionOf is the API that a resource's path belongs to.
func versionOf(path string) string {
	if strings.Contains(path, "/Microsoft.Compute/") {
		return apiDisk
	}
	return apiNetwork
}

// getVM reads a VM with its instance view, which holds its power state.
func (p *Provider) getVM(ctx context.Context, t things) (*vmView, error) {
	var vm vmView
	_, err := p.arm.read(ctx, call{
		path: t.vm(), version: apiVM, query: url.Values{"$expand": {"instanceView"}}, counts: subject{familyGet, t.vm()},
	}, &vm)
	return &vm, err
}

// instanceOf describes a VM.
func (p *Provider) instanceOf(t things, vm *vmView) cloud.Instance {
	inst := tagged(t, vm.Tags)
	inst.State, inst.Detail = stateOf(vm)
	inst.CreatedAt = vm.Properties.TimeCreated
	if inst.State != cloud.StateDeleting {
		inst.Addrs = p.recall(t).addrs
	}
	p.learn(t, vm)
	return inst
}

// learn remembers what belongs to a VM under a name that is not the expected one.
func (p *Provider) learn(t things, vm *vmView) {
	ids := []string{vm.Properties.StorageProfile.OSDisk.ManagedDisk.ID}
	for _, r := range vm.Properties.NetworkProfile.NetworkInterfaces {
		ids = append(ids, r.ID)
	}
	p.learnMore(t, ids...)
}

// learnMore remembers those of the paths that are in the instance's own group and bear
// its name.
func (p *Provider) learnMore(t things, ids ...string) {
	for _, id := range ids {
		same := func(other string) bool { return strings.EqualFold(other, id) }
		if slices.ContainsFunc(t.rest(), same) || !strings.HasPrefix(strings.ToLower(path.Base(id)), t.name) ||
			!strings.HasPrefix(strings.ToLower(id), strings.ToLower(t.path()+"/providers/microsoft.")) {
			continue
		}
		p.remember(t, func(r *remembered) {
			if !slices.ContainsFunc(r.more, same) {
				r.more = append(slices.Clip(r.more), id)
			}
		})
	}
}

// stateOf reads the state of a VM. Without an instance view, as in lists, one that was
// made counts as running.
func stateOf(vm *vmView) (cloud.State, string) {
	on := power(vm)
	switch vm.Properties.ProvisioningState {
	case "Deleting":
		return cloud.StateDeleting, ""
	case "Failed", "Canceled":
		code, message := failureOf(vm)
		if on == "running" && strings.HasPrefix(code, "OSProvisioning") {
			// Azure waits for a guest to report, and calls the VM failed when none
			// has for some 20 minutes. The guest runs on.
			return cloud.StateRunning, ""
		}
		return cloud.StateFailed, strings.TrimSuffix(code+": "+message, ": ")
	case "Creating":
		if on == "running" {
			return cloud.StateRunning, ""
		}
		return cloud.StatePending, ""
	case "Succeeded", "Updating", "Migrating":
		switch on {
		case "running", "":
			return cloud.StateRunning, ""
		case "starting":
			return cloud.StatePending, ""
		case "stopped", "stopping", "deallocated", "deallocating":
			return cloud.StateFailed, "the VM is " + on + ": its guest has shut down, or Azure has taken its host"
		}
	}
	return cloud.StateUnknown, ""
}

// addresses returns the VM's addresses, and remembers them: they do not change. None
// and no error: it has none yet.
func (p *Provider) addresses(ctx context.Context, t things, vm *vmView) ([]netip.Addr, error) {
	nic := t.nic()
	if refs := vm.Properties.NetworkProfile.NetworkInterfaces; len(refs) > 0 && refs[0].ID != "" {
		nic = refs[0].ID
	}
	var n part
	if err := p.arm.get(ctx, nic, apiNetwork, familyNetRead, &n); err != nil {
		if missing(err) {
			return nil, nil
		}
		return nil, err
	}
	addrs, public := n.addresses()
	if p.cfg.PublicIP && public != "" && len(addrs) > 0 {
		var ip part
		if err := p.arm.get(ctx, public, apiNetwork, familyNetRead, &ip); err != nil {
			if missing(err) {
				return nil, nil
			}
			return nil, err
		}
		a, err := netip.ParseAddr(ip.Properties.IPAddress)
		if err != nil {
			return nil, nil
		}
		addrs = append([]netip.Addr{a}, addrs...)
	} else if p.cfg.PublicIP {
		return nil, nil // without it the node cannot reach the VM
	}
	if len(addrs) > 0 {
		p.remember(t, func(r *remembered) { r.addrs = addrs })
	}
	return addrs, nil
}

// addresses of an interface, and the id of its public one.
func (n part) addresses() (addrs []netip.Addr, public string) {
	for _, c := range n.Properties.IPConfigurations {
		if a, err := netip.ParseAddr(c.Properties.PrivateIPAddress); err == nil {
			addrs = append(addrs, a)
		}
		if i := c.Properties.PublicIPAddress; i != nil && public == "" {
			public = i.ID
		}
	}
	return addrs, public
}

// Get implements cloud.Provider.
func (p *Provider) Get(ctx context.Context, id cloud.InstanceID) (cloud.Instance, error) {
	t, err := parseID(id)
	if err != nil {
		return cloud.Instance{}, err
	}
	inst, err := p.getInstance(ctx, t)
	if err != nil {
		return cloud.Instance{}, fmt.Errorf("get instance %s: %w", t.name, err)
	}
	return inst, nil
}

func (p *Provider) getInstance(ctx context.Context, t things) (cloud.Instance, error) {
	vm, err := p.getVM(ctx, t)
	if missing(err) {
		return p.remains(ctx, t)
	}
	if err != nil {
		return cloud.Instance{}, err
	}
	inst := p.instanceOf(t, vm)
	if len(inst.Addrs) == 0 && (inst.State == cloud.StatePending || inst.State == cloud.StateRunning) {
		if inst.Addrs, err = p.addresses(ctx, t, vm); err != nil {
			return cloud.Instance{}, err
		}
	}
	return inst, nil
}

// remains describes what is left of an instance whose VM is gone: it is being deleted,
// whoever has begun with it, and somebody has to go on. NotFound: nothing is left.
func (p *Provider) remains(ctx context.Context, t things) (cloud.Instance, error) {
	paths := append(t.rest(), p.recall(t).more...)
	found := make([]*part, len(paths))
	errs := make([]error, len(paths))
	var wg sync.WaitGroup
	for i, path := range paths {
		wg.Go(func() {
			var r part
			family := familyNetRead
			if versionOf(path) == apiDisk {
				family = familyOther
			}
			err := p.arm.get(ctx, path, versionOf(path), family, &r)
			switch {
			case err == nil:
				r.ID = path
				found[i] = &r
			case !missing(err):
				errs[i] = err
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return cloud.Instance{}, err
	}
	var parts []part
	for _, r := range found {
		if r != nil {
			parts = append(parts, *r)
		}
	}
	if len(parts) == 0 {
		return cloud.Instance{}, fmt.Errorf("there is no VM %s in resource group %s: %w", t.name, t.group, errdefs.ErrNotFound)
	}
	return remainsOf(t, parts), nil
}

// remainsOf makes an instance of the parts of one.
func remainsOf(t things, parts []part) cloud.Instance {
	inst := cloud.Instance{ID: t.id()}
	names := make([]string, len(parts))
	for i, r := range parts {
		if tag(r.Tags, cloud.TagToken) != "" {
			inst = tagged(t, r.Tags)
		}
		names[i] = path.Base(r.ID)
	}
	for _, r := range parts {
		if inst.CreatedAt.IsZero() {
			inst.CreatedAt = r.Properties.TimeCreated
		}
	}
	inst.State = cloud.StateDeleting
	slices.Sort(names)
	inst.Detail = "the VM is gone; not yet: " + strings.Join(names, ", ")
	return inst
}

// List implements cloud.Provider. It makes four requests, however many instances there
// are. What is left of an instance whose VM is gone counts as one being deleted, so
// that nothing is forgotten that costs money.
func (p *Provider) List(ctx context.Context, owner cloud.Owner) ([]cloud.Instance, error) {
	if owner.Cluster == "" {
		return nil, fmt.Errorf("list instances: the owner's cluster is empty: %w", errdefs.ErrInvalidArgument)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	out, err := p.list(ctx, owner)
	if missing(err) {
		return nil, nil // a group that does not exist holds nothing
	}
	if err != nil {
		return nil, fmt.Errorf("list instances of cluster %s: %w", owner.Cluster, err)
	}
	return out, nil
}

func (p *Provider) list(ctx context.Context, owner cloud.Owner) ([]cloud.Instance, error) {
	// The parts first: a VM is there before its parts, so that whatever part is
	// found with no VM in the later list has none.
	kinds := []string{"Microsoft.Network/networkInterfaces", "Microsoft.Compute/disks", "Microsoft.Network/publicIPAddresses"}
	lists := make([][]part, len(kinds))
	errs := make([]error, len(kinds))
	var wg sync.WaitGroup
	for i, kind := range kinds {
		wg.Go(func() {
			at := p.place.path() + "/providers/" + kind
			lists[i], errs[i] = list[part](ctx, p.arm, call{path: at, version: versionOf(at + "/"), counts: subject{family: familyList}})
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	vms, err := p.getVMs(ctx)
	if err != nil {
		return nil, err
	}
	parts := map[string][]part{} // by VM name
	public := map[string]string{}
	for i, kind := range kinds {
		for _, r := range lists[i] {
			if name := r.instance(); name != "" {
				r.ID = p.place.path() + "/providers/" + kind + "/" + r.Name
				parts[name] = append(parts[name], r)
				public[strings.ToLower(r.ID)] = r.Properties.IPAddress
			}
		}
	}
	var out []cloud.Instance
	for i := range vms {
		t := things{p.place, strings.ToLower(vms[i].Name)}
		if t.name != nameOf(tag(vms[i].Tags, cloud.TagToken)) {
			continue // not made by us, whatever its tags say
		}
		inst := p.instanceOf(t, &vms[i])
		if len(inst.Addrs) == 0 && inst.State != cloud.StateDeleting {
			inst.Addrs = addressesIn(parts[t.name], public, p.cfg.PublicIP)
		}
		delete(parts, t.name)
		if owned(inst.Owner, owner) {
			out = append(out, inst)
		}
	}
	for name, left := range parts {
		t := things{p.place, name}
		inst := remainsOf(t, left)
		if !owned(inst.Owner, owner) {
			continue
		}
		for _, r := range left {
			p.learnMore(t, r.ID)
		}
		out = append(out, inst)
	}
	slices.SortFunc(out, func(a, b cloud.Instance) int {
		if c := a.CreatedAt.Compare(b.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(string(a.ID), string(b.ID))
	})
	return out, nil
}

// getVMs lists the VMs of the resource group, without their instance views.
func (p *Provider) getVMs(ctx context.Context) ([]vmView, error) {
	return list[vmView](ctx, p.arm, call{
		path: p.place.path() + "/providers/Microsoft.Compute/virtualMachines", version: apiVM, counts: subject{family: familyList},
	})
}

// instance is the name of the VM that a part belongs to; "": it is not ours, whatever
// its tags say.
func (r part) instance() string {
	name := nameRule.FindString(strings.ToLower(r.Name))
	if token := tag(r.Tags, cloud.TagToken); token != "" && nameOf(token) != name {
		return ""
	}
	return name
}

// addressesIn finds the addresses of a VM among its parts.
func addressesIn(parts []part, public map[string]string, wantPublic bool) []netip.Addr {
	for _, r := range parts {
		addrs, ip := r.addresses()
		if len(addrs) == 0 {
			continue
		}
		if wantPublic {
			a, err := netip.ParseAddr(public[strings.ToLower(ip)])
			if err != nil {
				return nil
			}
			addrs = append([]netip.Addr{a}, addrs...)
		}
		return addrs
	}
	return nil
}
