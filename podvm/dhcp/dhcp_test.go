// SPDX-License-Identifier: Apache-2.0

package dhcp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/insomniacslk/dhcp/dhcpv4"
)

var mac = net.HardwareAddr{2, 0, 0, 0, 0, 5}

// server is one on a network of its own: what it is sent it notes, with the time, and
// answers as the test says.
type server struct {
	t      *testing.T
	start  time.Time
	answer func(n int, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 // n counts from 0; nil: good answers
	fail   error                                          // of every socket

	mu  sync.Mutex
	got []string // "DISCOVER at 0s", "REQUEST to 10.0.0.1 at 30m0s"; guarded by mu
}

func (s *server) raw() (conn, error) { return s.conn("") }

func (s *server) udp(from, to netip.Addr) (conn, error) {
	return s.conn(fmt.Sprintf(" from %s to %s", from, to))
}

func (s *server) conn(how string) (conn, error) {
	return &wire{s: s, how: how, replies: make(chan *dhcpv4.DHCPv4, 16)}, s.fail
}

type wire struct {
	s       *server
	how     string
	replies chan *dhcpv4.DHCPv4
}

func (w *wire) send(m *dhcpv4.DHCPv4) error {
	w.s.mu.Lock()
	n := len(w.s.got)
	w.s.got = append(w.s.got, fmt.Sprintf("%s%s at %v", m.MessageType(), w.how, time.Since(w.s.start)))
	w.s.mu.Unlock()
	// What is sent is what a server would read.
	sent, err := dhcpv4.FromBytes(m.ToBytes())
	if err != nil {
		return err
	}
	var replies []*dhcpv4.DHCPv4
	if w.s.answer != nil {
		replies = w.s.answer(n, sent)
	} else {
		replies = []*dhcpv4.DHCPv4{good(w.s.t, sent)}
	}
	for _, r := range replies {
		w.replies <- r
	}
	return nil
}

func (w *wire) receive(ctx context.Context) (*dhcpv4.DHCPv4, error) {
	select {
	case m := <-w.replies:
		return m, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (w *wire) close() error { return nil }

func (s *server) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.got)
}

// good is the right answer: 10.0.0.5/24 for an hour.
func good(t *testing.T, m *dhcpv4.DHCPv4, more ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	kind := dhcpv4.MessageTypeOffer
	if m.MessageType() == dhcpv4.MessageTypeRequest {
		kind = dhcpv4.MessageTypeAck
	}
	r, err := dhcpv4.NewReplyFromRequest(m, append([]dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(net.IP{10, 0, 0, 5}),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IP{10, 0, 0, 1})),
		dhcpv4.WithOption(dhcpv4.OptSubnetMask(net.CIDRMask(24, 32))),
		dhcpv4.WithOption(dhcpv4.OptRouter(net.IP{10, 0, 0, 1})),
		dhcpv4.WithOption(dhcpv4.OptIPAddressLeaseTime(time.Hour)),
	}, more...)...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func nak(t *testing.T, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
	return []*dhcpv4.DHCPv4{good(t, m, dhcpv4.WithMessageType(dhcpv4.MessageTypeNak), dhcpv4.WithOption(dhcpv4.OptMessage("not yours")))}
}

// run runs f in a bubble of its own time, with a client whose server is s.
func run(t *testing.T, s *server, f func(ctx context.Context, c *Client)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s.t, s.start = t, time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
		defer cancel()
		f(ctx, &Client{name: "ens5", mac: mac, net: s})
	})
}

func wantRequests(t *testing.T, s *server, want ...string) {
	t.Helper()
	if got := s.requests(); !slices.Equal(got, want) {
		t.Errorf("the server got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestAcquire(t *testing.T) {
	s := &server{}
	run(t, s, func(ctx context.Context, c *Client) {
		l, err := c.Acquire(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if l.Addr != netip.MustParsePrefix("10.0.0.5/24") || l.Server != netip.MustParseAddr("10.0.0.1") || l.Time != time.Hour ||
			l.T1 != 30*time.Minute || l.T2 != 52*time.Minute+30*time.Second || l.MTU != 0 ||
			!slices.Equal(l.Routes, []Route{{Dst: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.0.0.1")}}) {
			t.Errorf("got %+v", l)
		}
		wantRequests(t, s, "DISCOVER at 0s", "REQUEST at 0s")
	})
}

// TestAcquireAgain: messages that are lost, late, foreign, wrong or refused.
func TestAcquireAgain(t *testing.T) {
	change := func(f func(*dhcpv4.DHCPv4)) func(*testing.T, *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
		return func(t *testing.T, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
			r := good(t, m)
			f(r)
			return []*dhcpv4.DHCPv4{r}
		}
	}
	lost := func(*testing.T, *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 { return nil }
	for name, c := range map[string]struct {
		first func(*testing.T, *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 // the answer to the first message
		want  []string
	}{
		"lost":              {lost, []string{"DISCOVER at 0s", "DISCOVER at 200ms", "REQUEST at 200ms"}},
		"of another":        {change(func(m *dhcpv4.DHCPv4) { m.TransactionID[0]++ }), []string{"DISCOVER at 0s", "DISCOVER at 200ms", "REQUEST at 200ms"}},
		"for another":       {change(func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = net.HardwareAddr{2, 0, 0, 0, 0, 6} }), []string{"DISCOVER at 0s", "DISCOVER at 200ms", "REQUEST at 200ms"}},
		"a request":         {change(func(m *dhcpv4.DHCPv4) { m.OpCode = dhcpv4.OpcodeBootRequest }), []string{"DISCOVER at 0s", "DISCOVER at 200ms", "REQUEST at 200ms"}},
		"no address":        {change(func(m *dhcpv4.DHCPv4) { m.YourIPAddr = net.IPv4zero }), []string{"DISCOVER at 0s", "DISCOVER at 200ms", "REQUEST at 200ms"}},
		"no server":         {change(func(m *dhcpv4.DHCPv4) { m.Options.Del(dhcpv4.OptionServerIdentifier) }), []string{"DISCOVER at 0s", "DISCOVER at 200ms", "REQUEST at 200ms"}},
		"a mask with holes": {change(func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptSubnetMask(net.IPMask{255, 0, 255, 0})) }), []string{"DISCOVER at 0s", "DISCOVER at 200ms", "REQUEST at 200ms"}},
		"routes cut short": {change(func(m *dhcpv4.DHCPv4) {
			m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClasslessStaticRoute, []byte{24, 10, 0}))
		}), []string{"DISCOVER at 0s", "DISCOVER at 200ms", "REQUEST at 200ms"}},
		"refused": {nak, []string{"DISCOVER at 0s", "DISCOVER at 200ms", "REQUEST at 200ms"}},
		"two offers": {func(t *testing.T, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
			return []*dhcpv4.DHCPv4{good(t, m), good(t, m, dhcpv4.WithYourIP(net.IP{10, 0, 0, 6}))}
		}, []string{"DISCOVER at 0s", "REQUEST at 0s"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := &server{}
			s.answer = func(n int, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
				if n == 0 {
					return c.first(s.t, m)
				}
				return []*dhcpv4.DHCPv4{good(s.t, m)}
			}
			run(t, s, func(ctx context.Context, client *Client) {
				if l, err := client.Acquire(ctx); err != nil || l.Addr.String() != "10.0.0.5/24" {
					t.Errorf("got %+v, %v", l, err)
				}
				wantRequests(t, s, c.want...)
			})
		})
	}
}

// TestRequestAgain: an offer whose confirmation is lost is asked for again, and one that
// is refused is not.
func TestRequestAgain(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(t *testing.T, n int, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4
		want   []string
	}{
		"lost once": {func(t *testing.T, n int, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
			if n == 1 {
				return nil
			}
			return []*dhcpv4.DHCPv4{good(t, m)}
		}, []string{"DISCOVER at 0s", "REQUEST at 0s", "REQUEST at 200ms"}},
		"refused": {func(t *testing.T, n int, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
			if n == 1 {
				return nak(t, m)
			}
			return []*dhcpv4.DHCPv4{good(t, m)}
		}, []string{"DISCOVER at 0s", "REQUEST at 0s", "DISCOVER at 200ms", "REQUEST at 200ms"}},
		"never": {func(t *testing.T, n int, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
			if 1 <= n && n <= 4 {
				return nil
			}
			return []*dhcpv4.DHCPv4{good(t, m)}
		}, []string{"DISCOVER at 0s", "REQUEST at 0s", "REQUEST at 200ms", "REQUEST at 400ms", "REQUEST at 600ms", "DISCOVER at 800ms", "REQUEST at 800ms"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := &server{}
			s.answer = func(n int, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 { return c.answer(s.t, n, m) }
			run(t, s, func(ctx context.Context, client *Client) {
				if _, err := client.Acquire(ctx); err != nil {
					t.Error(err)
				}
				wantRequests(t, s, c.want...)
			})
		})
	}
}

func TestAcquireFails(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(s *server, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4
		want   string
	}{
		"silence": {func(*server, *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 { return nil }, "DHCP on ens5: no address after asking 6 times: no answer: unavailable"},
		"garbage": {func(s *server, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
			return []*dhcpv4.DHCPv4{good(s.t, m, dhcpv4.WithYourIP(net.IP{127, 0, 0, 1}))}
		}, "DHCP on ens5: no address after asking 6 times: it gives the address 127.0.0.1: unavailable"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &server{}
			s.answer = func(_ int, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 { return c.answer(s, m) }
			run(t, s, func(ctx context.Context, client *Client) {
				ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
				defer cancel()
				if _, err := client.Acquire(ctx); !errdefs.IsUnavailable(err) || err.Error() != c.want {
					t.Errorf("got %v, want %q", err, c.want)
				}
			})
		})
	}
}

// keep acquires a lease and keeps it for a time; it returns the leases that came.
func keep(ctx context.Context, t *testing.T, c *Client, d time.Duration) (leases []*Lease) {
	t.Helper()
	l, err := c.Acquire(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	c.Keep(ctx, l, func(l *Lease) { leases = append(leases, l) })
	return leases
}

func TestKeep(t *testing.T) {
	s := &server{}
	run(t, s, func(ctx context.Context, c *Client) {
		if got := keep(ctx, t, c, 65*time.Minute); len(got) != 2 || got[1].Addr.String() != "10.0.0.5/24" || time.Since(got[1].Since) != 5*time.Minute {
			t.Errorf("got %+v", got)
		}
		wantRequests(t, s, "DISCOVER at 0s", "REQUEST at 0s", "REQUEST from 10.0.0.5 to 10.0.0.1 at 30m0s", "REQUEST from 10.0.0.5 to 10.0.0.1 at 1h0m0s")
	})
}

// TestKeepRebinds: no answer to the renewals; then one to all; then another server has it.
func TestKeepRebinds(t *testing.T) {
	s := &server{}
	s.answer = func(n int, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
		if n < 2 {
			return []*dhcpv4.DHCPv4{good(s.t, m, dhcpv4.WithOption(dhcpv4.OptIPAddressLeaseTime(80*time.Second)))}
		}
		if strings.Contains(s.got[n], "255.255.255.255") {
			return []*dhcpv4.DHCPv4{good(s.t, m, dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IP{10, 0, 0, 2})))}
		}
		return nil
	}
	run(t, s, func(ctx context.Context, c *Client) {
		if got := keep(ctx, t, c, 75*time.Second); len(got) != 1 || got[0].Server.String() != "10.0.0.2" {
			t.Errorf("got %+v", got)
		}
		got := s.requests()
		if first, last := got[2], got[len(got)-1]; first != "REQUEST from 10.0.0.5 to 10.0.0.1 at 40s" || last != "REQUEST from 10.0.0.5 to 255.255.255.255 at 1m10.125s" {
			t.Errorf("got %q", got)
		}
		if len(got) > 12 {
			t.Errorf("%d messages: %q", len(got), got)
		}
	})
}

// TestKeepExpires: nobody answers until the lease is over; then there is a new address.
func TestKeepExpires(t *testing.T) {
	s := &server{}
	s.answer = func(n int, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
		if n < 2 {
			return []*dhcpv4.DHCPv4{good(s.t, m, dhcpv4.WithOption(dhcpv4.OptIPAddressLeaseTime(80*time.Second)))}
		}
		if time.Since(s.start) < 100*time.Second {
			return nil
		}
		return []*dhcpv4.DHCPv4{good(s.t, m, dhcpv4.WithYourIP(net.IP{10, 0, 0, 6}))}
	}
	run(t, s, func(ctx context.Context, c *Client) {
		if got := keep(ctx, t, c, 120*time.Second); len(got) != 1 || got[0].Addr.String() != "10.0.0.6/24" {
			t.Errorf("got %+v", got)
		}
	})
}

// TestKeepRefused: the server takes the address away.
func TestKeepRefused(t *testing.T) {
	s := &server{}
	s.answer = func(n int, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
		if n == 2 {
			return nak(s.t, m)
		}
		return []*dhcpv4.DHCPv4{good(s.t, m)}
	}
	run(t, s, func(ctx context.Context, c *Client) {
		if got := keep(ctx, t, c, 31*time.Minute); len(got) != 1 {
			t.Errorf("got %+v", got)
		}
		wantRequests(t, s, "DISCOVER at 0s", "REQUEST at 0s", "REQUEST from 10.0.0.5 to 10.0.0.1 at 30m0s", "DISCOVER at 30m0s", "REQUEST at 30m0s")
	})
}

// TestKeepForever: a lease without an end is not renewed; and sockets that cannot be had
// are tried for again, not in a hurry.
func TestKeepForever(t *testing.T) {
	s := &server{}
	s.answer = func(_ int, m *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
		return []*dhcpv4.DHCPv4{good(s.t, m, dhcpv4.WithOption(dhcpv4.OptGeneric(dhcpv4.OptionIPAddressLeaseTime, []byte{255, 255, 255, 255})))}
	}
	run(t, s, func(ctx context.Context, c *Client) {
		if got := keep(ctx, t, c, time.Hour); len(got) != 0 || len(s.requests()) != 2 {
			t.Errorf("got %+v after %q", got, s.requests())
		}
	})
	broken := &server{fail: errors.New("no socket")}
	run(t, broken, func(ctx context.Context, c *Client) {
		ctx, cancel := context.WithTimeout(ctx, time.Hour)
		defer cancel()
		c.Keep(ctx, &Lease{Time: time.Minute, T1: 30 * time.Second, T2: 50 * time.Second, Since: time.Now()}, func(*Lease) { t.Error("a lease") })
	})
}

func TestTimes(t *testing.T) {
	for name, c := range map[string]struct {
		lease, t1, t2           time.Duration
		wantLease, want1, want2 time.Duration
	}{
		"defaults":      {800 * time.Second, 0, 0, 800 * time.Second, 400 * time.Second, 700 * time.Second},
		"given":         {800 * time.Second, 100 * time.Second, 200 * time.Second, 800 * time.Second, 100 * time.Second, 200 * time.Second},
		"turned round":  {800 * time.Second, 750 * time.Second, 200 * time.Second, 800 * time.Second, 100 * time.Second, 200 * time.Second},
		"after the end": {800 * time.Second, 900 * time.Second, 1000 * time.Second, 800 * time.Second, 400 * time.Second, 700 * time.Second},
	} {
		m := &dhcpv4.DHCPv4{Options: dhcpv4.Options{}}
		m.UpdateOption(dhcpv4.OptIPAddressLeaseTime(c.lease))
		m.UpdateOption(dhcpv4.OptRenewTimeValue(c.t1))
		m.UpdateOption(dhcpv4.OptRebindingTimeValue(c.t2))
		var l Lease
		if l.times(m); l.Time != c.wantLease || l.T1 != c.want1 || l.T2 != c.want2 {
			t.Errorf("%s: %+v", name, l)
		}
	}
}

func FuzzParse(f *testing.F) {
	m, err := dhcpv4.New(dhcpv4.WithYourIP(net.IP{10, 0, 0, 5}), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IP{10, 0, 0, 1})))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(m.ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := dhcpv4.FromBytes(b)
		if err != nil {
			return
		}
		l, err := parse(m)
		if err == nil && (!l.Addr.IsValid() || !l.Server.IsValid() || l.Time < 0 || l.T1 > l.T2 || l.T2 > l.Time && l.Time != 0 || len(l.Routes) > maxRoutes) {
			t.Errorf("%+v", l)
		}
	})
}
