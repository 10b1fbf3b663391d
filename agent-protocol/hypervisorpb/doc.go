// SPDX-License-Identifier: Apache-2.0

// Package hypervisorpb is the remote hypervisor protocol between shim and adaptor.
// Generated from agent-protocol/proto by `make generate`.
package hypervisorpb
