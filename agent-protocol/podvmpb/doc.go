// SPDX-License-Identifier: Apache-2.0

// Package podvmpb is the extension service between our shim and our agent.
// Generated from agent-protocol/proto by `make generate`.
package podvmpb
