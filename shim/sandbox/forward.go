// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/guest"
	"github.com/kata-remote/kata-remote/shim/portforward"
	"github.com/kata-remote/kata-remote/shim/spec"
)

// forwardPorts serves port-forward until the guest is gone. A pod without it is better
// than none. It ends with the connection and not with the shim: the listener keeps
// the pod's network namespace, which is to go when the pod stops.
func (s *Sandbox) forwardPorts(spc *specs.Spec, conn *guest.Conn, features extension.Set) {
	if !features.Has(extension.Forward) {
		return
	}
	path, err := spec.NetNS(spc)
	if err != nil {
		return // a pod without one was refused
	}
	l, err := portforward.Listen(path)
	if err != nil {
		log.G(s.run).WithError(err).Warn("port-forward to this pod will not work")
		return
	}
	ctx, cancel := context.WithCancel(s.run)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-conn.Dead():
			cancel()
		case <-stop:
		}
	}()
	l.Serve(ctx, conn)
}
