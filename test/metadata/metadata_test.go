// SPDX-License-Identifier: Apache-2.0

// Package metadata_test has the guest's side of a cloud's metadata service meet the
// emulations', behind instances that our providers made: what the adaptor gives as user
// data is what the pod VM reads, and an interruption is heard of.
package metadata_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
	"github.com/kata-remote/kata-remote/cloud/azure"
	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
	"github.com/kata-remote/kata-remote/cloud/emulation"
	"github.com/kata-remote/kata-remote/podvm/bootconf"
	"github.com/kata-remote/kata-remote/podvm/notice"
)

// document is a cloud-config with one file of that many bytes.
func document(n int) []byte {
	return []byte("#cloud-config\nwrite_files:\n- path: /run/peerpod/apf.json\n  content: |\n      " + strings.Repeat("x", n) + "\n")
}

// made has the provider make an instance with that user data.
func made(t *testing.T, p cloud.Provider, userData []byte) cloud.Instance {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	plan, err := p.Plan(ctx, cloud.Size{})
	if err != nil {
		t.Fatal(err)
	}
	inst, err := p.Create(ctx, cloud.CreateRequest{
		Token: "token-1", Name: "podvm-web-0123", SandboxID: "0123", Owner: cloud.Owner{Cluster: "c1", Node: "n1"}, Plan: plan, UserData: userData,
	})
	if err != nil {
		t.Fatal(err)
	}
	return inst
}

// read reads the user data, and wants the document's file.
func read(t *testing.T, n int, s bootconf.Source) *bootconf.Config {
	t.Helper()
	cfg, err := bootconf.Read(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if len(cfg.Files) != 1 || len(cfg.Files[0].Content) != n+1 {
		t.Errorf("got %d files", len(cfg.Files))
	}
	return cfg
}

// taken runs a watch until it has a notice, and wants that the machine is taken.
func taken(t *testing.T, w *notice.Watch, reason string, within time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	ended := make(chan struct{})
	go func() { w.Run(ctx); close(ended) }()
	defer func() { cancel(); <-ended }()
	n, err := w.Next(ctx, "")
	if err != nil || n.Kind != podvmpb.NoticeKind_NOTICE_KIND_TAKEN || n.Reason != reason || n.Deadline.After(time.Now().Add(within+time.Second)) || n.Deadline.IsZero() {
		t.Errorf("%+v, %v", n, err)
	}
}

// clock stands still once it is stopped: an announced end does not come while the guest's
// side asks for it.
type clock struct{ at atomic.Pointer[time.Time] }

func (c *clock) now() time.Time {
	if at := c.at.Load(); at != nil {
		return *at
	}
	return time.Now()
}

func (c *clock) stop() {
	at := time.Now()
	c.at.Store(&at)
}

func service(t *testing.T, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

func TestEC2(t *testing.T) {
	// More than EC2 takes as it is.
	for name, size := range map[string]int{"small": 100, "large": 20 << 10} {
		t.Run(name, func(t *testing.T) {
			var clock clock
			s := fakeec2.New(fakeec2.Config{Now: clock.now})
			p, err := aws.New(aws.Config{
				Region: fakeec2.DefaultRegion, Keys: aws.Keys{AccessKeyID: fakeec2.DefaultKey.ID, SecretAccessKey: aws.Secret(fakeec2.DefaultKey.Secret)},
				ImageID: fakeec2.DefaultImage, InstanceType: "m6a.large", InstanceTypes: []string{"m6a.large"}, Spot: aws.SpotOnly,
				SubnetIDs: []string{fakeec2.DefaultSubnet}, SecurityGroupIDs: []string{fakeec2.DefaultSecurityGroup},
				HTTPClient: &http.Client{Transport: s.Transport()},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			id := string(made(t, p, document(size)).ID)
			url := service(t, s.Metadata(id))
			if cfg := read(t, size, bootconf.EC2{URL: url}); !strings.HasSuffix(cfg.Hostname, ".internal") {
				t.Errorf("host name %q", cfg.Hostname)
			}
			clock.stop()
			if err := s.Interrupt(id); err != nil {
				t.Fatal(err)
			}
			taken(t, notice.EC2(url), "spot interruption", 2*time.Minute)
		})
	}
}

// keeper notes what machine is to be started.
type keeper chan emulation.Machine

func (k keeper) Start(_ context.Context, m emulation.Machine) error { k <- m; return nil }
func (keeper) Stop(context.Context, string) error                   { return nil }
func (keeper) Console(string) ([]byte, error)                       { return nil, nil }

func TestAzure(t *testing.T) {
	host := make(keeper, 1)
	const image = "/subscriptions/" + fakearm.DefaultSubscription + "/resourceGroups/pods/providers/Microsoft.Compute/galleries/pods/images/podvm/versions/1.0.0"
	var clock clock
	arm := fakearm.New(fakearm.Config{Now: clock.now, Unthrottled: true, Host: host, Images: []fakearm.Image{{ID: image}}})
	defer arm.Close()
	c := arm.Config()
	p, err := azure.New(azure.Config{
		SubscriptionID: c.Subscription, Region: c.Region, ResourceGroup: c.Groups[0],
		SubnetID: c.SubnetID(fakearm.Subnet{}), NSGID: c.SecurityGroupID(""), ImageID: image, InstanceSizes: []string{"Standard_D2as_v5"}, SecurityType: azure.SecurityStandard, Spot: azure.MarketOnly,
		Credentials: azure.Credentials{TenantID: c.Tenant, ClientID: fakearm.DefaultClient, ClientSecret: fakearm.DefaultSecret},
		Endpoint:    "https://arm.test", AuthorityHost: "https://login.test", Transport: &http.Client{Transport: arm.Transport()},
	})
	if err != nil {
		t.Fatal(err)
	}
	const size = 40 << 10
	inst := made(t, p, document(size))
	m := <-host
	// The CD in the drive of the machine that is to be started.
	cd := bootconf.AzureCD{Disks: bootconf.Disks{Sys: t.TempDir(), Dev: t.TempDir(), Wait: -1}}
	if err := errors.Join(os.Mkdir(filepath.Join(cd.Sys, "sr0"), 0o755), os.WriteFile(filepath.Join(cd.Dev, "sr0"), m.CDROM, 0o600)); err != nil {
		t.Fatal(err)
	}
	if cfg := read(t, size, cd); cfg.Hostname != "podvm-web-0123" {
		t.Errorf("host name %q", cfg.Hostname)
	}
	// The metadata service does not show it again.
	url := service(t, m.Metadata)
	if _, err := (bootconf.AzureService{URL: url}).Seed(t.Context()); !errdefs.IsNotFound(err) {
		t.Errorf("the metadata service: %v", err)
	}
	clock.stop()
	if err := arm.Evict(string(inst.ID)); err != nil {
		t.Fatal(err)
	}
	taken(t, notice.Azure(url), "spot eviction", 30*time.Second)
}
