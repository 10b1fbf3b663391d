// SPDX-License-Identifier: Apache-2.0

// Package local is the provider that needs no cloud: each instance is a QEMU
// process on this node.
//
// What an instance consists of, in the order it is made:
//
//	<StateDir>/instances/<id>/instance.json  the record, on disk before all else
//	                          seed.iso       NoCloud seed: user data, static address; mode 0600
//	bridge, neighbour entry, tap             the VM's network; the tap is held by QEMU
//	                                         alone and vanishes with it
//	qemu-system-x86_64                       a session of its own: it outlives us
//	<StateDir>/instances/<id>/qmp            its control socket
//	                          serial.log     what the kernel and init print
//	                          qemu.log       what QEMU itself prints
//	<StateDir>/logs/<name>-<id>.log          the serial logs of the last VMs that ended
//
// <id> is derived from the token, so that one token can only ever name one
// directory. A step is safe to repeat; a Create that was interrupted is carried
// on by the next Create with its token, or removed by Delete. Delete goes the
// other way and removes the record last, so that what exists always has a record.
//
// Nothing is kept in memory: any number of providers over one StateDir, in one
// process or in several, see the same instances. Two locks order them, both with
// flock(2): <StateDir>/lock for deciding who gets which address and how much
// memory, and for the bridge; a lock in the instance's directory for making and
// removing that instance. Neither is held while a VM boots.
//
// The bridge is made for the first instance and removed with the last.
package local
