// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"log/slog"
	"os"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/podvm/kmod"
	"github.com/kata-remote/kata-remote/podvm/scratch"
)

// addScratch makes swap of the rest of the disk that the machine was started from, if it
// was. Without it a pod has less room, which is better than no pod.
func addScratch(ctx context.Context, loading *kmod.Loading, m *marks, log *slog.Logger) {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		log.Error("no scratch space", logkey.Error, err.Error())
		return
	}
	id := scratch.DiskID(string(cmdline))
	if id == "" {
		return
	}
	space, err := scratch.Host{}.Find(ctx, id)
	if errdefs.IsNotFound(err) {
		log.Info("no scratch space", logkey.Error, err.Error())
		return
	}
	if err == nil {
		err = loading.Request(scratch.Modules...)
	}
	if err == nil {
		_ = loading.Request(scratch.Faster) // not on every processor
		err = scratch.Swap(space)
	}
	if err != nil {
		log.Error("no scratch space", logkey.Error, err.Error())
		return
	}
	m.done("scratch")
}
