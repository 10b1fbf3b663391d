// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// key is one setting of file and environment: its name and what takes its value.
// The error of set says what is wanted, not what was given.
type key struct {
	name string
	set  func(c *Config, value string) error
}

const keyProvider = "CLOUD_PROVIDER"

// keys are the settings that this adaptor honours with every provider.
var keys = []key{
	{keyProvider, func(c *Config, v string) error { return oneOf(&c.Provider, v, Providers...) }},
	{"STATE_DIR", func(c *Config, v string) error { return absPath(&c.StateDir, v) }},
	{"REMOTE_HYPERVISOR_ENDPOINT", func(c *Config, v string) error { return absPath(&c.Socket, v) }},
	{"PODS_DIR", func(c *Config, v string) error { return absPath(&c.PodsDir, v) }},
	{"LOG_LEVEL", func(c *Config, v string) error { return level(&c.LogLevel, v) }},
	{"NODE_NAME", func(c *Config, v string) error { c.Node = v; return nil }},
	{"CLUSTER_NAME", func(c *Config, v string) error { c.Cluster = v; return nil }},
	{"PROXY_TIMEOUT", func(c *Config, v string) error { return duration(&c.ProxyTimeout, v) }},
	{"FORWARDER_PORT", func(c *Config, v string) error { return number(&c.ForwarderPort, v, 1, math.MaxUint16) }},
	{"VXLAN_PORT", func(c *Config, v string) error { return number(&c.VXLANPort, v, 1, math.MaxUint16) }},
	{"VXLAN_MIN_ID", func(c *Config, v string) error { return number(&c.VXLANMinID, v, 1, 1<<24-1) }},
	{"PEERPODS_LIMIT_PER_NODE", func(c *Config, v string) error { return number(&c.Limit, v, -1, 100_000) }},
	{"TAGS", func(c *Config, v string) error { return tags(&c.Tags, v) }},
	{"PULL_AUTH_FILE", func(c *Config, v string) error { return absPath(&c.Pull.AuthFile, v) }},
	{"PULL_CA_FILE", func(c *Config, v string) error { return absPath(&c.Pull.CAFile, v) }},
	{"PULL_INSECURE_REGISTRIES", func(c *Config, v string) error { return hosts(&c.Pull.Insecure, v) }},
}

// localKeys are those of the provider local.
var localKeys = []key{
	{"LOCAL_KERNEL", func(c *Config, v string) error { return absPath(&c.Local.Kernel, v) }},
	{"LOCAL_INITRD", func(c *Config, v string) error { return absPath(&c.Local.Initrd, v) }},
	{"LOCAL_CMDLINE", func(c *Config, v string) error { c.Local.Cmdline = v; return nil }},
	{"LOCAL_QEMU", func(c *Config, v string) error { c.Local.QEMU = v; return nil }},
	{"LOCAL_MACHINE", func(c *Config, v string) error { return oneOf(&c.Local.Machine, v, "q35", "microvm") }},
	{"LOCAL_ACCEL", func(c *Config, v string) error { return oneOf(&c.Local.Accel, v, "auto", "kvm", "tcg") }},
	{"LOCAL_BRIDGE", func(c *Config, v string) error { return device(&c.Local.Bridge, v) }},
	{"LOCAL_SUBNET", func(c *Config, v string) error { return subnet(&c.Local.Subnet, v) }},
	{"LOCAL_MTU", func(c *Config, v string) error { return number(&c.Local.MTU, v, 1280, math.MaxUint16) }},
	{"LOCAL_VCPUS", func(c *Config, v string) error { return number(&c.Local.VCPUs, v, 1, 1024) }},
	{"LOCAL_MEMORY", func(c *Config, v string) error { return number(&c.Local.Memory, v, 64, 1<<24) }},
	{"LOCAL_DIR", func(c *Config, v string) error { return absPath(&c.Local.Dir, v) }},
}

// notHere are settings of cloud-api-adaptor that this adaptor does not have. Where
// fine accepts the value, it makes no difference and the setting is only mentioned;
// any other value asks for something that would not happen, which is a problem.
var notHere = []struct {
	name string
	fine func(string) bool
	why  string
}{
	{"PAUSE_IMAGE", anything, "the pause container is the runtime's business"},
	{"TUNNEL_TYPE", words("vxlan"), "vxlan is the only type of tunnel"},
	{"CLOUD_CONFIG_VERIFY", anything, "the configuration is always verified"},
	{"POD_SUBNET_CIDRS", words(), "routes are taken from the pod's network namespace"},
	{"CACERT_FILE", words(), "every pod VM has certificates of its own, made for it"},
	{"CERT_FILE", words(), "every pod VM has certificates of its own, made for it"},
	{"CERT_KEY", words(), "every pod VM has certificates of its own, made for it"},
	{"TLS_SKIP_VERIFY", words("false", "0"), "a pod VM is always verified"},
	{"DISABLE_TLS", words("false", "0"), "a pod VM is always verified"},
	{"TLS_MIN_VERSION", words("VersionTLS12", "VersionTLS13"), "TLS 1.3 is always used"},
	{"TLS_CIPHER_SUITES", anything, "the suites of TLS 1.3 are not configurable"},
	{"INITDATA", words(), "init data is not supported"},
	{"ENABLE_SCRATCH_SPACE", words("false", "0"), "scratch space is not supported"},
	{"EXTERNAL_NETWORK_VIA_PODVM", words("false", "0"), "all traffic of a pod goes through its node"},
	{"ENABLE_CLOUD_PROVIDER_EXTERNAL_PLUGIN", words("false", "0"), "plug-ins are not supported"},
	{"CLOUD_PROVIDER_EXTERNAL_PLUGIN_PATH", anything, "plug-ins are not supported"},
	{"CLOUD_PROVIDER_EXTERNAL_PLUGIN_HASH", anything, "plug-ins are not supported"},
	{"POD_UID", anything, "the adaptor does not ask which pod it is in"},
	{"POD_NAMESPACE", anything, "the adaptor does not ask which pod it is in"},
	{"PROBE_PORT", anything, "the adaptor answers no probe; its socket appears when it is ready"},
	{"RUNTIMECLASS_NAME", anything, "the adaptor does not ask Kubernetes"},
}

// otherPrefixes and otherNames are the keys of other providers, as they stand in the
// ConfigMaps and Secrets of clusters that use them. They mean nothing to the provider
// that is chosen and do no harm.
var (
	otherPrefixes = []string{"AWS_", "AZURE_", "GCP_", "IBMCLOUD_", "POWERVS_", "LIBVIRT_", "ALIBABACLOUD_", "GOVC_", "DOCKER_", "SSH_", "POOL_", "PODVM_"}
	otherNames    = []string{
		"VM_POOL_IPS", "MAX_RANGE_IPS", "REGION", "IMAGEID", "VSWITCH_ID", "KEYNAME", "SYSTEM_DISK_SIZE", "SECURITY_GROUP_IDS",
		"CAA_DISK_DETECT_MAX_ATTEMPTS", "CAA_DISK_DETECT_RETRY_DELAY",
	}
)

func anything(string) bool { return true }

func words(fine ...string) func(string) bool {
	return func(v string) bool {
		for _, f := range fine {
			if strings.EqualFold(f, v) {
				return true
			}
		}
		return false
	}
}

func oneOf(p *string, v string, choices ...string) error {
	for _, c := range choices {
		if v == c {
			*p = v
			return nil
		}
	}
	return errors.New("want one of: " + strings.Join(choices, ", "))
}

func absPath(p *string, v string) error {
	if !filepath.IsAbs(v) {
		return errors.New("want an absolute path")
	}
	*p = filepath.Clean(v)
	return nil
}

func level(p *slog.Level, v string) error {
	if p.UnmarshalText([]byte(v)) != nil {
		return errors.New("want one of: debug, info, warn, error")
	}
	return nil
}

func duration(p *time.Duration, v string) error {
	d, err := time.ParseDuration(v)
	if err != nil || d <= 0 {
		return errors.New(`want a time above zero with its unit, such as "5m" or "90s"`)
	}
	*p = d
	return nil
}

func number[T int | uint16 | uint32](p *T, v string, low, high int64) error {
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < low || n > high {
		return fmt.Errorf("want a whole number of %d to %d", low, high)
	}
	*p = T(n)
	return nil
}

// tags reads key=value pairs with commas between them.
func tags(p *map[string]string, v string) error {
	m := map[string]string{}
	for pair := range strings.SplitSeq(v, ",") {
		k, val, ok := strings.Cut(strings.TrimSpace(pair), "=")
		if !ok || k == "" {
			return errors.New("want key=value pairs with commas between them")
		}
		if _, twice := m[k]; twice {
			return fmt.Errorf("%s is given twice; give each tag once", k)
		}
		m[k] = val
	}
	*p = m
	return nil
}

// hostRule is a host's name or address, the latter in brackets if it is IPv6, and
// perhaps a port.
var hostRule = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?$`)

// hosts reads names with commas between them.
func hosts(p *[]string, v string) error {
	var list []string
	for h := range strings.SplitSeq(v, ",") {
		h = strings.TrimSpace(h)
		if !hostRule.MatchString(h) {
			return errors.New(`want registries with commas between them, each a host or host:port, such as "registry.example:5000"`)
		}
		list = append(list, h)
	}
	*p = list
	return nil
}

// deviceRule is what the kernel takes for a name, less what shells dislike.
var deviceRule = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$`)

func device(p *string, v string) error {
	if !deviceRule.MatchString(v) {
		return errors.New("want the name of a network device, at most 15 letters, digits, '.', '_' or '-'")
	}
	*p = v
	return nil
}

func subnet(p *netip.Prefix, v string) error {
	n, err := netip.ParsePrefix(v)
	if err != nil || n.Masked() != n {
		return errors.New(`want a network, such as "10.237.0.0/24"`)
	}
	*p = n
	return nil
}
