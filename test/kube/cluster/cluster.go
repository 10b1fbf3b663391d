// SPDX-License-Identifier: Apache-2.0

// Package cluster makes a testbed the only node of a real Kubernetes cluster: etcd,
// the API server, the controller manager, the scheduler, a kubelet and kube-proxy, all
// from one program (test/tools/kube), inside the namespaces of testbed.Isolate.
//
//	etcd 2379 ── kube-apiserver 6443 ─┬─ kube-controller-manager
//	                                  ├─ kube-scheduler
//	                                  ├─ kube-proxy ── iptables
//	                                  └─ kubelet ── containerd ── shims ── pod VMs
//
// Every program shows a certificate that a throw-away authority signed.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// Addresses and names of the cluster.
const (
	NodeName = "testbed" // testbed's host name
	// nodeAddr is on a bridge of its own, which stands for the node's network card:
	// the address must be there before the first pod brings CNI's bridge.
	nodeAddr   = "10.99.0.1"
	nodeSubnet = "/24"
	nodeRouter = "10.99.0.254"
	nodeLink   = "node0"
	// serviceSubnet's first address is the API server's service.
	serviceSubnet = "10.96.0.0/16"
	apiService    = "10.96.0.1"
	dnsService    = "10.96.0.10"
	apiURL        = "https://" + nodeAddr + ":6443"
	adminName     = "admin"
)

// RuntimeClass is the name of the runtime class of pods in machines of their own.
const RuntimeClass = testbed.Handler

// Cluster is a control plane and its one node.
type Cluster struct {
	Bed     *testbed.Bed
	Program string // kube-all
	API     *API

	pki     *authority
	daemons []*testbed.Daemon // in order of their start
}

// New prepares a cluster on a bed whose containerd and adaptor do not run yet.
func New(bed *testbed.Bed, program string) (*Cluster, error) {
	if _, err := os.Stat(program); err != nil {
		return nil, fmt.Errorf("Kubernetes' programs: %w (run make e2e-k8s, which builds them)", err)
	}
	pki, err := newAuthority(filepath.Join(bed.Out, "pki"))
	if err != nil {
		return nil, err
	}
	c := &Cluster{Bed: bed, Program: program, pki: pki}
	err = errors.Join(
		pki.issue("apiserver", identity{"kube-apiserver", nil, []string{"localhost", "kubernetes", "kubernetes.default",
			"kubernetes.default.svc", "kubernetes.default.svc.cluster.local", NodeName, "127.0.0.1", nodeAddr, apiService}}),
		pki.issue("apiserver-kubelet", identity{"kube-apiserver-kubelet-client", []string{"system:masters"}, nil}),
		pki.issue("front-proxy", identity{"front-proxy", nil, nil}),
		pki.client("kubelet", identity{"system:node:" + NodeName, []string{"system:nodes"}, []string{NodeName, nodeAddr, "127.0.0.1"}}),
		pki.client("controllers", identity{"system:kube-controller-manager", nil, nil}),
		pki.client("scheduler", identity{"system:kube-scheduler", nil, nil}),
		pki.client("proxy", identity{"system:kube-proxy", nil, nil}),
		pki.client(adminName, identity{adminName, []string{"system:masters"}, nil}))
	if err != nil {
		return nil, err
	}
	c.API, err = newAPI(pki)
	return c, err
}

// startTimeout is for all of a start: ten seconds where nothing else runs, and a busy
// machine has others to serve.
const startTimeout = 5 * time.Minute

// Start brings everything up and returns when the node is ready and pods can be
// created.
func (c *Cluster) Start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := nodeNetwork(); err != nil {
		return fmt.Errorf("the node's network: %w", err)
	}
	for _, step := range []func(context.Context) error{
		c.startControlPlane, c.Bed.StartContainerd, c.Bed.StartAdaptor, c.startNode,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	if err := c.AwaitNode(ctx); err != nil {
		return err
	}
	return Poll(ctx, func(ctx context.Context) error {
		// A pod is refused until its namespace has the account it runs as.
		return c.API.Get(ctx, "/api/v1/namespaces/default/serviceaccounts/default", new(struct{}))
	})
}

// AwaitNode waits until the node is ready. It shows with the kubelet's next report
// that it is not.
func (c *Cluster) AwaitNode(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return Poll(ctx, func(ctx context.Context) error {
		var node Node
		if err := c.API.Get(ctx, "/api/v1/nodes/"+NodeName, &node); err != nil {
			return err
		}
		if ready := node.Status.Conditions.Get("Ready"); ready.Status != "True" {
			return fmt.Errorf("node %s is not ready: %s", NodeName, ready.Message)
		}
		return nil
	})
}

// Stop ends all of it, last first. Pods that are there stay as they are: delete them
// before.
func (c *Cluster) Stop() error {
	var errs []error
	for i := len(c.daemons) - 1; i >= 0; i-- {
		errs = append(errs, c.daemons[i].Stop())
	}
	c.daemons = nil
	return errors.Join(append(errs, c.Bed.Stop())...)
}

// Kubeconfig is the path of the administrator's configuration for clients.
func (c *Cluster) Kubeconfig() string { return c.pki.path(adminName + ".kubeconfig") }

// Kubectl runs kubectl and returns its standard output.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return testbed.Run(ctx, c.Program, c.KubectlArgs(args...)...)
}

// KubectlIn is Kubectl with standard input.
func (c *Cluster) KubectlIn(ctx context.Context, stdin string, args ...string) (string, error) {
	return testbed.RunIn(ctx, strings.NewReader(stdin), c.Program, c.KubectlArgs(args...)...)
}

// KubectlArgs are Program's arguments for a call of kubectl.
func (c *Cluster) KubectlArgs(args ...string) []string {
	return append([]string{"kubectl", "--kubeconfig", c.Kubeconfig()}, args...)
}

// Apply applies manifests.
func (c *Cluster) Apply(ctx context.Context, manifests string) error {
	_, err := c.KubectlIn(ctx, manifests, "apply", "-f", "-")
	return err
}

// nodeNetwork gives the node an address and a way out, as its network card would.
func nodeNetwork() error {
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: nodeLink}}
	if err := netlink.LinkAdd(bridge); err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(nodeAddr + nodeSubnet)
	if err != nil {
		return err
	}
	if err := errors.Join(netlink.AddrAdd(bridge, addr), netlink.LinkSetUp(bridge)); err != nil {
		return err
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: bridge.Attrs().Index, Gw: net.ParseIP(nodeRouter)}); err != nil {
		return err
	}
	// A pod that reaches another of the same bridge through a service's address must
	// pass the node's address translation, both ways.
	for _, v := range []string{"iptables", "ip6tables"} {
		if err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+v, []byte("1"), 0); err != nil {
			return err
		}
	}
	return nil
}

// pollEvery is how often the API server is asked for what will be.
const pollEvery = 200 * time.Millisecond

// Poll calls f until it returns nil or ctx is done; then it returns f's last error.
func Poll(ctx context.Context, f func(context.Context) error) error {
	t := time.NewTicker(pollEvery)
	defer t.Stop()
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (gave up: %w)", err, context.Cause(ctx))
		case <-t.C:
		}
	}
}
