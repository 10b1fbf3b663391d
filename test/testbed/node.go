// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// cniConfig is a plain bridge, as most nodes' CNI in the end is one.
const cniConfig = `{
  "cniVersion": "0.4.0",
  "name": "testbed",
  "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
     "ipam": {"type": "host-local", "ranges": [[{"subnet": "` + CNISubnet + `"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`

// containerdConfig is for containerd 1.6 and 1.7. restrict_oom_score_adj: a root
// without CAP_SYS_RESOURCE cannot lower it, and runc fails when it tries.
const containerdConfig = `version = 2
root = "%[1]s/containerd"
state = "/run/containerd-testbed/state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper"]

[grpc]
  address = "` + ContainerdSocket + `"

[plugins."io.containerd.internal.v1.opt"]
  path = "%[1]s/opt"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + PauseImage + `"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "` + registryConfig + `"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
    max_conf_num = %[2]d
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
`

// containerd2Config is the same for containerd 2, whose configuration has version 3.
// The runc shim of its own version stands beside it.
const containerd2Config = `version = 3
root = "%[1]s/containerd"
state = "/run/containerd-testbed/state"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs", "io.containerd.internal.v1.tracing"]

[grpc]
  address = "` + ContainerdSocket + `"

[plugins.'io.containerd.internal.v1.opt']
  path = "%[1]s/opt"

[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  [plugins.'io.containerd.cri.v1.images'.registry]
    config_path = "` + registryConfig + `"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = "` + PauseImage + `"

[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  disable_apparmor = true
  enable_cdi = false
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "/etc/cni/net.d"
    max_conf_num = %[2]d
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = "runc"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
`

// handlerConfig is a handler's table, below the CRI plugin's name.
const handlerConfig = `
    [plugins.%q.containerd.runtimes.%s]
      runtime_type = %q
      privileged_without_host_devices = %t
      pod_annotations = ["io.katacontainers.*"]
      container_annotations = ["io.katacontainers.*"]
`

// sandboxerConfig goes on a handler's table: its pods are made through the Sandbox API,
// and no pause image is pulled for them.
const sandboxerConfig = `      sandboxer = "shim"
      disable_pause_image_pull = true
`

// writeConfig writes containerd's configuration.
func (b *Bed) writeConfig() error {
	config, plugin := containerdConfig, "io.containerd.grpc.v1.cri"
	if b.Generation.V2 {
		config, plugin = containerd2Config, "io.containerd.cri.v1.runtime"
	}
	text := fmt.Sprintf(config, b.Out, max(len(b.Networks), 1))
	handlers := map[string]string{Handler: HandlerType}
	maps.Copy(handlers, b.Handlers)
	for _, name := range slices.Sorted(maps.Keys(handlers)) {
		text += fmt.Sprintf(handlerConfig, plugin, name, handlers[name], handlers[name] == HandlerType)
	}
	if b.Generation.V2 {
		text += fmt.Sprintf(handlerConfig, plugin, SandboxHandler, HandlerType, true) + sandboxerConfig
	}
	return os.WriteFile(filepath.Join(b.Out, "containerd.toml"), []byte(text), 0o644)
}

// StartContainerd starts containerd with a root, state and socket of its own and
// imports the images.
func (b *Bed) StartContainerd(ctx context.Context) error {
	const dir = "/etc/cni/net.d"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	networks := b.Networks
	if len(networks) == 0 {
		networks = []string{cniConfig}
	}
	for i, text := range networks {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d-testbed.conflist", 10+i)), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := b.RestartContainerd(ctx); err != nil {
		return err
	}
	pause, err := b.Pause(ctx)
	if err != nil {
		return err
	}
	busybox, err := b.Busybox(ctx)
	if err != nil {
		return err
	}
	return b.Import(ctx, pause, busybox)
}

// program is one of containerd's programs.
func (b *Bed) program(name string) string {
	if b.Generation.Dir != "" {
		return filepath.Join(b.Generation.Dir, name)
	}
	return name
}

// RestartContainerd starts containerd on the state that is there, with the handlers
// that b has now. Kill or stop the running one first.
func (b *Bed) RestartContainerd(ctx context.Context) error {
	if err := b.writeConfig(); err != nil {
		return err
	}
	cmd := exec.Command(b.program("containerd"), "-c", filepath.Join(b.Out, "containerd.toml"))
	path := b.Bin + ":" + os.Getenv("PATH") // where containerd looks for shims
	if b.Generation.Dir != "" {
		path = b.Generation.Dir + ":" + path
	}
	cmd.Env = append(os.Environ(), "PATH="+path)
	d, err := b.Start(ctx, "containerd", cmd, func(ctx context.Context) error {
		_, err := Run(ctx, b.program("ctr"), "-a", ContainerdSocket, "version")
		return err
	})
	b.Containerd = d
	return err
}

// StartAdaptor starts the adaptor with the embedded provider, or the simulated one. It
// may be called again after the running one was killed or stopped.
func (b *Bed) StartAdaptor(ctx context.Context) error {
	program := "cloud-api-adaptor"
	if b.Simulated {
		program = "simadaptor"
	}
	cmd := exec.Command(filepath.Join(b.Bin, program))
	env := b.AdaptorConfig()
	b.noteState(env)
	cmd.Env = append(os.Environ(), env...)
	d, err := b.Start(ctx, "adaptor", cmd, func(ctx context.Context) error {
		c, err := (&net.Dialer{}).DialContext(ctx, "unix", HypervisorSocket)
		if err == nil {
			c.Close()
		}
		return err
	})
	b.Adaptor = d
	return err
}

// AdaptorConfig is the adaptor's configuration as its environment.
func (b *Bed) AdaptorConfig() []string {
	return append([]string{
		"CLOUD_PROVIDER=local",
		"NODE_NAME=testbed",
		"LOCAL_KERNEL=" + b.Image.Kernel.Path,
		"LOCAL_INITRD=" + b.Image.Initrd.Path,
		"LOCAL_CMDLINE=" + b.Image.CommandLine,
		"LOG_LEVEL=debug",
		"SIM_PODVMD=" + filepath.Join(b.Bin, "podvmd"),
		"SIM_DIR=" + filepath.Join(b.Out, "logs"),
	}, b.AdaptorEnv...)
}

// Crictl runs crictl against the bed's containerd.
func (b *Bed) Crictl(ctx context.Context, args ...string) (string, error) {
	cmd, full := b.CrictlCommand(args...)
	out, err := Run(ctx, cmd, full...)
	return strings.TrimSpace(out), err
}

// CrictlCommand is the command line of a crictl call.
func (b *Bed) CrictlCommand(args ...string) (string, []string) {
	socket := "unix://" + ContainerdSocket
	return filepath.Join(b.Bin, "crictl"), append([]string{"-r", socket, "-i", socket, "-t", "10m"}, args...)
}
