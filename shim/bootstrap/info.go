// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"encoding/json"
	"io"

	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// featuresURL is the name under which containerd knows OCI's features
// (containerd 2.4, core/runtime/typeurl.go).
const featuresURL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

// mountOptions are those that a container's mounts may have. containerd tells the
// kubelet by "rro" that volumes can be read-only recursively.
var mountOptions = []string{
	"atime", "bind", "dev", "diratime", "dirsync", "exec", "nodev", "nodiratime", "noexec", "noatime", "norelatime", "nostrictatime",
	"nosuid", "private", "rbind", "relatime", "remount", "ro", "rprivate", "rro", "rw", "strictatime", "suid", "sync", "tmpcopyup",
}

// Info writes what containerd asks with -info. User namespaces are not among the
// features: a pod has a kernel of its own.
func Info(stdout io.Writer, name, version string) error {
	f, err := json.Marshal(features.Features{
		OCIVersionMin: "1.0.0", OCIVersionMax: "1.3.0", MountOptions: mountOptions,
		Linux: &features.Linux{}, // containerd looks into it without looking whether it is there
	})
	if err != nil {
		return err
	}
	b, err := proto.Marshal(&types.RuntimeInfo{
		Name: name, Version: &types.RuntimeVersion{Version: version},
		Features: &anypb.Any{TypeUrl: featuresURL, Value: f},
	})
	if err != nil {
		return err
	}
	_, err = stdout.Write(b)
	return err
}
