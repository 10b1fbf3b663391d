//go:build tools

package tools

import (
	_ "github.com/kubernetes-sigs/cri-tools/cmd/crictl"
	_ "github.com/kubernetes-sigs/cri-tools/cmd/critest"
)
