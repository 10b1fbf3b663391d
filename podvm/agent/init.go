// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"runtime"

	// Makes the cgroup manager able to restrict devices, without which it refuses to
	// start a container.
	_ "github.com/opencontainers/cgroups/devices"
	"github.com/opencontainers/runc/libcontainer"
	// The C half of the re-exec: it enters the namespaces before the Go runtime
	// starts threads.
	_ "github.com/opencontainers/runc/libcontainer/nsenter"
)

// libcontainer and this package run threads in namespaces of a container and let them
// die afterwards. The runtime cannot let the main thread die: it would stay there for
// ever, and /proc/self of the whole process with it. Locked to the main goroutine it
// is never taken for such work.
func init() { runtime.LockOSThread() }

// Init must be the first call of main. libcontainer starts every container process
// by running this binary again with the argument "init"; in such a child Init turns
// into the user's command and never returns. Elsewhere it only prepares such children.
func Init() {
	if len(os.Args) > 1 && os.Args[1] == "init" && os.Getenv("_LIBCONTAINER_INITPIPE") != "" {
		libcontainer.Init()
	}
	// libcontainer hands this one variable on to the children, which have one thread
	// to do all their work: without it their runtime starts others first. It comes
	// too late for this process and does not reach the user's command.
	_ = os.Setenv("GOMAXPROCS", "1") // fails for malformed names alone
}
