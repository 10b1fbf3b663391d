// SPDX-License-Identifier: Apache-2.0

package aws_test

import (
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
)

// gone deletes until NotFound and returns how often nil came first.
func gone(t *testing.T, p cloud.Provider, id cloud.InstanceID) (rounds int) {
	t.Helper()
	for ; rounds < 1000; rounds++ {
		err := p.Delete(t.Context(), id)
		if errdefs.IsNotFound(err) {
			return rounds
		}
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // of the bubble
	}
	t.Fatalf("%s is never gone", id)
	return 0
}

// EC2 does not know a new instance for some seconds, and shows an old one for an hour.
func TestLag(t *testing.T) {
	bubble(t, fakeec2.Config{MaxLag: 5 * time.Second, StartTime: time.Second, StopTime: 10 * time.Second}, func(t *testing.T, s *fakeec2.Server) {
		p := provider(t, s)
		for n := range 8 { // lags are random
			id := mustCreate(t, p, request(t, p, fmt.Sprint(n))).ID
			if inst, err := p.Get(t.Context(), id); err != nil || inst.State == cloud.StateFailed {
				t.Fatalf("a new instance: %+v, %v", inst, err)
			}
			if n%2 == 0 {
				time.Sleep(time.Minute) // of the bubble
			}
			gone(t, p, id)
			for _, i := range alive(s) {
				t.Fatalf("gone, but %+v", i)
			}
			if _, err := p.Get(t.Context(), id); !errdefs.IsNotFound(err) {
				t.Errorf("Get after the end: %v", err)
			}
			time.Sleep(6 * time.Second) // of the bubble: the lag
			if _, err := provider(t, s).Get(t.Context(), id); !errdefs.IsNotFound(err) {
				t.Errorf("Get by another process: %v", err)
			}
		}
	})
}

// What an instance leaves behind is found by its tags: by its Delete, and by List when
// there was never an instance.
func TestLeftovers(t *testing.T) {
	for name, code := range map[string]string{"and no instance": "VolumeLimitExceeded", "and an instance": "InsufficientInstanceCapacity"} {
		t.Run(name, func(t *testing.T) {
			bubble(t, fakeec2.Config{MaxLag: 2 * time.Second}, func(t *testing.T, s *fakeec2.Server) {
				p := provider(t, s)
				req := request(t, p, "a")
				s.Inject(fakeec2.Fault{Action: "RunInstances", Times: 1, Partial: &fakeec2.Error{Status: 500, Code: code, Message: "no"}})
				inst, err := p.Create(t.Context(), req)
				time.Sleep(time.Minute) // of the bubble: nobody thinks it is being made
				list, lerr := p.List(t.Context(), cloud.Owner{Cluster: cluster, Node: node})
				if lerr != nil {
					t.Fatal(lerr)
				}
				if code == "VolumeLimitExceeded" {
					if !errdefs.IsResourceExhausted(err) {
						t.Fatalf("Create: %v", err)
					}
					if len(list) != 2 || list[0].SandboxID != req.SandboxID || list[0].Token != req.Token || list[0].State != cloud.StateFailed {
						t.Fatalf("List shows %+v", list)
					}
					if n := gone(t, provider(t, s), list[0].ID); n == 0 {
						t.Error("it was gone at once")
					}
				} else {
					if err != nil || len(list) != 1 || list[0].ID != inst.ID {
						t.Fatalf("List shows %+v; %v", list, err)
					}
					gone(t, p, inst.ID)
				}
				if l := s.Leaks(map[string]string{cloud.TagCluster: cluster}); len(l) != 0 {
					t.Errorf("left behind: %v", l)
				}
			})
		})
	}
}

// Without the right to list volumes and interfaces, instances go all the same.
func TestDeleteWithFewRights(t *testing.T) {
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		key := fakeec2.DefaultKey
		key.Deny = []string{"ec2:DescribeVolumes", "ec2:DescribeNetworkInterfaces", "ec2:DescribeSpotInstanceRequests"}
		s.SetKey(key)
		defer s.SetKey(fakeec2.DefaultKey)
		p := provider(t, s, func(c *aws.Config) { c.Spot = aws.SpotOnly })
		inst := running(t, p, mustCreate(t, p, request(t, p, "a")).ID)
		gone(t, p, inst.ID)
	})
}

// One instance that EC2 does not know makes it refuse a call for many.
func TestDeleteTogether(t *testing.T) {
	bubble(t, fakeec2.Config{MaxLag: 5 * time.Second}, func(t *testing.T, s *fakeec2.Server) {
		p := provider(t, s)
		old := running(t, p, mustCreate(t, p, request(t, p, "old")).ID)
		time.Sleep(time.Minute) // of the bubble
		young := mustCreate(t, p, request(t, p, "young"))
		errs := make(chan error)
		ids := []cloud.InstanceID{old.ID, young.ID, "i-0123456789abcdef0"}
		for _, id := range ids {
			go func() { errs <- p.Delete(t.Context(), id) }()
		}
		unknown := 0
		for range ids {
			if err := <-errs; errdefs.IsNotFound(err) {
				unknown++
			} else if err != nil {
				t.Error(err)
			}
		}
		if unknown != 1 {
			t.Errorf("%d are unknown, want 1", unknown)
		}
		if i := s.Instances()[0]; i.ID != string(old.ID) || i.State == "running" {
			t.Errorf("a stranger's id has kept %+v alive", i)
		}
		gone(t, p, old.ID)
		gone(t, p, young.ID)
	})
}

func TestSpotInterruption(t *testing.T) {
	bubble(t, fakeec2.Config{StartTime: time.Second, StopTime: 10 * time.Second}, func(t *testing.T, s *fakeec2.Server) {
		p := provider(t, s, func(c *aws.Config) { c.Spot, c.SubnetIDs = aws.SpotFirst, []string{fakeec2.DefaultSubnet} })
		inst := running(t, p, mustCreate(t, p, request(t, p, "a")).ID)
		if inst.Detail != "" {
			t.Errorf("detail %q", inst.Detail)
		}
		if err := s.Interrupt(string(inst.ID)); err != nil {
			t.Fatal(err)
		}
		inst, err := p.Get(t.Context(), inst.ID)
		if err != nil || inst.State != cloud.StateRunning {
			t.Fatalf("%+v, %v", inst, err)
		}
		says(t, fmt.Errorf("%s", inst.Detail), "spot interruption", "two minutes", "marked-for-termination")
		time.Sleep(3 * time.Minute) // of the bubble
		inst, err = p.Get(t.Context(), inst.ID)
		if err != nil || inst.State != cloud.StateFailed {
			t.Fatalf("%+v, %v", inst, err)
		}
		says(t, fmt.Errorf("%s", inst.Detail), "spot interruption", "Server.SpotInstanceTermination")
		gone(t, p, inst.ID)
		if _, err := p.Get(t.Context(), inst.ID); !errdefs.IsNotFound(err) {
			t.Errorf("after its Delete: %v", err)
		}
		// The pool is left alone for a while.
		mustCreate(t, p, request(t, p, "b"))
		if i := alive(s)[0]; i.Market != "on-demand" {
			t.Errorf("made %+v", i)
		}
	})
}

// How an instance ends is told in words, and a stopped one does not run again.
func TestEndings(t *testing.T) {
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		p := provider(t, s)
		shut := running(t, p, mustCreate(t, p, request(t, p, "a")).ID)
		if err := s.Shutdown(string(shut.ID)); err != nil {
			t.Fatal(err)
		}
		broken := running(t, p, mustCreate(t, p, request(t, p, "b")).ID)
		if err := s.Fail(string(broken.ID), "Server.InternalError", "Server.InternalError"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) // of the bubble
		for id, word := range map[cloud.InstanceID]string{shut.ID: "shut itself down", broken.ID: "EC2 failed to run it"} {
			inst, err := p.Get(t.Context(), id)
			if err != nil || inst.State != cloud.StateFailed || len(inst.Addrs) != 0 {
				t.Fatalf("%+v, %v", inst, err)
			}
			says(t, fmt.Errorf("%s", inst.Detail), word)
			gone(t, p, id)
		}
	})
}

// A list that has more than one page is complete.
func TestPages(t *testing.T) {
	wide := fakeec2.Config{Subnets: []fakeec2.Subnet{{ID: fakeec2.DefaultSubnet, Zone: zoneA, CIDR: netip.MustParsePrefix("10.0.0.0/20")}}}
	synctest.Test(t, func(t *testing.T) {
		s := fakeec2.New(wide)
		p := provider(t, s, func(c *aws.Config) { c.SubnetIDs = []string{fakeec2.DefaultSubnet} })
		owner := map[string]string{cloud.TagCluster: cluster, cloud.TagNode: node}
		var tags []types.Tag
		for k, v := range owner {
			tags = append(tags, types.Tag{Key: &k, Value: &v})
		}
		const many = 1005 // a page has 1000
		_, err := sdk(s).RunInstances(t.Context(), &ec2.RunInstancesInput{
			MinCount: awssdk.Int32(many), MaxCount: awssdk.Int32(many), ImageId: awssdk.String(fakeec2.DefaultImage),
			InstanceType: types.InstanceType(small), SubnetId: awssdk.String(fakeec2.DefaultSubnet),
			TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeInstance, Tags: tags}},
		})
		if err != nil {
			t.Fatal(err)
		}
		list, err := p.List(t.Context(), cloud.Owner{Cluster: cluster})
		if err != nil || len(list) != many {
			t.Errorf("%d of %d listed, %v", len(list), many, err)
		}
		if n := s.Calls("DescribeInstances"); n != 2 {
			t.Errorf("%d calls", n)
		}
	})
}
