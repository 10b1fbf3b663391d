// SPDX-License-Identifier: Apache-2.0

//go:build tools

// Package cri pins crictl and critest. It is a module of its own because theirs calls
// itself by another name than the one it is published under, and because it needs an
// older Kubernetes than anything else here.
package cri

import (
	_ "github.com/kubernetes-sigs/cri-tools/cmd/crictl"
	_ "github.com/kubernetes-sigs/cri-tools/cmd/critest"
	_ "github.com/onsi/ginkgo/v2/ginkgo"
)
