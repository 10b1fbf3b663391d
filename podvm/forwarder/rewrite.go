// SPDX-License-Identifier: Apache-2.0

package forwarder

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
)

const (
	agentService = "grpc.AgentService"
	networkNS    = "network" // in an OCI specification
)

// rewrite changes a request where a stock agent needs it, as cloud-api-adaptor's
// forwarder does (0.22, pkg/forwarder/interceptor). changed is false where the
// request passes as it came. Fields that this program does not know stay.
//
//   - CreateContainer: the container's network namespace is the pod's. The runtime has
//     taken the node's away, and the agent itself lives in the guest's own.
//     Directories of the guest that are to be bound into the container are made.
//   - CreateSandbox: dns is dropped. The agent would bind the pod's resolv.conf over
//     the guest's own, by which it finds registries and key brokers
//     (cloud-api-adaptor issue 98); containers have theirs as a copied file.
func rewrite(req *ttrpc.Request, podNetNS string) (changed bool, err error) {
	if req.Service != agentService {
		return false, nil
	}
	switch req.Method {
	case "CreateContainer":
		r := new(agentpb.CreateContainerRequest)
		if err := proto.Unmarshal(req.Payload, r); err != nil {
			return false, err
		}
		if r.OCI == nil {
			return false, nil // the agent has words for that
		}
		if err := makeSources(r); err != nil {
			return false, err
		}
		joinNetwork(r.OCI, podNetNS)
		req.Payload, err = proto.Marshal(r)
		return true, err
	case "CreateSandbox":
		r := new(agentpb.CreateSandboxRequest)
		if err := proto.Unmarshal(req.Payload, r); err != nil {
			return false, err
		}
		if len(r.Dns) == 0 {
			return false, nil
		}
		r.Dns = nil
		req.Payload, err = proto.Marshal(r)
		return true, err
	}
	return false, nil
}

// joinNetwork makes podNetNS the network namespace of the specification.
func joinNetwork(spec *agentpb.Spec, podNetNS string) {
	if spec.Linux == nil {
		spec.Linux = new(agentpb.Linux)
	}
	spec.Linux.Namespaces = append(slices.DeleteFunc(spec.Linux.Namespaces, func(n *agentpb.LinuxNamespace) bool {
		return n.GetType() == networkNS
	}), &agentpb.LinuxNamespace{Type: networkNS, Path: podNetNS})
}

// makeSources makes the directories that the container's bind mounts show and that
// the guest does not have. A storage's place is the agent's to make.
func makeSources(r *agentpb.CreateContainerRequest) error {
	for _, m := range r.OCI.Mounts {
		bind := m.GetType() == "bind" || slices.Contains(m.GetOptions(), "bind") || slices.Contains(m.GetOptions(), "rbind")
		if !bind || !filepath.IsAbs(m.GetSource()) || slices.ContainsFunc(r.Storages, func(s *agentpb.Storage) bool {
			return below(m.GetSource(), s.GetMountPoint())
		}) {
			continue
		}
		if _, err := os.Lstat(m.Source); !errors.Is(err, fs.ErrNotExist) {
			continue // there, or for the agent to find out why not
		}
		if err := os.MkdirAll(m.Source, 0o755); err != nil {
			return fmt.Errorf("make what is to be mounted at %s: %w", m.Destination, err)
		}
	}
	return nil
}

// below tells whether path is dir or in it.
func below(path, dir string) bool {
	path, dir = filepath.Clean(path), filepath.Clean(dir)
	return dir != "." && (path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/"))
}
