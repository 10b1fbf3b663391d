// SPDX-License-Identifier: Apache-2.0

// Package extension names the parts of the extension service (podvmpb.PodVM) as an
// agent advertises them, and the limits both of its ends keep. docs/extension.md
// describes the service.
package extension

import "slices"

// Feature is one ability of the extension service. An agent lists those it has in
// GetGuestDetails, agent_details.extra_features; a runtime uses only those.
type Feature string

const (
	// Rootfs: PodVM.ImportRootfs.
	Rootfs Feature = "peerpod.rootfs.v1"
	// Streams: PodVM.ReadOutput and PodVM.WriteInput.
	Streams Feature = "peerpod.streams.v1"
	// Pause: CreateContainer without OCI.Root.Path, for the pod's sandbox container
	// alone (annotation.ContainerTypeSandbox under either runtime's key): the agent's
	// own program runs in place of an image's.
	Pause Feature = "peerpod.pause.v1"
	// Volumes: PodVM.PutVolume and PodVM.RemoveVolume, and the storage driver
	// SubPathDriver.
	Volumes Feature = "peerpod.volumes.v1"
	// Forward: PodVM.Forward.
	Forward Feature = "peerpod.forward.v1"
	// Notice: PodVM.WaitNotice. Advertised only in clouds that give notice.
	Notice Feature = "peerpod.notice.v1"
)

const (
	// MaxData is the most bytes of payload one message carries. ttrpc refuses
	// messages of more than 4 MiB (ttrpc 1.2, channel.go); a quarter of that
	// leaves room for the envelope and keeps one message from holding up the
	// others of its connection for long.
	MaxData = 1 << 20
	// ChunkSize is what an end sends at a time when it has a choice: large enough
	// that the cost of a message is lost in that of its bytes, small enough that a
	// call sent behind it waits well under a millisecond.
	ChunkSize = 128 << 10
	// Window is what an end grants the other by default. At a round trip of 1 ms
	// it allows 1 GB/s, far above what one TLS connection carries.
	Window = 1 << 20
)

const (
	// VolumesDir is the directory in the guest below which PutVolume's volumes are.
	VolumesDir = "/run/kata-containers/sandbox/volumes"
	// SubPathDriver is a storage driver that binds a file or directory inside another
	// storage to the storage's mount point. Source is the other storage's mount point,
	// the driver option "path=" what is to be bound, relative to it. No symbolic link
	// leads out of Source. What is missing is made, a directory with the options mode=,
	// uid= and gid=.
	SubPathDriver = "subpath"
)

// Set is what an agent advertised.
type Set []string

// Has tells whether the agent has the feature. The nil set has none.
func (s Set) Has(f Feature) bool { return slices.Contains(s, string(f)) }

// WithoutService are the features that need no call of the extension service.
func (s Set) WithoutService() Set {
	if s.Has(Pause) {
		return Set{string(Pause)}
	}
	return nil
}
