// SPDX-License-Identifier: Apache-2.0

package store

import (
	"log/slog"
	"net/netip"
	"time"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/cloud"
)

// State is where a sandbox stands. The values and what may follow what belong to
// package sandbox; the store keeps the word.
type State string

func (s State) String() string { return string(s) }

// Record is all the adaptor knows about one sandbox. It is on disk before anything
// it names exists, and leaves the disk after all of it is gone. Records are values:
// whoever changes one replaces its slices instead of writing into them.
type Record struct {
	ID      string    `json:"id"`
	State   State     `json:"state"`
	Reason  string    `json:"reason,omitempty"` // why it is being deleted, for a person
	Created time.Time `json:"created"`
	Changed time.Time `json:"changed"` // when State last changed

	// Lease is when a sandbox that nobody has asked for since will be deleted:
	// one whose StartVM never came, or whose caller had left when its VM was
	// ready. Zero: somebody has it.
	Lease time.Time `json:"lease,omitzero"`

	Pod   Pod    `json:"pod"`
	NetNS string `json:"netns"` // path of the pod's network namespace
	// Request is a digest of the CreateVM request, to tell a repeated call from
	// another one of the same id.
	Request     string `json:"request"`
	AgentSocket string `json:"agent_socket"`

	Instance Instance `json:"instance"`
	// Tunnels are those of the pod's interfaces, one each; the first is that of the
	// default route. Rules are the pod's routing rules.
	Tunnels []Tunnel           `json:"tunnels,omitempty"`
	Rules   []podvmconfig.Rule `json:"rules,omitempty"`
	TLS     TLS                `json:"tls"`
	Steps   []Step             `json:"steps,omitempty"` // those done, in order
}

// Pod names the pod as its users know it.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
}

func (p Pod) String() string {
	if p.Namespace == "" {
		return p.Name
	}
	return p.Namespace + "/" + p.Name
}

// Instance is what was asked of the provider and what came back.
type Instance struct {
	Provider string      `json:"provider"`
	Owner    cloud.Owner `json:"owner"`
	Name     string      `json:"name"`
	Token    string      `json:"token"` // the idempotency token; chosen once
	Plan     cloud.Plan  `json:"plan"`

	// Asked is set before Create is first called and cleared when it is certain
	// that nothing was made. While it is set, an instance may exist.
	Asked bool `json:"asked,omitempty"`
	// Progress is the provider's own note on the request; see cloud.CreateRequest.
	Progress string           `json:"progress,omitempty"`
	ID       cloud.InstanceID `json:"id,omitempty"` // "": not known (yet)
	Addr     netip.Addr       `json:"addr,omitzero"`
}

// Tunnel is the node end of one of the pod's tunnels, and the network it carries.
type Tunnel struct {
	VNI    uint32       `json:"vni"`
	Port   uint16       `json:"port"`
	Device string       `json:"device"`
	Local  netip.Prefix `json:"local"` // node end of the underlay
	MTU    int          `json:"mtu"`   // of the underlay, bytes

	// Pod is the interface's network as the CNI left it, as the guest is told.
	Pod podvmconfig.PodNetwork `json:"pod"`
}

// TLS is what the adaptor needs to reach the pod VM's forwarder. The key of the
// forwarder and the key of the authority are never written: the first lives in the
// adaptor's memory until the instance has it, the second for one function call.
type TLS struct {
	ServerName string             `json:"server_name"`
	CA         string             `json:"ca,omitempty"`          // PEM
	ClientCert string             `json:"client_cert,omitempty"` // PEM
	ClientKey  podvmconfig.Secret `json:"client_key,omitempty"`  // PEM
}

// Step is a step that was done and how long it took.
type Step struct {
	Name   string  `json:"name"`
	Millis float64 `json:"ms"`
}

// LogValue shows what identifies the sandbox and nothing that is secret.
func (r Record) LogValue() slog.Value {
	var vnis []uint32
	for _, t := range r.Tunnels {
		vnis = append(vnis, t.VNI)
	}
	return slog.GroupValue(
		slog.String(logkey.Sandbox, r.ID),
		slog.String("state", r.State.String()),
		slog.String(logkey.Pod, r.Pod.String()),
		slog.String(logkey.Instance, string(r.Instance.ID)),
		slog.Any(logkey.VNI, vnis),
	)
}

// LogValue hides keys and certificates.
func (t TLS) LogValue() slog.Value { return slog.StringValue("[redacted]") }
