// SPDX-License-Identifier: Apache-2.0

// Package proto holds the protocol definitions. `make generate` makes the Go
// packages beside it from them; this package's test holds those to the table of
// the kata-agent protocol.
package proto
