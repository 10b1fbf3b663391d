// SPDX-License-Identifier: Apache-2.0

package local

import "fmt"

// seedFiles are the files of a NoCloud seed (cloud-init documentation,
// "NoCloud" and "Networking config version 2").
func seedFiles(r *record, mtu int, userData []byte) map[string][]byte {
	return map[string][]byte{
		"user-data": userData,
		"meta-data": fmt.Appendf(nil, "instance-id: %s\nlocal-hostname: %s\n", r.ID, r.Name),
		"network-config": fmt.Appendf(nil, `version: 2
ethernets:
  id0:
    match:
      macaddress: "%s"
    addresses:
    - "%s"
    mtu: %d
`, r.MAC, r.Addr, mtu),
	}
}

// seedLabel is the volume label by which a guest finds the seed.
const seedLabel = "cidata"
