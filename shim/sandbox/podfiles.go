// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/kata-remote/kata-remote/shim/sandboxpb"
)

// The node's files that a pod's are made from.
const (
	nodeHosts  = "/etc/hosts"
	nodeResolv = "/etc/resolv.conf"
)

// WritePodFiles writes the files that a pod's containers share into the bundle of a
// pod that was made through the Sandbox API, and returns them by their paths in a
// container. Their content is what containerd's own sandboxer gives a pod (2.4,
// internal/cri/server/podsandbox/sandbox_run_linux.go): the pod's host name or the
// node's, the node's hosts, and the pod's DNS settings or the node's.
func WritePodFiles(bundle string, c *sandboxpb.PodSandboxConfig) (map[string]string, error) {
	hostname := c.GetHostname()
	if hostname == "" {
		var err error
		if hostname, err = os.Hostname(); err != nil {
			return nil, err
		}
	}
	hosts, err := os.ReadFile(nodeHosts)
	if err != nil {
		return nil, fmt.Errorf("the pod's hosts file: %w", err)
	}
	var resolv []byte
	if d := c.GetDnsConfig(); d != nil {
		resolv = resolvConf(d)
	} else if resolv, err = os.ReadFile(nodeResolv); err != nil {
		return nil, fmt.Errorf("the pod's resolv.conf: %w", err)
	}
	files := map[string]string{}
	for name, text := range map[string][]byte{"hostname": []byte(hostname + "\n"), "hosts": hosts, "resolv.conf": resolv} {
		path := filepath.Join(bundle, name)
		if err := os.WriteFile(path, text, 0o644); err != nil {
			return nil, err
		}
		files["/etc/"+name] = path
	}
	return files, nil
}

// resolvConf is resolv.conf(5) of DNS settings.
func resolvConf(d *sandboxpb.DNSConfig) []byte {
	var b strings.Builder
	if len(d.Searches) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(d.Searches, " "))
	}
	for _, s := range d.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(d.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(d.Options, " "))
	}
	return []byte(b.String())
}
