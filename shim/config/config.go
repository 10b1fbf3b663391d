// SPDX-License-Identifier: Apache-2.0

// Package config reads what containerd's configuration says about the runtime
// handler: the options of the request, which name a TOML file or hold one.
//
// The file may be kata's own configuration-remote.toml. From it these keys count:
//
//	[hypervisor.remote]
//	remote_hypervisor_socket  = "/run/peerpod/hypervisor.sock"
//	remote_hypervisor_timeout = 600      # seconds for the pod VM to come up
//
//	[runtime]
//	experimental_force_guest_pull = true # the pod VM pulls images, see docs/guest-pull.md
//
// The last may also be written guest_pull, in that table or outside of any: then it can
// stand in the handler's options themselves, without a file (containerd 1.7 and later).
//
// The keys that kata has and that mean nothing here, because the adaptor or the pod
// VM decides what they would, are accepted and ignored: ignored below lists them. Any
// other key is an error, so that a misspelt one does not go unnoticed.
package config

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	// DefaultSocket is the adaptor's.
	DefaultSocket = "/run/peerpod/hypervisor.sock"
	// DefaultTimeout is kata's for the remote hypervisor. The adaptor's own
	// deadline, PROXY_TIMEOUT, is shorter and gives the better error.
	DefaultTimeout = 10 * time.Minute
)

// Config is immutable.
type Config struct {
	// Socket is the path of the adaptor's socket.
	Socket string
	// Timeout bounds the start of a pod VM.
	Timeout time.Duration
	// GuestPull: the pod VM pulls the containers' images.
	GuestPull bool
}

// guestPull is the key of GuestPull.
const guestPull = "guest_pull"

// typeURLs are the names under which containerd has sent runtimeoptions.Options.
var typeURLs = []string{"runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"}

// runcOptions are what clients send when they take every runtime for runc.
var runcOptions = []string{"containerd.runc.v1.Options", "containerd.linux.runc.CreateOptions"}

// ignored are kata's keys that have no effect here (kata-containers 4.1, src/runtime/config/configuration-remote.toml.in), by table. "*" is
// every key of a table.
var ignored = map[string][]string{
	"hypervisor.remote": {
		"enable_annotations", "firmware", "default_bridges", "memory_slots", "enable_debug", "guest_hook_path", "disable_selinux",
		"disable_guest_selinux", "default_vcpus", "default_memory", "default_maxvcpus", "default_maxmemory", "default_gpus", "default_gpu_model",
		"machine_type", "valid_hypervisor_paths", "confidential_guest", "hotplug_vfio_on_root_bus", "pcie_root_port", "rootfs_type",
		"shared_fs", "image", "path", "initrd", "kernel", "cc_init_data", "initdata", "remote_hypervisor_min_timeout",
	},
	"agent.kata": {"*"},
	"runtime":    {"*"},
	"factory":    {"*"},
	"image":      {"*"},
}

// Load takes the options of a Create request. Nil and runc's options give the
// defaults; anything it cannot use is InvalidArgument.
func Load(options *anypb.Any) (Config, error) {
	c := Config{Socket: DefaultSocket, Timeout: DefaultTimeout}
	if options == nil || options.TypeUrl == "" {
		return c, nil
	}
	name := options.TypeUrl[strings.LastIndexByte(options.TypeUrl, '/')+1:]
	if slices.Contains(runcOptions, name) {
		return c, nil
	}
	if !slices.Contains(typeURLs, name) {
		return c, fmt.Errorf("runtime options of type %s are not known to this runtime: use %s with config_path, that is ConfigPath in the options of containerd's runtime handler: %w", options.TypeUrl, typeURLs[0], errdefs.ErrInvalidArgument)
	}
	var o runtimeoptions.Options
	if err := proto.Unmarshal(options.Value, &o); err != nil {
		return c, fmt.Errorf("runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	text, from := o.ConfigBody, "options of the runtime handler in containerd's configuration"
	if o.ConfigPath != "" {
		if !filepath.IsAbs(o.ConfigPath) {
			return c, fmt.Errorf("runtime options: ConfigPath %q is not absolute: %w", o.ConfigPath, errdefs.ErrInvalidArgument)
		}
		var err error
		if text, err = os.ReadFile(o.ConfigPath); err != nil {
			return c, fmt.Errorf("runtime options: ConfigPath: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		from = o.ConfigPath
	}
	if err := c.parse(text); err != nil {
		return c, fmt.Errorf("%s: %w: %w", from, err, errdefs.ErrInvalidArgument)
	}
	return c, nil
}

// parse applies a file.
func (c *Config) parse(text []byte) error {
	var doc map[string]any
	if err := toml.Unmarshal(text, &doc); err != nil {
		return err
	}
	var problems []string
	bad := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	walk(doc, "", func(table, key string, value any) {
		switch {
		case table == "hypervisor.remote" && key == "remote_hypervisor_socket":
			s, ok := value.(string)
			if !ok || s != "" && !filepath.IsAbs(s) {
				bad("%s.%s is not an absolute path", table, key)
			} else if s != "" {
				c.Socket = s
			}
		case table == "hypervisor.remote" && key == "remote_hypervisor_timeout":
			n, ok := value.(int64)
			if !ok || n < 0 || n > int64(24*time.Hour/time.Second) {
				bad("%s.%s is not a number of seconds", table, key)
			} else if n > 0 {
				c.Timeout = time.Duration(n) * time.Second
			}
		case table == "" && key == guestPull, table == "runtime" && (key == guestPull || key == "experimental_force_guest_pull"):
			on, ok := value.(bool)
			if !ok {
				bad("%s is neither true nor false", key)
			}
			c.GuestPull = c.GuestPull || on
		case strings.HasPrefix(table, "hypervisor.") && table != "hypervisor.remote":
			bad("[%s] is not a remote hypervisor; only [hypervisor.remote] is supported", table)
		case !ignores(table, key):
			if table != "" {
				key = table + "." + key
			}
			bad("unknown key %s", key)
		}
	})
	if len(problems) > 0 {
		slices.Sort(problems)
		return fmt.Errorf("%s", strings.Join(slices.Compact(problems), "; "))
	}
	return nil
}

func ignores(table, key string) bool {
	for t, keys := range ignored {
		if table == t && (keys[0] == "*" || slices.Contains(keys, key)) || keys[0] == "*" && strings.HasPrefix(table, t+".") {
			return true
		}
	}
	return false
}

// walk calls f for every key that is not a table.
func walk(doc map[string]any, table string, f func(table, key string, value any)) {
	for k, v := range doc {
		if sub, ok := v.(map[string]any); ok {
			name := k
			if table != "" {
				name = table + "." + k
			}
			walk(sub, name, f)
			continue
		}
		f(table, k, v)
	}
}
