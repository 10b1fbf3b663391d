// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/podvm/bootconf"
	"github.com/kata-remote/kata-remote/podvm/guestnet"
	"github.com/kata-remote/kata-remote/podvm/kmod"
	"github.com/kata-remote/kata-remote/podvm/notice"
	"golang.org/x/sys/unix"
)

// Drivers that are always loaded, of what a source of user data is reached by. Those that
// the kernel has built in are not waited for. Those for hardware that is there are loaded
// first, or come when it does; what needs such hardware looks for the device again and again.
var (
	diskDrivers = []string{"virtio_pci", "virtio_mmio", "virtio_blk"}
	nicDrivers  = []string{"virtio_pci", "virtio_mmio", "virtio_net"}
)

// leasing is the VM's own interface with an address from a DHCP server: asked for when
// the first source needs the network, which the local provider's does not.
type leasing struct {
	loading *kmod.Loading
	m       *marks
	started bool
	cancel  context.CancelFunc
	ended   chan struct{}     // closed when primary or err is set
	primary *guestnet.Primary // nil: there is no lease
	err     error
}

func newLeasing(loading *kmod.Loading, m *marks) *leasing {
	return &leasing{loading: loading, m: m, cancel: func() {}, ended: make(chan struct{})}
}

// start begins to ask, once. It and stop are called by one goroutine.
func (l *leasing) start(ctx context.Context) {
	if l.started {
		return
	}
	l.started = true
	ctx, l.cancel = context.WithTimeout(ctx, bootconf.Budget)
	go func() {
		defer close(l.ended)
		defer l.cancel()
		if l.err = l.loading.WaitFor(nicDrivers...); l.err != nil {
			return
		}
		if l.primary, l.err = guestnet.AcquirePrimary(ctx); l.err == nil {
			l.m.done("nic")
		}
	}()
}

// stop ends the asking, and returns when it has ended. A lease that is there stays.
func (l *leasing) stop() {
	l.cancel()
	if l.started {
		<-l.ended
	}
}

// wait waits for the lease.
func (l *leasing) wait(ctx context.Context) error {
	select {
	case <-l.ended:
		return l.err
	case <-ctx.Done():
		return fmt.Errorf("there is no network yet: %w", errdefs.ErrUnavailable)
	}
}

// keep renews the lease, if there is one, until ctx ends.
func (l *leasing) keep(ctx context.Context, log *slog.Logger) {
	if !l.started {
		return
	}
	<-l.ended
	if l.primary != nil {
		l.primary.Keep(ctx, log)
	}
}

// readUserData asks the sources that the platform may have, and no others: a question to
// one that is not there costs time, or needs a network that is not configured so.
func readUserData(ctx context.Context, p bootconf.Platform, loading *kmod.Loading, lease *leasing) (*bootconf.Config, error) {
	withDisks := func(s bootconf.Source) bootconf.Source {
		return bootconf.After(func(context.Context) error { return loading.WaitFor(diskDrivers...) }, s)
	}
	// The CD comes before the service: it is there without a network, and nobody else can
	// be asked in its place.
	cd := withDisks(bootconf.AzureCD{})
	ec2 := bootconf.After(lease.wait, bootconf.EC2{})
	azure := bootconf.After(lease.wait, bootconf.AzureService{})
	switch p {
	case bootconf.PlatformEC2:
		lease.start(ctx)
		return bootconf.Read(ctx, ec2)
	case bootconf.PlatformAzure:
		lease.start(ctx)
		return bootconf.Read(ctx, cd, azure)
	}
	// Elsewhere there is a disk, most of the time at once. Only when there is none for as
	// long as a probe may take are the others worth a start.
	quick := bootconf.NoCloud{Disks: bootconf.Disks{Wait: bootconf.ProbeLimit}}
	cfg, err := bootconf.Read(ctx, withDisks(quick))
	if !errdefs.IsNotFound(err) {
		return cfg, err
	}
	lease.start(ctx)
	return bootconf.Read(ctx, withDisks(bootconf.NoCloud{}), ec2, cd, azure)
}

// readSeed reads the user data and writes its files.
func readSeed(ctx context.Context, p bootconf.Platform, loading *kmod.Loading, lease *leasing, m *marks) (*bootconf.Config, *podvmconfig.Config, error) {
	defer m.done("seed")
	boot, err := readUserData(ctx, p, loading, lease)
	if err != nil {
		return nil, nil, err
	}
	if boot.Hostname != "" {
		if err := unix.Sethostname([]byte(boot.Hostname)); err != nil {
			return nil, nil, fmt.Errorf("set host name: %w", err)
		}
	}
	if err := bootconf.WriteFiles("/", boot.Files); err != nil {
		return nil, nil, err
	}
	for _, f := range boot.Files {
		if f.Path == podvmconfig.Path {
			pod, err := podvmconfig.Parse(f.Content)
			return boot, pod, err
		}
	}
	return nil, nil, fmt.Errorf("user data from %s: write_files has no %s: nothing tells which pod this is", boot.Source, podvmconfig.Path)
}

// bringUpNetwork configures the VM's own interface, as the user data's source says or by
// DHCP, and makes the pod's network.
func bringUpNetwork(ctx context.Context, cfg Config, boot *bootconf.Config, pod *podvmconfig.Config, loading *kmod.Loading, lease *leasing, m *marks) error {
	if boot.Links == nil {
		lease.start(ctx)
		if err := lease.wait(ctx); err != nil {
			return fmt.Errorf("%s gives no network configuration: %w", boot.Source, err)
		}
	} else {
		lease.stop()
		if err := loading.WaitFor("virtio_net"); err != nil {
			return err
		}
		if err := guestnet.ConfigureLinks(ctx, boot.Links); err != nil {
			return err
		}
		m.done("nic")
	}
	if err := loading.WaitFor("vxlan", "xfrm_user"); err != nil {
		return err
	}
	defer m.done("tunnel")
	return guestnet.Ensure(ctx, cfg.PodNetNS, pod)
}

// watchOf returns what knows of the cloud's notices; nil: there are none.
func watchOf(p bootconf.Platform) *notice.Watch {
	switch p {
	case bootconf.PlatformEC2:
		return notice.EC2("")
	case bootconf.PlatformAzure:
		return notice.Azure("")
	}
	return nil
}

// reportReady tells Azure that the machine is up. A failure is Azure's to act on: it gives
// up a machine that it was not told of, and the adaptor sees that.
func reportReady(ctx context.Context, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, bootconf.Budget)
	defer cancel()
	if err := bootconf.ReportReady(ctx); err != nil {
		log.Warn("Azure is not told that this machine is ready", logkey.Error, err.Error())
	}
}
