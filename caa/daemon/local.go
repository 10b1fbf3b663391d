// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"log/slog"
	"time"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/local"
)

// newLocal makes the embedded provider.
func newLocal(cfg *config.Config) (cloud.Provider, error) {
	accel := cfg.Local.Accel
	if accel == "auto" {
		accel = ""
	}
	p, err := local.New(local.Config{
		QEMU: cfg.Local.QEMU, Machine: cfg.Local.Machine, Accel: local.Accel(accel),
		Kernel: cfg.Local.Kernel, Initrd: cfg.Local.Initrd, KernelArgs: cfg.Local.Cmdline,
		StateDir: cfg.Local.Dir, Bridge: cfg.Local.Bridge, Subnet: cfg.Local.Subnet, MTU: cfg.Local.MTU,
		DefaultVCPUs: cfg.Local.VCPUs, DefaultMemoryMiB: cfg.Local.Memory,
	})
	if err != nil {
		return nil, err
	}
	return localProvider{p}, nil
}

// localProvider announces how its VMs will run.
type localProvider struct{ *local.Provider }

// Announce finds out, once for each boot of the node, whether KVM works here, and
// says so. Doing it before the first pod comes keeps the test boot out of that pod's
// start.
func (p localProvider) Announce(ctx context.Context, log *slog.Logger) {
	begin := time.Now()
	accel, reason, err := p.Accel(ctx)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		log.Error("pod VMs cannot be made on this node", logkey.Provider, config.ProviderLocal, logkey.Error, err)
	default:
		log.Info("pod VMs run by "+string(accel), logkey.Provider, config.ProviderLocal, "reason", reason,
			logkey.Duration, float64(time.Since(begin).Microseconds())/1000)
	}
}

// ListSettle is short: an instance has its directory before anything else of it, so
// that a list shows it at once.
func (localProvider) ListSettle() time.Duration { return 500 * time.Millisecond }
