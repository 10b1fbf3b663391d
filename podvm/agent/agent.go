// SPDX-License-Identifier: Apache-2.0

// Package agent is the agent inside a pod's virtual machine: it speaks the
// kata-agent protocol (grpc.AgentService, grpc.Health) and our extension service
// (peerpod.podvm.v1.PodVM) and runs containers with runc's libcontainer.
//
// # Life of a container and of a process
//
//	Creating ──▶ Created ──▶ Running ◀──▶ Paused
//	    │           │           │            │
//	    │           └───────────┼────────────┘
//	    ▼                       ▼
//	 Removed ◀────────────── Stopped
//
//	Starting ──▶ Running ──▶ Exited
//	    └──────────────────────▲
//
// # What a pod's containers share
//
// CreateSandbox makes an ipc and a uts namespace; every container joins them and the
// network namespace at Config.PodNetNS. Pid namespaces are shared where the runtime
// asks for it. Mount and cgroup namespaces are each container's own.
//
// # Storages
//
// What a request mounts is made by a driver of the table storageDrivers and shared by
// all that name its mount point. One that takes long holds up only those.
//
// # Where the rest is
//
// The pod's network is podnet's, root file systems that are sent rootfs', those that
// are pulled pull's, volumes that are followed volume's, streams stream's. What each
// call does, and what is refused, is in docs/agent.md.
//
// # The sandbox container
//
// A pod's sandbox container without a root file system is not libcontainer's: it runs
// this program's own pause (pauseRunner). What runs a container is behind the
// interface runner; everything else treats all alike.
//
// # Locks
//
// Agent.mu guards the maps. Each container has an operation lock, taken with the
// caller's context, that puts create, start, exec, pause, update and remove in a
// row, and a data mutex. No mutex is held across a wait, and signalling takes no
// operation lock: a hung operation cannot keep a container from being killed.
//
// # Signals
//
// An empty exec id with SIGKILL means every process of the container; with any other
// signal the first process alone. A signal is delivered as Linux delivers it: a
// first process without a handler for SIGTERM does not see it, as under runc. The
// Rust agent turns that SIGTERM into SIGKILL; we do not, because the status a pod
// ends with would then depend on where it ran.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/podvm/agent/podnet"
	"github.com/kata-remote/kata-remote/podvm/agent/pull"
	"github.com/kata-remote/kata-remote/podvm/agent/rootfs"
	"github.com/kata-remote/kata-remote/podvm/agent/volume"
	"golang.org/x/sys/unix"
)

const (
	// DefaultStateDir is where a kata-agent keeps everything; runtimes send paths
	// below it.
	DefaultStateDir = "/run/kata-containers"
	// DefaultCgroupParent is the cgroup below which containers get theirs.
	DefaultCgroupParent = "/peerpod"
	// DefaultStreamBuffer is the most output in bytes that is kept per stream.
	DefaultStreamBuffer = 1 << 20
	// defaultRootfsFloor keeps the default size of a root file system usable in a
	// very small machine, bytes.
	defaultRootfsFloor = 64 << 20
	// destroyTimeout bounds the killing of one container when the agent ends: a
	// process that SIGKILL does not end in it hangs in the kernel.
	destroyTimeout = 10 * time.Second
)

// Config is what an Agent needs to know. The zero value is usable.
type Config struct {
	// PodNetNS is the path of the pod's network namespace. Empty: containers use
	// the agent's own.
	PodNetNS string
	// StateDir holds all the agent's files. Empty: DefaultStateDir. The agent never
	// removes the directory itself, nor what it did not make in it.
	StateDir string
	// CgroupParent is the absolute cgroup path of the containers' parent. Empty:
	// DefaultCgroupParent.
	CgroupParent string
	// DefaultRootfsSize bounds an imported root file system whose request has no
	// limit, in bytes. 0: half of the machine's memory, and of its swap.
	DefaultRootfsSize uint64
	// VolumesSize bounds what PutVolume brings, all volumes together, in bytes. 0: a
	// quarter of the machine's memory, and of its swap.
	VolumesSize uint64
	// Images says how the guest pulls images. Dir and RootSize are set by New: below
	// StateDir, and DefaultRootfsSize.
	Images pull.Config
	// StreamBuffer is the most output in bytes kept per stream. 0:
	// DefaultStreamBuffer.
	StreamBuffer int
	// ResolvConf is a file that gets the pod's DNS configuration, for the guest's own
	// lookups. Empty: none.
	ResolvConf string
	// Version is reported by Version and GetGuestDetails.
	Version string
	// Notices tells what the cloud announces. Nil: the machine is in none that does, and
	// the feature is not advertised.
	Notices noticer
	// OnDestroy is called, in a goroutine of its own, once DestroySandbox has removed
	// everything; the answer may still be on its way. Nil: the agent goes on serving.
	OnDestroy func()
	// Logger takes the agent's log. Nil: slog.Default.
	Logger *slog.Logger
}

// Agent runs the containers of one pod. Its methods may be called concurrently.
type Agent struct {
	cfg   Config
	log   *slog.Logger
	oom   *oomWatch
	root  *rootfs.Store
	files *fileCopier
	net   *podnet.Network
	clock clock
	// copied are the volumes that PutVolume brings; volumes are storages.
	copied *volume.Store
	// images are those the guest has pulled.
	images *pull.Store

	// life ends when Run does: the agent's own run context, under which goroutines
	// that outlive the call that started them work.
	life    context.Context
	endLife context.CancelFunc
	wg      sync.WaitGroup

	mu         sync.Mutex
	sandbox    *sandbox                   // guarded by mu; nil: none
	containers map[ContainerID]*container // guarded by mu
	closed     bool                       // guarded by mu; Run has ended

	sandboxOp chan struct{} // holds one token; serialises what changes the sandbox as a whole

	volMu   sync.Mutex
	volumes map[string]*storage // guarded by volMu; by mount point
}

// ContainerID names a container of the pod.
type ContainerID string

// New checks the configuration and makes the state directory. It starts nothing.
// InvalidArgument: a path that is not absolute, an additional authority for registries
// that is no certificate.
func New(cfg Config) (*Agent, error) {
	var errs []error
	if cfg.StateDir == "" {
		cfg.StateDir = DefaultStateDir
	}
	if cfg.CgroupParent == "" {
		cfg.CgroupParent = DefaultCgroupParent
	}
	if cfg.StreamBuffer == 0 {
		cfg.StreamBuffer = DefaultStreamBuffer
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	for name, path := range map[string]string{"StateDir": cfg.StateDir, "CgroupParent": cfg.CgroupParent, "PodNetNS": cfg.PodNetNS, "ResolvConf": cfg.ResolvConf} {
		if path != "" && !filepath.IsAbs(path) {
			errs = append(errs, fmt.Errorf("%s %q is not an absolute path: %w", name, path, errdefs.ErrInvalidArgument))
		}
	}
	if cfg.StreamBuffer < 0 {
		errs = append(errs, fmt.Errorf("StreamBuffer %d is negative: %w", cfg.StreamBuffer, errdefs.ErrInvalidArgument))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	half, err := halfOfMemory()
	if err != nil {
		return nil, err
	}
	if cfg.DefaultRootfsSize == 0 {
		cfg.DefaultRootfsSize = half
	}
	if cfg.VolumesSize == 0 {
		cfg.VolumesSize = half / 2
	}
	cfg.StateDir = filepath.Clean(cfg.StateDir)
	if err := os.MkdirAll(cfg.StateDir, 0o755); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	cfg.Images.Dir, cfg.Images.RootSize = filepath.Join(cfg.StateDir, "image"), cfg.DefaultRootfsSize
	images, err := pull.New(cfg.Images)
	if err != nil {
		return nil, err
	}
	a := &Agent{
		images:     images,
		cfg:        cfg,
		log:        cfg.Logger,
		oom:        newOOMWatch(),
		root:       rootfs.NewStore(cfg.StateDir, cfg.DefaultRootfsSize),
		files:      newFileCopier(filepath.Join(cfg.StateDir, "shared", "containers")),
		net:        podnet.New(cfg.PodNetNS),
		clock:      kernelClock,
		copied:     volume.NewStore(filepath.Join(cfg.StateDir, "sandbox", "volumes"), cfg.VolumesSize),
		containers: make(map[ContainerID]*container),
		volumes:    make(map[string]*storage),
		sandboxOp:  make(chan struct{}, 1),
	}
	a.life, a.endLife = context.WithCancel(context.Background())
	return a, nil
}

// halfOfMemory is half of what a tmpfs can fill: memory and swap.
func halfOfMemory() (uint64, error) {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0, fmt.Errorf("read the machine's memory size: %w", err)
	}
	return max((uint64(si.Totalram)+uint64(si.Totalswap))*uint64(si.Unit)/2, defaultRootfsFloor), nil
}

// Register adds the agent's three services to a server. Call it once per server,
// before Serve.
func (a *Agent) Register(s *ttrpc.Server) {
	agentpb.RegisterAgentServiceService(s, &service{a: a})
	agentpb.RegisterHealthService(s, &health{a: a})
	podvmpb.RegisterPodVMService(s, &podvm{a: a})
}

// Run does the agent's background work until ctx is done. Then it kills every
// container, releases what they held and returns when all its goroutines have
// ended. It is called once. The error joins what could not be released.
func (a *Agent) Run(ctx context.Context) error {
	if os.Getpid() == 1 {
		a.wg.Go(func() { reapOrphans(a.life, a.log) })
	}
	<-ctx.Done()
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*destroyTimeout)
	defer cancel()
	err := a.destroySandbox(clean)
	err = errors.Join(err, a.root.Close(), a.images.Close(), a.files.close(), a.copied.Reset())
	a.endLife()
	a.oom.close()
	a.wg.Wait()
	return err
}
