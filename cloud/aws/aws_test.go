// SPDX-License-Identifier: Apache-2.0

package aws_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
	"github.com/kata-remote/kata-remote/cloud/cloudtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	zoneA, zoneB, zoneC = "us-east-1a", "us-east-1b", "us-east-1c"
	small, large        = "m6a.large", "m6a.xlarge"
	cluster, node       = "cluster-1", "node-1"
)

// baseConfig is one that works with a Server of defaults.
func baseConfig(s *fakeec2.Server) aws.Config {
	return aws.Config{
		Region:  fakeec2.DefaultRegion,
		Keys:    aws.Keys{AccessKeyID: fakeec2.DefaultKey.ID, SecretAccessKey: aws.Secret(fakeec2.DefaultKey.Secret)},
		ImageID: fakeec2.DefaultImage, InstanceType: small, InstanceTypes: []string{small, large},
		SubnetIDs:        []string{fakeec2.DefaultSubnet, fakeec2.DefaultSubnetB, fakeec2.DefaultSubnetC},
		SecurityGroupIDs: []string{fakeec2.DefaultSecurityGroup},
		HTTPClient:       &http.Client{Transport: s.Transport()},
	}
}

// provider makes one over the Server, with changes to baseConfig.
func provider(t *testing.T, s *fakeec2.Server, change ...func(*aws.Config)) *aws.Provider {
	t.Helper()
	cfg := baseConfig(s)
	for _, f := range change {
		f(&cfg)
	}
	p, err := aws.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// request is a valid one that differs from those of other names.
func request(t *testing.T, p cloud.Provider, name string) cloud.CreateRequest {
	t.Helper()
	plan, err := p.Plan(t.Context(), cloud.Size{})
	if err != nil {
		t.Fatal(err)
	}
	return cloud.CreateRequest{
		Token: "token-" + name, Name: "podvm-" + name, SandboxID: "sandbox-" + name, Owner: cloud.Owner{Cluster: cluster, Node: node},
		Plan: plan, UserData: []byte("#cloud-config\n# " + name + "\n"), Tags: map[string]string{"team": "blue"},
	}
}

// notes is what a request's Note has kept.
type notes struct {
	list []string
	fail error
}

func (n *notes) keep(_ context.Context, progress string) error {
	if n.fail != nil {
		return n.fail
	}
	n.list = append(n.list, progress)
	return nil
}

func (n *notes) last() string {
	if len(n.list) == 0 {
		return ""
	}
	return n.list[len(n.list)-1]
}

// alive are the instances that are not terminated.
func alive(s *fakeec2.Server) []fakeec2.Instance {
	var out []fakeec2.Instance
	for _, i := range s.Instances() {
		if i.State != "terminated" {
			out = append(out, i)
		}
	}
	return out
}

// clean deletes all that List shows until nothing is left, and asks the oracle.
func clean(t *testing.T, s *fakeec2.Server, p cloud.Provider) {
	t.Helper()
	s.ClearFaults()
	deadline := time.Now().Add(10 * time.Minute)
	for quiet := 0; quiet < 2; {
		list, err := p.List(t.Context(), cloud.Owner{Cluster: cluster})
		if err != nil {
			t.Fatal(err)
		}
		quiet++
		for _, i := range list {
			if err := p.Delete(t.Context(), i.ID); err == nil {
				quiet = 0
			} else if !errdefs.IsNotFound(err) {
				t.Fatal(err)
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("not deleted: %v", list)
		}
		time.Sleep(5 * time.Second) // of the bubble
	}
	for _, l := range s.Leaks(map[string]string{cloud.TagCluster: cluster}) {
		t.Errorf("left behind: %v %v", l, l.Tags)
	}
}

func harness(cfg fakeec2.Config, change ...func(*aws.Config)) func(*testing.T) cloudtest.Harness {
	return func(t *testing.T) cloudtest.Harness {
		s := fakeec2.New(cfg)
		return cloudtest.Harness{
			New: func(t *testing.T) cloud.Provider { return provider(t, s, change...) },
			Leaks: func() []string {
				var out []string
				for _, c := range []string{"cloudtest", "cloudtest-other"} {
					for _, l := range s.Leaks(map[string]string{cloud.TagCluster: c}) {
						out = append(out, l.String())
					}
				}
				return out
			},
			Timeout: 10 * time.Minute,
			Poll:    time.Second / 4,
			Lag:     cfg.MaxLag,
		}
	}
}

func TestConformance(t *testing.T) {
	t.Run("fast", func(t *testing.T) { cloudtest.RunSynctest(t, harness(fakeec2.Config{})) })
	t.Run("realistic", func(t *testing.T) { cloudtest.RunSynctest(t, harness(fakeec2.Realistic())) })
	t.Run("forgetful", func(t *testing.T) {
		cfg := fakeec2.Realistic()
		cfg.ForgetTerminated, cfg.Seed = true, 7
		cloudtest.RunSynctest(t, harness(cfg, func(c *aws.Config) { c.Spot, c.PublicIP = aws.SpotFirst, true }))
	})
}

// bubble runs a test on fake time, over an emulation that is checked for leaks at the end.
func bubble(t *testing.T, cfg fakeec2.Config, f func(t *testing.T, s *fakeec2.Server)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := fakeec2.New(cfg)
		defer clean(t, s, provider(t, s))
		f(t, s)
	})
}

func mustCreate(t *testing.T, p cloud.Provider, req cloud.CreateRequest) cloud.Instance {
	t.Helper()
	inst, err := p.Create(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return inst
}

// running polls until an instance runs.
func running(t *testing.T, p cloud.Provider, id cloud.InstanceID) cloud.Instance {
	t.Helper()
	for range 1000 {
		inst, err := p.Get(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if inst.State == cloud.StateRunning && len(inst.Addrs) > 0 {
			return inst
		}
		time.Sleep(time.Second) // of the bubble
	}
	t.Fatalf("instance %s does not run", id)
	panic("not reached")
}

func says(t *testing.T, err error, words ...string) {
	t.Helper()
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("the error does not say %q: %v", w, err)
		}
	}
}

// node169 is the network of a node: one address is its metadata service.
type node169 struct {
	rest http.RoundTripper
	imds http.Handler
}

func (n node169) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Hostname() != "169.254.169.254" {
		return n.rest.RoundTrip(r)
	}
	w := httptest.NewRecorder()
	n.imds.ServeHTTP(w, r)
	return w.Result(), nil
}
