// SPDX-License-Identifier: Apache-2.0

// Package typespb holds the network types of the kata-agent protocol. Generated from
// agent-protocol/proto by `make generate`.
package typespb
