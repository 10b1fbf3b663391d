// SPDX-License-Identifier: Apache-2.0

//go:build tools

// Package containerd17 pins containerd 1.7, the generation between Debian 12's and
// the current one. It is a module of its own: the product links none of containerd's
// daemon.
package containerd17

import (
	_ "github.com/containerd/containerd/cmd/containerd"
	_ "github.com/containerd/containerd/cmd/containerd-shim-runc-v2"
	_ "github.com/containerd/containerd/cmd/ctr"
)
