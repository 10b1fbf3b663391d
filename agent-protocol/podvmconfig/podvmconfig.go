// SPDX-License-Identifier: Apache-2.0

// Package podvmconfig is the document that tells a pod VM what it is: apf.json,
// written by the adaptor into the instance's user data and read by the forwarder.
// Key names are those of cloud-api-adaptor 0.22 (forwarder.Config and
// tunneler.Config), so that either end can be the stock one. Keys that only we
// write are marked; a stock forwarder ignores them.
//
// The document holds a private key: it is never logged (see Secret) and never on
// the node's disk.
package podvmconfig

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
)

const (
	// Path is where the document stands in the guest and the name it has in the
	// user data's write_files.
	Path = "/run/peerpod/apf.json"
	// AuthPath is where the registries' credentials for pulls by the guest stand, in
	// the form of a docker configuration, and their name in the user data.
	AuthPath = "/run/peerpod/auth.json"
	// ForwarderPort is the TCP port on which the forwarder answers.
	ForwarderPort = 15150
	// PodNetNS is the pod's network namespace inside the guest.
	PodNetNS = "/run/netns/podns"
	// TunnelVXLAN is the one tunnel type there is.
	TunnelVXLAN = "vxlan"
)

// Secret is text that must not reach a log. It marshals as plain text.
type Secret string

// LogValue hides the text from log/slog.
func (Secret) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// String hides the text from fmt.
func (Secret) String() string { return "[redacted]" }

// GoString hides the text from %#v.
func (Secret) GoString() string { return "[redacted]" }

// Config is the whole document.
type Config struct {
	PodNetwork   *PodNetwork `json:"pod-network"`
	PodNamespace string      `json:"pod-namespace"`
	PodName      string      `json:"pod-name"`

	// TLS material of the forwarder, PEM. The forwarder refuses to serve without
	// all three: a missing client CA would let anyone in.
	TLSServerKey  Secret `json:"tls-server-key,omitempty"`
	TLSServerCert string `json:"tls-server-cert,omitempty"`
	TLSClientCA   string `json:"tls-client-ca,omitempty"`

	// Ours: the networks of the pod's further interfaces, each with a VXLAN id of its
	// own. A stock forwarder makes the first one alone.
	MorePodNetworks []PodNetwork `json:"more-pod-networks,omitempty"`
	// Ours: the routing rules of the pod besides the kernel's own.
	Rules []Rule `json:"rules,omitempty"`

	// Ours: id of the sandbox, for the guest's logs.
	SandboxID string `json:"sandbox-id,omitempty"`
	// Ours: unix socket of a stock kata-agent that the forwarder fronts. Empty:
	// podvmd's own agent.
	AgentSocket string `json:"agent_socket,omitempty"`

	// Ours: certificates, PEM, of authorities that registries may have beside those
	// the guest's image knows.
	RegistryCA string `json:"registry-ca,omitempty"`
	// Ours: registries, host or host:port, that may be spoken to in plain HTTP.
	InsecureRegistries []string `json:"insecure-registries,omitempty"`
}

// PodNetwork is the pod's network as the CNI made it on the node and as the guest
// makes it again.
type PodNetwork struct {
	PodIP        netip.Prefix `json:"podip"`
	PodHWAddr    string       `json:"pod-hw-addr"`
	Interface    string       `json:"interface"`      // name in the pod, usually eth0
	WorkerNodeIP netip.Prefix `json:"worker-node-ip"` // node end of the tunnel
	TunnelType   string       `json:"tunnel-type"`    // TunnelVXLAN
	Routes       []Route      `json:"routes"`
	Neighbors    []Neighbor   `json:"neighbors"`
	MTU          int          `json:"mtu"` // the CNI's, bytes
	Index        int          `json:"index"`
	VXLANPort    uint16       `json:"vxlan-port"`
	VXLANID      uint32       `json:"vxlan-id"`

	Dedicated           bool `json:"dedicated"`               // always false
	ExternalNetViaPodVM bool `json:"external-net-via-pod-vm"` // always false

	// Ours: every address of the interface when it has more than PodIP, PodIP
	// first.
	PodIPs []netip.Prefix `json:"podips,omitempty"`
	// Ours: routes of other tables than main. They stand apart because a stock forwarder
	// puts all it reads in Routes into table main.
	TableRoutes []Route `json:"table-routes,omitempty"`
}

// Networks are those of all the pod's interfaces; the first is PodNetwork.
func (c *Config) Networks() []PodNetwork {
	if c.PodNetwork == nil {
		return nil
	}
	return append([]PodNetwork{*c.PodNetwork}, c.MorePodNetworks...)
}

// Addrs are all the pod's addresses, PodIP first.
func (n *PodNetwork) Addrs() []netip.Prefix {
	if len(n.PodIPs) > 0 {
		return n.PodIPs
	}
	return []netip.Prefix{n.PodIP}
}

// Route is one route of the pod.
type Route struct {
	Dst      string `json:"dst"` // prefix
	GW       string `json:"gw"`  // empty: on link
	Dev      string `json:"dev"`
	Protocol string `json:"protocol,omitempty"` // static, boot, dhcp or kernel
	Scope    string `json:"scope,omitempty"`    // universe, site, link, host or nowhere

	Src    string `json:"src,omitempty"`    // ours: preferred source address
	Metric int    `json:"metric,omitempty"` // ours: 0 is the kernel's default
	Table  int    `json:"table,omitempty"`  // ours: 0 is main
}

// Rule is one routing rule of the pod. Selectors that are absent match all.
type Rule struct {
	IPv6     bool   `json:"ipv6,omitempty"`
	Priority int    `json:"priority"`
	From     string `json:"from,omitempty"` // prefix
	To       string `json:"to,omitempty"`   // prefix
	IIF      string `json:"iif,omitempty"`
	OIF      string `json:"oif,omitempty"`
	Mark     uint32 `json:"fwmark,omitempty"`
	Mask     uint32 `json:"fwmask,omitempty"` // 0: no such selector
	Table    int    `json:"table"`
}

// Neighbor is one permanent neighbour entry of the pod.
type Neighbor struct {
	IP     string `json:"ip"`
	HWAddr string `json:"hw-addr"`
	Dev    string `json:"dev"`
	State  string `json:"state"` // permanent
}

// Parse reads a document and checks what the guest relies on. Every error names
// the key to mend. Keys it does not know are ignored, because either end may be
// newer than the other.
func Parse(b []byte) (*Config, error) {
	c := new(Config)
	if err := json.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("%s: %w", Path, err)
	}
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", Path, err)
	}
	return c, nil
}

// Validate reports all that is wrong with the document, each part naming its key.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	for _, s := range []struct{ key, value string }{
		{"tls-server-key", string(c.TLSServerKey)},
		{"tls-server-cert", c.TLSServerCert},
		{"tls-client-ca", c.TLSClientCA},
	} {
		if s.value == "" {
			bad("%s is missing: the forwarder serves nobody it cannot authenticate", s.key)
		}
	}
	if c.PodNetwork == nil {
		bad("pod-network is missing")
		return errors.Join(errs...)
	}
	c.PodNetwork.validate("pod-network", bad)
	names, vnis := map[string]bool{c.PodNetwork.Interface: true}, map[uint32]bool{c.PodNetwork.VXLANID: true}
	for i := range c.MorePodNetworks {
		n, key := &c.MorePodNetworks[i], MoreKey(i)
		n.validate(key, bad)
		if names[n.Interface] {
			bad("%s.interface %q is that of another network", key, n.Interface)
		}
		if vnis[n.VXLANID] {
			bad("%s.vxlan-id %d is that of another network", key, n.VXLANID)
		}
		names[n.Interface], vnis[n.VXLANID] = true, true
	}
	return errors.Join(errs...)
}

// MoreKey is the key of the i-th of MorePodNetworks, for errors.
func MoreKey(i int) string { return fmt.Sprintf("more-pod-networks[%d]", i) }

// validate tells bad what is wrong with the network at key.
func (n *PodNetwork) validate(key string, problem func(format string, a ...any)) {
	bad := func(format string, a ...any) { problem(key+format, a...) }
	for _, p := range n.Addrs() {
		if !p.IsValid() {
			bad(".podip is missing or not an address with a prefix length")
		}
	}
	if !n.WorkerNodeIP.IsValid() {
		bad(".worker-node-ip is missing or not an address with a prefix length")
	}
	if n.TunnelType != TunnelVXLAN {
		bad(".tunnel-type is %q, want %q", n.TunnelType, TunnelVXLAN)
	}
	if n.Interface == "" {
		bad(".interface is missing")
	}
	if n.VXLANPort == 0 {
		bad(".vxlan-port is missing")
	}
	if n.VXLANID == 0 || n.VXLANID >= 1<<24 {
		bad(".vxlan-id is %d, want 1 to %d", n.VXLANID, 1<<24-1)
	}
}
