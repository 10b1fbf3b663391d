// SPDX-License-Identifier: Apache-2.0

// Package agentpb is the kata-agent protocol: AgentService, Health and the OCI
// messages they carry. Generated from agent-protocol/proto by `make generate`.
package agentpb
