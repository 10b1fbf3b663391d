// SPDX-License-Identifier: Apache-2.0

// Package sandboxpb has the messages of containerd's Sandbox API, service
// containerd.runtime.sandbox.v1.Sandbox, and of the CRI's PodSandboxConfig that
// CreateSandbox carries, with the fields that the shim uses. containerd's own
// package would link a gRPC server, the CRI's one Kubernetes, into the process of
// every pod. service's tests hold the former to each other, field by field; the latter
// is held to what a real containerd sends by the end to end tests.
package sandboxpb
