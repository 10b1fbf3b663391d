// SPDX-License-Identifier: Apache-2.0

package aws_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
)

// noted is the part of a note that tests look at.
type noted struct{ Type, Market, Subnet, Zone, Token string }

func parse(t *testing.T, note string) (n noted) {
	t.Helper()
	if err := json.Unmarshal([]byte(note), &n); err != nil {
		t.Fatalf("note %q: %v", note, err)
	}
	return n
}

// Whatever happens to the reply, the same request again gives the same instance.
func TestLostReply(t *testing.T) {
	for name, f := range map[string]fakeec2.Fault{
		"lost":          {Action: "RunInstances", Lost: true, Times: 3},
		"malformed":     {Action: "RunInstances", Malformed: true, Times: 3},
		"hangs":         {Action: "RunInstances", Hang: true, Times: 1},
		"too slow":      {Action: "RunInstances", Slow: time.Second, Times: 1},
		"error after":   {Action: "RunInstances", Err: &fakeec2.Error{Status: 500, Code: "InternalError", Message: "oops"}, Times: 3},
		"from a proxy":  {Action: "RunInstances", Err: &fakeec2.Error{Status: 502, Code: "BadGateway", Message: "oops"}, Times: 3},
		"lost once":     {Action: "RunInstances", Lost: true, Times: 1},
		"half of it":    {Action: "RunInstances", Partial: &fakeec2.Error{Status: 500, Code: "InternalError", Message: "oops"}, Times: 3},
		"half, refused": {Action: "RunInstances", Partial: &fakeec2.Error{Status: 500, Code: "InsufficientInstanceCapacity", Message: "none"}, Times: 1},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, fakeec2.Realistic(), func(t *testing.T, s *fakeec2.Server) {
				p := provider(t, s)
				req := request(t, p, "a")
				var kept notes
				req.Note = kept.keep
				hits := s.Inject(f)
				inst, err := p.Create(t.Context(), req)
				for again := 0; errdefs.IsUnavailable(err) && again < 3; again++ {
					req.Progress = kept.last()
					inst, err = p.Create(t.Context(), req)
				}
				if err != nil {
					t.Fatal(err)
				}
				if hits() == 0 {
					t.Fatal("the fault did not happen")
				}
				if all := s.Instances(); len(all) != 1 || all[0].ID != string(inst.ID) {
					t.Errorf("there are %+v, Create returned %s", all, inst.ID)
				}
				running(t, p, inst.ID)
			})
		})
	}
}

// A process that dies after the call leaves a note; the next one finds the instance
// by it, or makes it there and nowhere else.
func TestRestart(t *testing.T) {
	for name, lose := range map[string]bool{"made": true, "not made": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, fakeec2.Realistic(), func(t *testing.T, s *fakeec2.Server) {
				p := provider(t, s)
				req := request(t, p, "a")
				var kept notes
				req.Note = kept.keep
				// The first candidate has no capacity, at the second the process dies.
				s.Inject(fakeec2.Fault{Action: "RunInstances", Times: 1,
					Err: &fakeec2.Error{Status: 500, Code: "InsufficientInstanceCapacity", Message: "none"}})
				s.Inject(fakeec2.Fault{Action: "RunInstances", Hang: lose, Delay: map[bool]time.Duration{false: time.Hour}[lose]})
				ctx, die := context.WithTimeout(t.Context(), 5*time.Second)
				defer die()
				if _, err := p.Create(ctx, req); !errors.Is(err, context.DeadlineExceeded) {
					t.Fatal(err)
				}
				if len(kept.list) != 2 {
					t.Fatalf("notes: %q", kept.list)
				}
				s.ClearFaults()
				req.Progress = kept.last()
				next := provider(t, s) // does not know what had no capacity
				inst := mustCreate(t, next, req)
				all := s.Instances()
				if want := parse(t, req.Progress); len(all) != 1 || all[0].Token != want.Token || all[0].Subnet != want.Subnet || all[0].ID != string(inst.ID) {
					t.Errorf("there are %+v, the note was %+v", all, want)
				}
				if len(kept.list) != 2 {
					t.Errorf("the same attempt was noted again: %q", kept.list)
				}
			})
		})
	}
}

// The instance of a request is told from that of another, also when the process that
// made it is gone and the configuration has changed.
func TestUsedToken(t *testing.T) {
	bubble(t, fakeec2.Realistic(), func(t *testing.T, s *fakeec2.Server) {
		p := provider(t, s)
		req := request(t, p, "a")
		var kept notes
		req.Note = kept.keep
		made := mustCreate(t, p, req)
		req.Progress = kept.last()
		next := provider(t, s, func(c *aws.Config) { c.RootVolumeGiB, c.KeyName = 50, fakeec2.DefaultKeyPair })
		if again := mustCreate(t, next, req); again.ID != made.ID {
			t.Errorf("other volume size: %s and %s", made.ID, again.ID)
		}
		req.UserData = append(req.UserData, "# more\n"...)
		if inst, err := provider(t, s).Create(t.Context(), req); !errdefs.IsAlreadyExists(err) {
			t.Errorf("other user data: %+v, %v; want AlreadyExists", inst, err)
		}
		if n := len(s.Instances()); n != 1 {
			t.Errorf("%d instances", n)
		}
	})
}

// Where nobody keeps notes, the tag finds what the token has made, wherever it is.
func TestNoNotes(t *testing.T) {
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		for _, z := range []string{zoneA, zoneB} {
			s.SetCapacity(fakeec2.Capacity{Zone: z, Free: 0})
		}
		p := provider(t, s)
		req := request(t, p, "a")
		made := mustCreate(t, p, req)
		for _, z := range []string{zoneA, zoneB} {
			s.SetCapacity(fakeec2.Capacity{Zone: z, Free: -1})
		}
		if again := mustCreate(t, provider(t, s), req); again.ID != made.ID {
			t.Errorf("made %s and %s", made.ID, again.ID)
		}
		req.Name += "x"
		if inst, err := provider(t, s).Create(t.Context(), req); !errdefs.IsAlreadyExists(err) {
			t.Errorf("another request: %+v, %v", inst, err)
		}
	})
}

func TestNote(t *testing.T) {
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		p := provider(t, s, func(c *aws.Config) { c.Spot = aws.SpotFirst })
		req := request(t, p, "a")
		disk := errors.New("disk full")
		kept := notes{fail: disk}
		req.Note = kept.keep
		if _, err := p.Create(t.Context(), req); !errors.Is(err, disk) {
			t.Errorf("the note was not kept: %v", err)
		}
		if n := s.Calls("RunInstances"); n != 0 {
			t.Fatalf("%d launches without a note", n)
		}
		kept.fail = nil
		s.SetCapacity(fakeec2.Capacity{Market: "spot", Free: 0})
		mustCreate(t, p, req)
		if len(kept.list) != 4 || s.Calls("RunInstances") != 4 {
			t.Errorf("%d notes and %d launches: %q", len(kept.list), s.Calls("RunInstances"), kept.list)
		}
		tokens := map[string]bool{}
		for _, n := range kept.list {
			tokens[parse(t, n).Token] = true
		}
		if len(tokens) != len(kept.list) {
			t.Errorf("attempts share a token: %q", kept.list)
		}
		if strings.Contains(strings.Join(kept.list, ""), "cloud-config") {
			t.Error("a note holds user data")
		}
		// A note that cannot be read might be of an instance.
		req = request(t, p, "b")
		req.Progress = "{"
		if _, err := p.Create(t.Context(), req); err == nil || errdefs.Resolve(err) != errdefs.ErrUnknown {
			t.Errorf("damaged note: %v", err)
		}
	})
}

func TestCapacity(t *testing.T) {
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		p := provider(t, s)
		empty := func(typ, zone string, free int) {
			s.SetCapacity(fakeec2.Capacity{Type: typ, Zone: zone, Free: free})
		}
		for _, z := range []string{zoneA, zoneB, zoneC} {
			empty(small, z, 0)
		}
		empty(large, zoneA, 0)
		empty(large, zoneB, 0)
		made := mustCreate(t, p, request(t, p, "a"))
		if i := alive(s)[0]; i.Type != large || i.Zone != zoneC || i.ID != string(made.ID) {
			t.Errorf("made %+v", i)
		}
		calls := s.Calls("RunInstances")
		mustCreate(t, p, request(t, p, "b"))
		if n := s.Calls("RunInstances") - calls; n > 1+2 { // zones whose turn did not come before c's
			t.Errorf("%d launches for the second pod: empty pools were asked again", n)
		}
		empty(large, zoneC, 0)
		_, err := p.Create(t.Context(), request(t, p, "c"))
		if !errdefs.IsResourceExhausted(err) {
			t.Fatalf("no capacity at all: %v", err)
		}
		says(t, err, small, large, zoneA, zoneB, zoneC, "InsufficientInstanceCapacity", "PODVM_INSTANCE_TYPES", "AWS_SUBNET_ID")
		calls = s.Calls("RunInstances")
		if _, err = p.Create(t.Context(), request(t, p, "d")); !errdefs.IsResourceExhausted(err) || s.Calls("RunInstances") != calls {
			t.Errorf("%v, after %d calls", err, s.Calls("RunInstances")-calls)
		}
		says(t, err, "asked again in")
		for _, z := range []string{zoneA, zoneB, zoneC} {
			empty(small, z, -1)
		}
		time.Sleep(3*time.Minute + time.Second) // of the bubble: the memory is over
		mustCreate(t, p, request(t, p, "e"))
		if i := alive(s); i[len(i)-1].Type != small {
			t.Errorf("made %+v", i[len(i)-1])
		}
	})
}

// What an error rules out: a subnet for all types, a type in all zones, spot for all.
func TestScopes(t *testing.T) {
	for _, c := range []struct {
		code  string
		fault fakeec2.Fault
		spot  aws.Spot
		first int // launches until the first pod has its instance
		then  int // launches for the second pod
	}{
		{"InsufficientFreeAddressesInSubnet", fakeec2.Fault{Times: 1}, aws.SpotNever, 2, 1},
		{"VcpuLimitExceeded", fakeec2.Fault{Type: small}, aws.SpotNever, 2, 1},
		{"MaxSpotInstanceCountExceeded", fakeec2.Fault{Market: "spot"}, aws.SpotFirst, 2, 1},
		{"Unsupported", fakeec2.Fault{Type: small}, aws.SpotNever, 4, 1},
		{"InsufficientHostCapacity", fakeec2.Fault{Type: small}, aws.SpotNever, 4, 1},
	} {
		t.Run(c.code, func(t *testing.T) {
			bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
				p := provider(t, s, func(cfg *aws.Config) { cfg.Spot = c.spot })
				c.fault.Action, c.fault.Err = "RunInstances", &fakeec2.Error{Status: 400, Code: c.code, Message: "none"}
				s.Inject(c.fault)
				mustCreate(t, p, request(t, p, "a"))
				if n := s.Calls("RunInstances"); n != c.first {
					t.Errorf("%d launches, want %d", n, c.first)
				}
				mustCreate(t, p, request(t, p, "b"))
				if n := s.Calls("RunInstances") - c.first; n != c.then {
					t.Errorf("%d launches for the second pod, want %d", n, c.then)
				}
			})
		})
	}
}

// One token, of which EC2 knows that its instance has ended, makes another one.
func TestEndedInstance(t *testing.T) {
	for name, forget := range map[string]bool{"answers with it": false, "refuses the token": true} {
		t.Run(name, func(t *testing.T) {
			bubble(t, fakeec2.Config{ForgetTerminated: forget}, func(t *testing.T, s *fakeec2.Server) {
				p := provider(t, s)
				req := request(t, p, "a")
				var kept notes
				req.Note = kept.keep
				made := mustCreate(t, p, req)
				if err := s.Fail(string(made.ID), "Server.InternalError", "Server.InternalError: Internal error on launch"); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute) // of the bubble: it is terminated
				req.Progress = kept.last()
				again := mustCreate(t, provider(t, s), req)
				if again.ID == made.ID || len(alive(s)) != 1 {
					t.Errorf("made %s, then %s; alive %+v", made.ID, again.ID, alive(s))
				}
				if len(kept.list) != 2 {
					t.Errorf("notes: %q", kept.list)
				}
			})
		})
	}
}

// 200 pods at once, under the region's own buckets: all come, and none later than
// 1.2 times what the bucket allows. Other users of the account may make EC2 refuse
// calls all the same.
func TestBurst(t *testing.T) {
	for name, noise := range map[string]int{"alone": 0, "with others": 40} {
		pods := 200
		if noise > 0 {
			pods = 50
		}
		t.Run(name, func(t *testing.T) {
			bubble(t, fakeec2.Realistic(), func(t *testing.T, s *fakeec2.Server) {
				p := provider(t, s)
				s.Inject(fakeec2.Fault{Action: "RunInstances", Skip: 20, Times: noise,
					Err: &fakeec2.Error{Status: 503, Code: "RequestLimitExceeded", Message: "Request limit exceeded."}})
				if noise == 0 {
					s.ClearFaults()
				}
				plan := request(t, p, "plan")
				begin := time.Now()
				var wg sync.WaitGroup
				var mu sync.Mutex
				refused := 0
				for n := range pods {
					wg.Go(func() {
						req := plan
						req.Token, req.Name, req.SandboxID = fmt.Sprintf("token-%d", n), fmt.Sprintf("podvm-%d", n), fmt.Sprintf("sandbox-%d", n)
						var kept notes
						req.Note = kept.keep
						for {
							inst, err := p.Create(t.Context(), req)
							if err == nil {
								running(t, p, inst.ID)
								return
							}
							if !errdefs.IsUnavailable(err) {
								t.Error(err)
								return
							}
							mu.Lock()
							refused++
							mu.Unlock()
							req.Progress = kept.last()
							time.Sleep(time.Second) // of the bubble, as the adaptor does
						}
					})
				}
				wg.Wait()
				took := time.Since(begin)
				allowed := time.Duration(float64(pods-5) / 2 * float64(time.Second)) // 5 at once, then 2 a second
				if noise == 0 && (refused > 0 || took > allowed*12/10) {
					t.Errorf("%d launches took %v, the bucket allows %v; %d were refused", pods, took, allowed, refused)
				}
				if n := len(alive(s)); n != pods {
					t.Errorf("%d instances for %d pods", n, pods)
				}
				// A pod's first answers come quickly, so that it asks often; all of
				// them together ask about as often as one.
				if n := s.Calls("DescribeInstances"); n > 40*int(took.Seconds())+100 {
					t.Errorf("%d DescribeInstances in %v", n, took)
				}
				for _, i := range alive(s) {
					wg.Go(func() {
						for err := error(nil); !errdefs.IsNotFound(err); {
							if err = p.Delete(t.Context(), cloud.InstanceID(i.ID)); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) {
								t.Error(err)
								return
							}
							time.Sleep(5 * time.Second) // of the bubble
						}
					})
				}
				wg.Wait()
				if n := s.Calls("TerminateInstances"); n > pods/4 {
					t.Errorf("%d calls to delete %d instances", n, pods)
				}
			})
		})
	}
}

func TestSpread(t *testing.T) {
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		p := provider(t, s)
		for n := range 12 {
			mustCreate(t, p, request(t, p, fmt.Sprint(n)))
		}
		var zones []string
		for _, i := range alive(s) {
			zones = append(zones, i.Zone)
		}
		slices.Sort(zones)
		if z := slices.Compact(zones); len(z) != 3 {
			t.Errorf("12 pods went to %v", z)
		}
	})
}
