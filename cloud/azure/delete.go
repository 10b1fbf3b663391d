// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

const (
	// A deletion is looked at after reapFirst and then ever less often. Callers may
	// ask as often as they like.
	reapFirst   = 250 * time.Millisecond
	reapLongest = 5 * time.Second
	// reservedEvery: an interface that is reserved stays so for up to 180 s.
	reservedEvery = 10 * time.Second
	// askAgain: a deletion that Azure has accepted and that has not begun, or not
	// ended, by then is asked for once more.
	askAgain = 2 * time.Minute
)

// Delete implements cloud.Provider. The VM's own DELETE removes interface, address and
// disk with it; what is still there when the VM is gone is then deleted by name. It
// returns at once, and NotFound when everything has been found gone.
func (p *Provider) Delete(ctx context.Context, id cloud.InstanceID) error {
	t, err := parseID(id)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	unlock, ok := p.work.try("delete " + t.name)
	if !ok {
		return nil // somebody is at it
	}
	defer unlock()
	known := p.recall(t)
	if time.Now().Before(known.next) {
		return nil
	}
	l, err := p.reap(ctx, t)
	switch {
	case err == nil && l.nothing():
		p.forget(t)
		return fmt.Errorf("nothing is left of %s: %w", t.name, errdefs.ErrNotFound)
	case err != nil:
		return fmt.Errorf("delete instance %s: %w", t.name, err)
	}
	p.remember(t, func(r *remembered) {
		r.pace = min(max(r.pace*3/2, reapFirst), reapLongest)
		r.next = later(r.next, time.Now().Add(r.pace))
	})
	return nil
}

// left is what there still is of an instance.
type left struct {
	vm bool
	// nic, disk, ip and others under unexpected names are still there.
	nic, disk, ip, more bool
	// reserved: the interface stays for a while, for the very VM that could not be made,
	// and will serve when that is made after all.
	reserved bool
}

func (l left) nothing() bool { return !l.vm && !l.nic && !l.disk && !l.ip && !l.more }

// reusable tells whether the VM can be made again over what is left.
func (l left) reusable() bool { return !l.vm && !l.disk && !l.more && (!l.nic && !l.ip || l.reserved) }

// reap does what is next to be done to delete an instance. The caller has the lock of
// the deletion.
func (p *Provider) reap(ctx context.Context, t things) (left, error) {
	if !p.recall(t).vmGone {
		gone, err := p.reapVM(ctx, t)
		if err != nil || !gone {
			return left{vm: true}, err
		}
		p.remember(t, func(r *remembered) { r.vmGone = true })
	}
	return p.reapRest(ctx, t)
}

// reapVM asks for the deletion of the VM, or looks how far it is.
func (p *Provider) reapVM(ctx context.Context, t things) (gone bool, err error) {
	if asked := p.recall(t).asked; !asked.IsZero() && time.Since(asked) < askAgain {
		vm, err := p.getVM(ctx, t)
		switch {
		case missing(err):
			return true, nil
		case throttled(err):
			return false, nil // it is going; only the looking has to wait
		case err != nil:
			return false, err
		}
		p.learn(t, vm)
		if vm.Properties.ProvisioningState == "Deleting" || time.Since(asked) < reapLongest {
			return false, nil
		}
	}
	gone, err = p.arm.remove(ctx, call{
		path: t.vm(), version: apiVM, counts: subject{familyDelete, t.vm()},
		// The pod has ended; its guest need not be asked to shut down.
		query: url.Values{"forceDeletion": {"true"}},
	})
	if err != nil && !holding(err) {
		return false, err
	}
	p.remember(t, func(r *remembered) { r.asked = time.Now() })
	return gone, nil
}

func throttled(err error) bool {
	var e *apiError
	return errors.As(err, &e) && e.status == http.StatusTooManyRequests
}

// reapRest deletes what the VM has left.
func (p *Provider) reapRest(ctx context.Context, t things) (left, error) {
	more := p.recall(t).more
	paths := append(t.rest(), more...)
	there := make([]bool, len(paths))
	errs := make([]error, len(paths))
	var wg sync.WaitGroup
	for i, path := range paths {
		wg.Go(func() {
			family := familyNetWrite
			if versionOf(path) == apiDisk {
				family = familyOther
			}
			gone, err := p.arm.remove(ctx, call{path: path, version: versionOf(path), counts: subject{family, path}})
			there[i], errs[i] = !gone, err
		})
	}
	wg.Wait()
	l := left{nic: there[0], disk: there[1], ip: there[2], more: slices.Contains(there[3:], true)}
	var e *apiError
	if errors.As(errs[0], &e) && e.code == codeNicReserved {
		l.reserved = strings.Contains(strings.ToLower(e.message), strings.ToLower(t.vm()))
		p.remember(t, func(r *remembered) { r.next = later(time.Now().Add(reservedEvery), e.after) })
	}
	for i := range errs {
		if holding(errs[i]) {
			errs[i] = nil
		}
	}
	return l, errors.Join(errs...)
}
