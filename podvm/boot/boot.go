// SPDX-License-Identifier: Apache-2.0

// Package boot brings a pod VM from the kernel's hand-over to a listening
// forwarder, and keeps it running.
//
// As PID 1 of the image's initramfs (RunInit):
//
//	root ─▶ mounts ─▶ modules (each as soon as those it needs are in)
//	                    ├─ virtio_blk ─▶ seed ─┬─ virtio_net ─▶ links ─▶ tunnel ─┐
//	                    └─ cgroups, lo         └─ credentials, agent ────────────┴▶ listening ─▶ cpus ─▶ late modules
//
// In a cloud, which the firmware tells, the seed is where the network leads to:
//
//	network card ─▶ DHCP ─▶ metadata service ─▶ seed ─▶ tunnel, agent
//
// Started from a disk image, the agent also comes after the swap on the rest of that disk
// (podvm/scratch), whose size it counts. Drivers for hardware that comes later are loaded
// as long as the machine runs (podvm/kmod).
//
// As a service of an ordinary system (RunService): the configuration is a file and
// the network is there, so only tunnel, agent and listening are left. Such a system may
// bring a kata-agent of its own, which podvmd then stands before (docs/interop.md).
//
// PID 1 never hangs: every wait has a deadline, and what cannot be mended ends in one
// sentence on the console and a machine that is off, which a provider shows as a
// failed instance.
package boot

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime/debug"

	"github.com/containerd/ttrpc"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/podvm/agent"
	"github.com/kata-remote/kata-remote/podvm/agent/pull"
	"github.com/kata-remote/kata-remote/podvm/forwarder"
	"github.com/kata-remote/kata-remote/podvm/guestnet"
	"github.com/kata-remote/kata-remote/podvm/notice"
	"golang.org/x/sync/errgroup"
)

// Config is what the program's flags and build say. The zero value of a field takes
// the default named.
type Config struct {
	// ConfigPath is the pod VM's configuration. Default: podvmconfig.Path.
	ConfigPath string
	// Listen is the forwarder's TCP address. Default: all addresses, port
	// podvmconfig.ForwarderPort.
	Listen string
	// PodNetNS is where the pod's network namespace is made. Default:
	// podvmconfig.PodNetNS.
	PodNetNS string
	// StateDir is the agent's. Default: agent.DefaultStateDir.
	StateDir string
	// AgentSocket is the unix socket of a stock kata-agent, to be served in place of
	// podvmd's own agent. Empty: what the pod VM's configuration says (agent_socket).
	AgentSocket string
	// Version is what the agent reports.
	Version string
	// Logger takes the log. Default: slog.Default.
	Logger *slog.Logger

	// beforeAgent is closed when the agent may look how much memory there is; nil: now.
	beforeAgent <-chan struct{}

	notices *notice.Watch // nil: the machine is in no cloud that gives notice
}

func (c Config) complete() Config {
	if c.ConfigPath == "" {
		c.ConfigPath = podvmconfig.Path
	}
	if c.Listen == "" {
		c.Listen = fmt.Sprintf(":%d", podvmconfig.ForwarderPort)
	}
	if c.PodNetNS == "" {
		c.PodNetNS = podvmconfig.PodNetNS
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return c
}

// RunService serves one pod until ctx is done. The error is one sentence that names
// what to change.
func RunService(ctx context.Context, cfg Config) error {
	cfg = cfg.complete()
	doc, err := os.ReadFile(cfg.ConfigPath)
	if err != nil {
		return fmt.Errorf("read the pod VM's configuration: %w", err)
	}
	pod, err := podvmconfig.Parse(doc)
	if err != nil {
		return err
	}
	m := newMarks()
	network := func() error {
		defer m.done("tunnel")
		return guestnet.Ensure(ctx, cfg.PodNetNS, pod)
	}
	return serve(ctx, cfg, pod, m, network, func(log *slog.Logger) {
		m.log(log)
		if err := notifyReady(); err != nil {
			log.Warn("tell the service manager that the port is open", logkey.Error, err.Error())
		}
	})
}

// notifyReady tells a service manager that waits for it (sd_notify(3), as upstream's
// unit of Type=notify does) that the port is open.
func notifyReady() error {
	address := os.Getenv("NOTIFY_SOCKET")
	if address == "" {
		return nil
	}
	if err := os.Unsetenv("NOTIFY_SOCKET"); err != nil { // not for our children
		return err
	}
	conn, err := net.Dial("unixgram", address)
	if err != nil {
		return err
	}
	_, err = conn.Write([]byte("READY=1"))
	return errors.Join(err, conn.Close())
}

// gcPercent trades some megabytes of a machine that has hundreds for processor time: the
// live heap is a few megabytes, and a stream of output makes garbage as fast as it goes.
const gcPercent = 400

// serve starts agent and forwarder and runs them until ctx is done. network is run
// beside the preparations; the port opens after it. listening is called once the port
// is open, before the first connection is served.
func serve(ctx context.Context, cfg Config, pod *podvmconfig.Config, m *marks, network func() error, listening func(*slog.Logger)) error {
	debug.SetGCPercent(gcPercent)
	log := cfg.Logger.With(logkey.Sandbox, pod.SandboxID)
	credentials := forwarder.Credentials{
		Key:      []byte(string(pod.TLSServerKey)),
		Cert:     []byte(pod.TLSServerCert),
		ClientCA: []byte(pod.TLSClientCA),
	}
	var prepared backend
	var tlsConfig *tls.Config
	var g errgroup.Group
	g.Go(network)
	g.Go(func() (err error) {
		defer m.done("agent")
		if tlsConfig, err = credentials.TLSConfig(); err == nil {
			prepared, err = newBackend(cfg, pod, log)
		}
		return err
	})
	if err := g.Wait(); err != nil {
		return err
	}
	inner, err := forwarder.Listen(ctx, cfg.Listen)
	if err != nil {
		return fmt.Errorf("forwarder: %w", err)
	}
	l, err := forwarder.NewListener(inner, tlsConfig)
	if err != nil {
		return errors.Join(err, inner.Close())
	}
	m.done("listening")
	listening(log)
	return prepared.run(ctx, l)
}

// backend is what answers behind the forwarder.
type backend interface {
	// run serves the connections of l until ctx is done, and closes l.
	run(ctx context.Context, l net.Listener) error
}

func newBackend(cfg Config, pod *podvmconfig.Config, log *slog.Logger) (backend, error) {
	if socket := cmp.Or(cfg.AgentSocket, pod.AgentSocket); socket != "" {
		return stockAgent{forwarder.FrontConfig{Socket: socket, PodNetNS: cfg.PodNetNS, Log: log}}, nil
	}
	if cfg.beforeAgent != nil {
		<-cfg.beforeAgent
	}
	ac := agent.Config{
		PodNetNS: cfg.PodNetNS,
		StateDir: cfg.StateDir,
		Version:  cfg.Version,
		Logger:   log,
		Images:   pull.Config{AuthFile: podvmconfig.AuthPath, CA: pod.RegistryCA, Insecure: pod.InsecureRegistries},
	}
	if cfg.notices != nil {
		ac.Notices = cfg.notices
	}
	a, err := agent.New(ac)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	a.Register(srv)
	return ownAgent{agent: a, server: srv}, nil
}

// stockAgent is another program that listens on a unix socket.
type stockAgent struct{ cfg forwarder.FrontConfig }

func (s stockAgent) run(ctx context.Context, l net.Listener) error {
	return forwarder.ServeAgent(ctx, l, s.cfg)
}

// ownAgent is podvmd's.
type ownAgent struct {
	agent  *agent.Agent
	server *ttrpc.Server
}

func (o ownAgent) run(ctx context.Context, l net.Listener) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return o.agent.Run(ctx) })
	g.Go(func() error {
		if err := o.server.Serve(ctx, l); err != nil && !errors.Is(err, ttrpc.ErrServerClosed) && ctx.Err() == nil {
			return fmt.Errorf("forwarder: serve: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		return errors.Join(l.Close(), o.server.Close())
	})
	return g.Wait()
}
