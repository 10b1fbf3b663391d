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
	n := c.PodNetwork
	if n == nil {
		bad("pod-network is missing")
		return errors.Join(errs...)
	}
	for _, p := range n.Addrs() {
		if !p.IsValid() {
			bad("pod-network.podip is missing or not an address with a prefix length")
		}
	}
	if !n.WorkerNodeIP.IsValid() {
		bad("pod-network.worker-node-ip is missing or not an address with a prefix length")
	}
	if n.TunnelType != TunnelVXLAN {
		bad("pod-network.tunnel-type is %q, want %q", n.TunnelType, TunnelVXLAN)
	}
	if n.Interface == "" {
		bad("pod-network.interface is missing")
	}
	if n.VXLANPort == 0 {
		bad("pod-network.vxlan-port is missing")
	}
	if n.VXLANID == 0 || n.VXLANID >= 1<<24 {
		bad("pod-network.vxlan-id is %d, want 1 to %d", n.VXLANID, 1<<24-1)
	}
	return errors.Join(errs...)
}
