// SPDX-License-Identifier: Apache-2.0

// Package adminpb is the protocol between peerpodctl and the adaptor. Generated from
// caa/adminpb/admin.proto by `make generate`.
package adminpb
