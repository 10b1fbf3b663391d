// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"context"
	"crypto/rand"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is an emulated Azure, in whose time a test lives.
type world struct {
	*testing.T
	arm *fakearm.Server
	cfg Config
}

const (
	testImage = "/subscriptions/" + fakearm.DefaultSubscription + "/resourceGroups/pods/providers/Microsoft.Compute/galleries/pods_gallery/images/podvm/versions/1.0.0"
	small     = "Standard_DC2as_v5" // confidential, zones 1 and 2
	large     = "Standard_DC4as_v5"
)

// inWorld runs a test in a bubble of its own, and asks the oracle at its end.
func inWorld(t *testing.T, cfg fakearm.Config, f func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, cfg)
		f(w)
		w.nothingLeft()
	})
}

func newWorld(t *testing.T, cfg fakearm.Config) *world {
	cfg.Images = append(cfg.Images, fakearm.Image{ID: testImage, SecurityType: "TrustedLaunchAndConfidentialVmSupported"})
	arm := fakearm.New(cfg)
	t.Cleanup(arm.Close)
	c := arm.Config()
	return &world{T: t, arm: arm, cfg: Config{
		SubscriptionID: c.Subscription, Region: c.Region, ResourceGroup: c.Groups[0],
		SubnetID: c.SubnetID(fakearm.Subnet{}), NSGID: c.SecurityGroupID(""), ImageID: testImage,
		InstanceSizes: []string{small, large},
		Credentials:   Credentials{TenantID: c.Tenant, ClientID: fakearm.DefaultClient, ClientSecret: fakearm.DefaultSecret},
		Endpoint:      "https://arm.test", AuthorityHost: "https://login.test",
		Transport: &http.Client{Transport: arm.Transport()},
	}}
}

// provider makes one, as after a restart of the adaptor.
func (w *world) provider(change ...func(*Config)) *Provider {
	w.Helper()
	cfg := w.cfg
	for _, f := range change {
		f(&cfg)
	}
	p, err := New(cfg)
	if err != nil {
		w.Fatal(err)
	}
	p.key.once = func() (string, error) { return testKey, nil } // making one costs real time
	return p
}

// testKey is an RSA key of 2048 bits whose private half was not kept.
var testKey = func() string {
	k, err := nobodysKey()
	if err != nil {
		panic(err)
	}
	return k
}()

func request(p *Provider) cloud.CreateRequest {
	plan, err := p.Plan(context.Background(), cloud.Size{})
	if err != nil {
		panic(err)
	}
	return cloud.CreateRequest{
		Token: rand.Text(), Name: "podvm-web-1", SandboxID: "0123abcd", Owner: owner, Plan: plan,
		UserData: []byte("#cloud-config\n"), Tags: map[string]string{"team": "blue"},
	}
}

var owner = cloud.Owner{Cluster: "c1", Node: "n1"}

func (w *world) create(p *Provider, req cloud.CreateRequest) cloud.Instance {
	w.Helper()
	inst, err := p.Create(w.Context(), req)
	if err != nil {
		w.Fatal(err)
	}
	return inst
}

// gone deletes until NotFound and tells how long that took.
func (w *world) gone(p *Provider, id cloud.InstanceID) time.Duration {
	w.Helper()
	begin := time.Now()
	for {
		err := p.Delete(w.Context(), id)
		if errdefs.IsNotFound(err) {
			return time.Since(begin)
		}
		if err != nil && !errdefs.IsUnavailable(err) {
			w.Fatalf("Delete: %v", err)
		}
		if time.Since(begin) > 10*time.Minute {
			w.Fatalf("%s is not gone: %v", id, w.arm.Leaks(nil))
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// nothingLeft sweeps as the adaptor does, and then asks the oracle.
func (w *world) nothingLeft() {
	w.Helper()
	w.arm.Heal()
	p := w.provider()
	time.Sleep(ListSettle)
	list, err := p.List(w.Context(), cloud.Owner{Cluster: owner.Cluster})
	if err != nil {
		w.Fatal(err)
	}
	for _, i := range list {
		w.gone(p, i.ID)
	}
	for _, l := range w.arm.Leaks(nil) {
		w.Errorf("left behind: %s", l)
	}
}

// count tells how many requests have been made with the method, to paths that hold
// part.
func (w *world) count(method, part string) int {
	n := 0
	for _, r := range w.arm.Requests() {
		m, path, _ := strings.Cut(r, " ")
		if m == method && strings.Contains(path, part) {
			n++
		}
	}
	return n
}

// only is the one VM there is.
func (w *world) only() fakearm.VM {
	w.Helper()
	vms := slices.DeleteFunc(w.arm.VMs(), func(v fakearm.VM) bool { return v.State == "Deleting" })
	if len(vms) != 1 {
		w.Fatalf("there are %d VMs: %+v", len(vms), vms)
	}
	return vms[0]
}
