// SPDX-License-Identifier: Apache-2.0

package dhcp

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// broadcast is the address of all on the link.
var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// Keep renews a lease until ctx ends, and calls changed with each new one, which may
// have another address, other routes or another MTU than the one before.
//
// A lease that ends because no server answers is not the end of its address: a cloud's
// address belongs to the instance as long as the instance exists, lease or not, and a
// pod outlives its cloud's DHCP server. So the caller is not told; a new one is asked
// for until there is one.
func (c *Client) Keep(ctx context.Context, l *Lease, changed func(*Lease)) {
	for ctx.Err() == nil {
		if l.Time == 0 {
			<-ctx.Done()
			return
		}
		next, err := c.renew(ctx, l)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			if next, err = c.Acquire(ctx); err != nil {
				// There is no socket to be had. If ctx ended instead, so does the loop.
				_ = pause(ctx, minRenewal)
				continue
			}
		}
		l = next
		changed(l)
	}
}

// errExpired: the lease's time is over.
var errExpired = errors.New("the lease has ended")

// renew waits for T1 and then asks, the server until T2 and anyone until the end of the
// lease. The error is that of a refusal, errExpired, or ctx's.
func (c *Client) renew(ctx context.Context, l *Lease) (*Lease, error) {
	for at := l.Since.Add(l.T1); ; {
		if err := pause(ctx, time.Until(at)); err != nil {
			return nil, err
		}
		now := time.Now()
		end, to := l.Since.Add(l.T2), l.Server
		if !now.Before(end) {
			end, to = l.Since.Add(l.Time), broadcast
		}
		if !now.Before(end) {
			return nil, errExpired
		}
		next, err := c.renewOnce(ctx, l, to)
		if err == nil || errors.Is(err, errRefused) {
			return next, err
		}
		// RFC 2131 4.4.5: after half of what is left.
		left := end.Sub(now)
		at = now.Add(min(max(left/2, minRenewal), maxRenewal, left))
	}
}

// renewOnce sends one REQUEST for the address that is held.
func (c *Client) renewOnce(ctx context.Context, l *Lease, to netip.Addr) (*Lease, error) {
	conn, err := c.net.udp(l.Addr.Addr(), to)
	if err != nil {
		return nil, err
	}
	defer conn.close()
	m, err := c.message(dhcpv4.MessageTypeRequest, dhcpv4.WithClientIP(l.Addr.Addr().AsSlice()))
	if err != nil {
		return nil, err
	}
	return c.request(ctx, conn, m, minRenewal)
}
