// SPDX-License-Identifier: Apache-2.0

// Package config is the adaptor's configuration. Values come from a file, the
// environment and flags, the later overriding the earlier; names in the file and the
// environment are those of the ConfigMap peer-pods-cm and its Secret, so that both
// can be handed over as they are, plus ours for the local provider (LOCAL_...).
//
// The file has one KEY=VALUE to a line, as `env` prints them and systemd's
// EnvironmentFile reads them. Blank lines and lines that begin with # are skipped;
// a value may stand in single or double quotes, in which nothing is special.
//
// Everything is read and checked before anything is used, and every problem is
// reported, each with its key, its value and what to do. A key in the file that
// nobody knows is a problem; the environment is not ours alone, and there it is one
// only when it looks like one of ours with a slip in it. Keys of a provider that is not
// chosen are not looked at. A Config does not change after Load.
package config

import (
	"log/slog"
	"net/netip"
	"time"

	"github.com/kata-remote/kata-remote/cloud"
)

// Providers, as CLOUD_PROVIDER names them.
const (
	ProviderLocal = "local"
	ProviderAWS   = "aws"
	ProviderAzure = "azure"
)

// Providers are all of them.
var Providers = []string{ProviderLocal, ProviderAWS, ProviderAzure}

// Config is all that can be set.
type Config struct {
	StateDir string // holds adaptor.db
	Socket   string // hypervisor socket; REMOTE_HYPERVISOR_ENDPOINT
	PodsDir  string // agent sockets, one directory each; PODS_DIR
	LogLevel slog.Level

	Provider string // CLOUD_PROVIDER
	Node     string // NODE_NAME; the host's name by default
	Cluster  string // CLUSTER_NAME; "": an id of the state file stands in

	ProxyTimeout  time.Duration     // PROXY_TIMEOUT
	ForwarderPort uint16            // FORWARDER_PORT
	VXLANPort     uint16            // VXLAN_PORT
	VXLANMinID    uint32            // VXLAN_MIN_ID
	Limit         int               // PEERPODS_LIMIT_PER_NODE; < 0: no limit
	Tags          map[string]string // TAGS

	Pull Pull

	Local Local // only with ProviderLocal; likewise the next ones
	Cloud Cloud
	AWS   AWS
	Azure Azure

	// Warnings are settings that have no effect here, each with its reason.
	Warnings []string

	reload  func() (*Config, error)
	account bool // see LoadAccount
}

// Pull is for pods whose images the pod VM pulls.
type Pull struct {
	AuthFile string   // PULL_AUTH_FILE: a docker configuration with credentials; DefaultAuthFile where that exists
	CAFile   string   // PULL_CA_FILE: authorities of registries, PEM
	Insecure []string // PULL_INSECURE_REGISTRIES: host or host:port
}

// DefaultAuthFile is where the operators of cloud-api-adaptor mount the Secret
// auth-json-secret.
const DefaultAuthFile = "/root/containers/auth.json"

// Local is the embedded provider: QEMU on this node. Zero values take the defaults of
// local.Config.
type Local struct {
	Kernel  string       // LOCAL_KERNEL: path of the pod VM's kernel
	Initrd  string       // LOCAL_INITRD: path of its initramfs
	Cmdline string       // LOCAL_CMDLINE: added to the kernel's command line
	QEMU    string       // LOCAL_QEMU: path or name of the emulator
	Machine string       // LOCAL_MACHINE: q35 or microvm
	Accel   string       // LOCAL_ACCEL: kvm or tcg; "auto" and "": what a test boot finds
	Bridge  string       // LOCAL_BRIDGE: name of the bridge the provider makes
	Subnet  netip.Prefix // LOCAL_SUBNET: network between node and pod VMs
	MTU     int          // LOCAL_MTU: of that network, bytes
	VCPUs   int          // LOCAL_VCPUS: of a pod that asks for none
	Memory  int          // LOCAL_MEMORY: MiB, of a pod that asks for none
	Dir     string       // LOCAL_DIR: what the provider keeps about its VMs; <STATE_DIR>/local
}

// Defaults. The reasons for numbers of others' are in reference to
// cloud-api-adaptor 0.22, cmd/cloud-api-adaptor/main.go.
const (
	DefaultStateDir      = "/var/lib/peerpod"
	DefaultSocket        = "/run/peerpod/hypervisor.sock"
	DefaultPodsDir       = "/run/peerpod/pods"
	DefaultProxyTimeout  = 5 * time.Minute
	DefaultForwarderPort = 15150
	// DefaultVXLANPort is not IANA's 4789, on which CNIs that use VXLAN themselves
	// (Calico, flannel) listen or filter.
	DefaultVXLANPort  = 9000
	DefaultVXLANMinID = 555000
	DefaultLimit      = 10
)

// Flags are the settings that have flags. "" is not set.
type Flags struct {
	StateDir, Socket, PodsDir, LogLevel string
}

func defaults() Config {
	return Config{
		StateDir: DefaultStateDir, Socket: DefaultSocket, PodsDir: DefaultPodsDir,
		Provider:     ProviderLocal,
		ProxyTimeout: DefaultProxyTimeout, ForwarderPort: DefaultForwarderPort,
		VXLANPort: DefaultVXLANPort, VXLANMinID: DefaultVXLANMinID, Limit: DefaultLimit,
		Cloud: Cloud{OverheadMiB: cloud.DefaultOverheadMiB},
	}
}
