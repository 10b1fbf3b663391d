// SPDX-License-Identifier: Apache-2.0

//go:build tools

// Package kube pins the Kubernetes that is tested with: its servers and etcd (command
// kube-all), its test image's program agnhost, its own test suite e2e.test, and the
// ginkgo that runs the suite in several processes. It is a module of its own because
// Kubernetes' modules replace each other, and the product links none of them.
package kube

import (
	_ "github.com/onsi/ginkgo/v2/ginkgo"
	_ "k8s.io/kubernetes/test/e2e"
	_ "k8s.io/kubernetes/test/images/agnhost"
)
