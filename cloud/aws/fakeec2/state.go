// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sort"
	"strconv"
	"time"
)

func itoa(n int) string { return strconv.Itoa(n) }

// resource is what all things with an id have in common.
type resource struct {
	id      string
	seq     int // order of creation
	created time.Time
	visible time.Time // Describe calls and other calls know it from then
	tags    map[string]string
	gone    time.Time // it does not exist from then; zero: it does
}

func (r *resource) exists(now time.Time) bool { return r.gone.IsZero() || now.Before(r.gone) }

// seen tells whether a Describe call finds it.
func (r *resource) seen(now time.Time) bool { return r.exists(now) && !now.Before(r.visible) }

// phase is a state that a thing entered, or will.
type phase struct {
	at    time.Time
	seen  time.Time // Describe calls say so from then
	state string
}

// States of an instance and their numbers in replies ("InstanceState", EC2 API).
const (
	pending      = "pending"
	running      = "running"
	shuttingDown = "shutting-down"
	terminated   = "terminated"
	stopping     = "stopping"
	stopped      = "stopped"
)

var stateCodes = map[string]int{pending: 0, running: 16, shuttingDown: 32, terminated: 48, stopping: 64, stopped: 80}

// terminatedVisible is for how long an instance is still described after its end:
// "about an hour" in the User Guide.
const terminatedVisible = time.Hour

// instance is a virtual machine.
//
//	pending -> running -> shutting-down -> terminated
//	           running -> stopping -> stopped -> pending | shutting-down
type instance struct {
	resource
	phases      []phase
	reservation string
	index       int
	typ         InstanceType
	image       *image
	subnet      *subnet
	token       string
	launch      *params // the request, with the launch template's parameters in it
	market      string  // "spot" or "on-demand"
	spot        *spotRequest
	userData    []byte
	enis        []*eni // in the order of their device index
	volumes     []*volume
	meta        metadataOptions
	terminate   bool // shutdown behaviour
	protected   bool // against TerminateInstances
	launched    time.Time
	reason      [2]string // code and message of its last change of state
	transition  string    // the older form of the same, for people
	reclaim     time.Time // a spot instance's notice says so; zero: no notice
	released    bool      // what it had is given back
	machine     *machine  // nil: none behind it
}

type metadataOptions struct {
	tokens, endpoint, tags string
	hops                   int
}

// state is the instance's true state; described is what Describe calls say.
func (i *instance) state(now time.Time) string {
	s := pending
	for _, p := range i.phases {
		if !p.at.After(now) {
			s = p.state
		}
	}
	return s
}

func (i *instance) described(now time.Time) string {
	s := pending
	for _, p := range i.phases {
		if !p.seen.After(now) {
			s = p.state
		}
	}
	return s
}

// alive tells whether it counts against capacity and quota.
func (i *instance) alive(now time.Time) bool {
	switch i.state(now) {
	case pending, running, shuttingDown:
		return true
	}
	return false
}

// enter cuts off what was to come and has the instance be in state from at.
func (s *Server) enter(i *instance, at time.Time, state string) {
	kept := i.phases[:0]
	for _, p := range i.phases {
		if p.at.Before(at) || p.at.Equal(at) && p.state != state {
			kept = append(kept, p)
		}
	}
	seen := at.Add(s.lag())
	if n := len(kept); n > 0 && seen.Before(kept[n-1].seen) {
		seen = kept[n-1].seen // states are seen in their order
	}
	i.phases = append(kept, phase{at, seen, state})
	if state == terminated {
		i.gone = at.Add(terminatedVisible)
	}
}

type volume struct {
	resource
	gib, iops, throughput int
	kind, kms, snapshot   string
	zone                  string
	encrypted             bool
	instance              *instance // nil: attached to none
	device                string
	deleteOnTermination   bool
	attached              time.Time
}

type eni struct {
	resource
	subnet              *subnet
	addr                netip.Addr
	public              netip.Addr
	mac                 string
	description         string
	groups              []*group
	instance            *instance // nil: attached to none
	index               int
	attachment          string
	attached            time.Time
	deleteOnTermination bool
}

type subnet struct {
	Subnet
	tags map[string]string
}

type group struct {
	SecurityGroup
	rules []rule
	tags  map[string]string
}

type image struct {
	resource
	Image
	description string
	mappings    []mapping
	ena         bool
	imds        string // "v2.0": instances require tokens unless the launch says otherwise
	tpm         string
	file        string
}

// mapping is a block device of an image.
type mapping struct {
	device, snapshot, kind string
	gib                    int
	encrypted              bool
	deleteOnTermination    bool
}

// newID makes an id as the service's: a prefix and 17 hexadecimal digits.
func (s *Server) newID(prefix string) string {
	return fmt.Sprintf("%s0%016x", prefix, s.random.Uint64())
}

// lag is how long the next change stays unseen.
func (s *Server) lag() time.Duration {
	if s.cfg.MaxLag <= 0 {
		return 0
	}
	return time.Duration(s.random.Int64N(int64(s.cfg.MaxLag)))
}

func (s *Server) newResource(prefix string, now time.Time, tags map[string]string) resource {
	s.seq++
	if tags == nil {
		tags = map[string]string{}
	}
	return resource{id: s.newID(prefix), seq: s.seq, created: now, visible: now.Add(s.lag()), tags: tags}
}

func newRandom(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0x6b617461)) }

// settle brings everything up to now: what was to happen by then has. s.mu is held.
func (s *Server) settle(now time.Time) {
	for _, i := range s.instances {
		if !i.reclaim.IsZero() && !now.Before(i.reclaim) && i.alive(i.reclaim) && i.state(i.reclaim) != shuttingDown {
			s.end(i, i.reclaim, "Server.SpotInstanceTermination", "Server.SpotInstanceTermination: Spot instance termination")
		}
		if !i.released && i.state(now) == terminated {
			s.release(i, now)
		}
	}
}

// release gives back what a terminated instance had.
func (s *Server) release(i *instance, now time.Time) {
	i.released = true
	for _, v := range i.volumes {
		v.instance = nil
		if v.deleteOnTermination {
			v.gone = now
		}
	}
	for _, e := range i.enis {
		e.instance = nil
		e.public = netip.Addr{}
		if e.deleteOnTermination {
			e.gone = now
		}
	}
	if i.spot != nil {
		i.spot.end(now, i.reason[0])
	}
}

// end terminates an instance as of at. s.mu is held.
func (s *Server) end(i *instance, at time.Time, code, message string) {
	switch i.state(at) {
	case shuttingDown, terminated:
		return
	}
	i.reason = [2]string{code, message}
	i.transition = fmt.Sprintf("%s (%s)", message[:max(0, indexOr(message, ':'))], at.UTC().Format("2006-01-02 15:04:05 MST"))
	if code == "Client.UserInitiatedShutdown" {
		i.transition = fmt.Sprintf("User initiated (%s)", at.UTC().Format("2006-01-02 15:04:05 MST"))
	}
	s.enter(i, at, shuttingDown)
	if i.machine != nil {
		i.machine.stop(terminated)
		return
	}
	s.enter(i, at.Add(s.cfg.StopTime), terminated)
}

func indexOr(text string, c byte) int {
	for i := range len(text) {
		if text[i] == c {
			return i
		}
	}
	return len(text)
}

// sorted returns the values of a map of resources in the order of their creation.
func sorted[T any](m map[string]T, seq func(T) int) []T {
	out := make([]T, 0, len(m))
	for _, v := range m {
		out = append(out, v)
	}
	sort.Slice(out, func(a, b int) bool { return seq(out[a]) < seq(out[b]) })
	return out
}
