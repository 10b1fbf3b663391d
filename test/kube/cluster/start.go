// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// start runs one of kube-all's programs.
func (c *Cluster) start(ctx context.Context, name string, ready func(context.Context) error, args ...string) error {
	d, err := c.Bed.Start(ctx, name, exec.Command(c.Program, append([]string{name}, args...)...), ready)
	if err == nil {
		c.daemons = append(c.daemons, d)
	}
	return err
}

// now is for programs whose readiness shows elsewhere.
func now(context.Context) error { return nil }

func listening(addr string) func(context.Context) error {
	return func(ctx context.Context) error {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		if err == nil {
			c.Close()
		}
		return err
	}
}

func (c *Cluster) startControlPlane(ctx context.Context) error {
	const etcd = "127.0.0.1:2379"
	p := c.pki.path
	if err := c.start(ctx, "etcd", listening(etcd),
		"--data-dir="+filepath.Join(c.Bed.Out, "etcd"), "--unsafe-no-fsync", "--logger=zap", "--log-level=warn",
		"--listen-client-urls=http://"+etcd, "--advertise-client-urls=http://"+etcd, "--listen-peer-urls=http://127.0.0.1:2380"); err != nil {
		return err
	}
	if err := c.start(ctx, "kube-apiserver", func(ctx context.Context) error { return c.API.Get(ctx, "/readyz", new(string)) },
		"--etcd-servers=http://"+etcd, "--secure-port=6443", "--advertise-address="+nodeAddr, "--service-cluster-ip-range="+serviceSubnet,
		"--client-ca-file="+p("ca.crt"), "--tls-cert-file="+p("apiserver.crt"), "--tls-private-key-file="+p("apiserver.key"),
		"--kubelet-client-certificate="+p("apiserver-kubelet.crt"), "--kubelet-client-key="+p("apiserver-kubelet.key"),
		"--kubelet-certificate-authority="+p("ca.crt"), "--kubelet-preferred-address-types=InternalIP,Hostname",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-signing-key-file="+p("sa.key"), "--service-account-key-file="+p("sa.key"),
		"--requestheader-client-ca-file="+p("ca.crt"), "--requestheader-allowed-names=front-proxy",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file="+p("front-proxy.crt"), "--proxy-client-key-file="+p("front-proxy.key"),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true", "--profiling=false",
		// A policy of the API server's own gives every pod a runtime class (policy.go).
		"--feature-gates=MutatingAdmissionPolicy=true", "--runtime-config=admissionregistration.k8s.io/v1beta1=true"); err != nil {
		return err
	}
	if err := c.start(ctx, "kube-controller-manager", now,
		"--kubeconfig="+p("controllers.kubeconfig"), "--authentication-kubeconfig="+p("controllers.kubeconfig"),
		"--authorization-kubeconfig="+p("controllers.kubeconfig"),
		"--service-account-private-key-file="+p("sa.key"), "--root-ca-file="+p("ca.crt"),
		"--cluster-signing-cert-file="+p("ca.crt"), "--cluster-signing-key-file="+p("ca.key"),
		"--use-service-account-credentials=true", "--leader-elect=false", "--service-cluster-ip-range="+serviceSubnet,
		// On a machine whose processors emulate pods' machines a kubelet may be late.
		"--node-monitor-grace-period=2m",
		"--bind-address=127.0.0.1", "--profiling=false"); err != nil {
		return err
	}
	return c.start(ctx, "kube-scheduler", now,
		"--kubeconfig="+p("scheduler.kubeconfig"), "--authentication-kubeconfig="+p("scheduler.kubeconfig"),
		"--authorization-kubeconfig="+p("scheduler.kubeconfig"), "--leader-elect=false", "--bind-address=127.0.0.1", "--profiling=false")
}

// kubeletConfig: RuntimeRequestTimeout is what docs/containerd.md asks of a node's
// kubelet; the rest is the testbed's nature. It shares its disk and memory with the
// machine, so nothing is evicted for their want, and no image is removed: none could
// be pulled again. cgroup v1 and cgroupfs are what there is without systemd.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 0.0.0.0
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %[1]q}}
authorization: {mode: Webhook}
tlsCertFile: %[2]q
tlsPrivateKeyFile: %[3]q
containerRuntimeEndpoint: unix://` + testbed.ContainerdSocket + `
runtimeRequestTimeout: 10m
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
resolvConf: %[4]q
clusterDomain: cluster.local
clusterDNS: [` + dnsService + `]
evictionHard: {memory.available: 1Mi, nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "0%%"}
imageGCHighThresholdPercent: 100
imageMinimumGCAge: 24h
oomScoreAdj: 0
enforceNodeAllocatable: [pods]
syncFrequency: 10s
volumeStatsAggPeriod: 0s
nodeStatusUpdateFrequency: 5s
`

const proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clientConnection: {kubeconfig: %q}
clusterCIDR: ` + testbed.CNISubnet + `
hostnameOverride: ` + NodeName + `
conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`

// runtimeClass: the overhead is what a pod costs its node beside its containers. Its
// processor share is the provider's own measure, four virtual processors on each of
// the node's: the scheduler holds back the pods whose machine would be refused.
const runtimeClass = `apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: ` + RuntimeClass + `}
handler: ` + testbed.Handler + `
overhead: {podFixed: {cpu: 250m, memory: 64Mi}}
`

func (c *Cluster) startNode(ctx context.Context) error {
	p := c.pki.path
	resolv := filepath.Join(c.Bed.Out, "resolv.conf")
	kubelet := filepath.Join(c.Bed.Out, "kubelet.yaml")
	proxy := filepath.Join(c.Bed.Out, "kube-proxy.yaml")
	for path, text := range map[string]string{
		resolv:  "nameserver " + nodeAddr + "\n",
		kubelet: fmt.Sprintf(kubeletConfig, p("ca.crt"), p("kubelet.crt"), p("kubelet.key"), resolv),
		proxy:   fmt.Sprintf(proxyConfig, p("proxy.kubeconfig")),
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := c.Apply(ctx, runtimeClass); err != nil {
		return err
	}
	if err := c.start(ctx, "kubelet", listening(nodeAddr+":10250"), "--config="+kubelet, "--kubeconfig="+p("kubelet.kubeconfig"),
		"--hostname-override="+NodeName, "--node-ip="+nodeAddr, "--v=2"); err != nil {
		return err
	}
	return c.start(ctx, "kube-proxy", listening("127.0.0.1:10249"), "--config="+proxy)
}

// Versions are what the node runs, for a person: "Kubernetes v1.34.4, containerd
// 2.2.9".
func (c *Cluster) Versions(ctx context.Context) (kubernetes, containerd string, err error) {
	var node Node
	if err := c.API.Get(ctx, "/api/v1/nodes/"+NodeName, &node); err != nil {
		return "", "", err
	}
	info := node.Status.NodeInfo
	containerd, _, _ = strings.Cut(strings.TrimPrefix(info.ContainerRuntimeVersion, "containerd://"), "+") // the build's own word
	return info.KubeletVersion, containerd, nil
}
