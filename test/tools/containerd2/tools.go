// SPDX-License-Identifier: Apache-2.0

//go:build tools

// Package containerd2 pins containerd 2, which Debian 12 does not have. It is a
// module of its own: the product links none of containerd's daemon.
package containerd2

import (
	_ "github.com/containerd/containerd/v2/cmd/containerd"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"
	_ "github.com/containerd/containerd/v2/cmd/ctr"
)
