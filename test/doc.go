// SPDX-License-Identifier: Apache-2.0

// Package test holds what is true of the tree as a whole: who may import whom, that
// every package says what it is, that no file outgrew its reader. The folders below
// it drive the built programs: testbed makes a worker node out of namespaces,
// e2e runs pods on it, demo narrates the same, bench measures.
package test
