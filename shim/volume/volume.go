// SPDX-License-Identifier: Apache-2.0

// Package volume gives a container in the guest the volumes that containerd's spec
// binds from the node. Node and guest share no file system, so each kind of volume
// needs its own way (docs/volumes.md):
//
//   - KindFollowed: a ConfigMap, Secret, projected or downward volume: sent whole,
//     once for all containers of the pod, and again whenever the kubelet has changed
//     it (follow.go).
//   - KindTree: a directory that is only read: copied when the container is made.
//   - KindFile: a single file such as /etc/hosts: copied likewise. The container's
//     termination log is one, and comes back (package container).
//   - KindLocal, KindMemory: an emptyDir: made in the guest, once per pod; or a part
//     of one, a subPath.
//   - KindShm: the pod's /dev/shm: made in the guest with the sandbox.
//   - KindNone: a mount that names nothing of the node (proc, tmpfs, ...): passed on.
//
// Everything else cannot be had in a pod VM, and a copy that looks like it would
// silently lose what is written: it is an error that names the volume.
//
// A Set is what one pod has. A container's volumes are held from Plan to Release:
//
//	Plan --(looks at the node)--> held --Bring--> in the guest --Release--> given back
package volume

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"sync"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/shim/guest"
)

// Kind is how a mount reaches the guest.
type Kind int

const (
	KindNone     Kind = iota // as it is
	KindFile                 // a file, copied
	KindTree                 // a directory, copied
	KindFollowed             // a directory, copied and kept up to date
	KindLocal                // a directory of the guest, shared by the pod's containers
	KindMemory               // a tmpfs of the guest, shared by the pod's containers
	KindShm                  // the pod's shared memory
)

const (
	// sharedDir is where a kata-agent accepts files (kata-containers 4.1, virtcontainers/fs_share_linux.go).
	sharedDir = "/run/kata-containers/shared/containers"
	// ephemeralDir is where kata's runtimes put tmpfs volumes (virtcontainers/kata_agent.go).
	ephemeralDir = "/run/kata-containers/sandbox/ephemeral"
	// subPathDir is where our agent binds parts of them.
	subPathDir = "/run/kata-containers/sandbox/subpaths"
	// ShmPath is where CreateSandbox's storage puts the pod's shared memory.
	ShmPath = "/run/kata-containers/sandbox/shm"
)

// Volume is one mount of a spec and how it reaches the guest.
type Volume struct {
	Kind Kind
	// Mount is the spec's.
	Mount specs.Mount
	// GuestPath is what the guest binds; empty for KindNone.
	GuestPath string

	dir      *emptyDir // KindLocal, KindMemory
	follower *follower // KindFollowed
}

// Set is the volumes of one pod. It is safe for concurrent use.
type Set struct {
	sandbox string
	run     context.Context // of the set's goroutines
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	watcher *watcher

	mu        sync.Mutex // guards the fields below; never held over a call
	closed    bool
	serial    int                  // makes paths in the guest unique
	followers map[string]*follower // by path on the node
	held      map[string]*holding  // by container
	seeded    map[string]bool      // emptyDirs whose content on the node was copied
}

// holding is what a container holds.
type holding struct {
	followers []*follower
	paths     []string // of copies that are its own
	conn      *guest.Conn
	put       bool // they were brought with PutVolume
}

// NewSet returns the volumes of a sandbox: none yet. Close ends what it starts.
func NewSet(sandbox string) *Set {
	run, cancel := context.WithCancel(context.Background())
	return &Set{
		sandbox: sandbox, run: run, cancel: cancel, watcher: &watcher{},
		followers: map[string]*follower{}, held: map[string]*holding{}, seeded: map[string]bool{},
	}
}

// Close ends the following of volumes and waits for its end. The guest keeps what it
// has: it goes with the pod.
func (s *Set) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
	s.watcher.close()
}

// Plan is what becomes of a spec's mounts.
type Plan struct {
	Volumes []Volume
	// TerminationSource is the node's file that takes the termination message, and
	// TerminationPath its path in the container; empty: none.
	TerminationSource, TerminationPath string

	set       *Set
	container string
	features  extension.Set
}

// Request says what volumes a container is to have.
type Request struct {
	Container string
	Mounts    []specs.Mount
	// Annotations are the spec's.
	Annotations map[string]string
	Features    extension.Set
}

// Plan looks at every mount of a container's spec. What cannot be honoured is
// InvalidArgument. Nothing is sent yet, but what the container will use is held for
// it until Release.
func (s *Set) Plan(r Request) (*Plan, error) {
	p := &Plan{set: s, container: r.Container, features: r.Features}
	h := &holding{put: r.Features.Has(extension.Volumes)}
	node := &node{annotations: r.Annotations}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[r.Container] = h
	var files string
	for i, m := range r.Mounts {
		v, err := classify(node, m, r.Features)
		if err != nil {
			return nil, fmt.Errorf("volume at %s: %w", m.Destination, err)
		}
		base := strconv.Itoa(i) + "-" + filepath.Base(m.Destination)
		switch v.Kind {
		case KindFollowed:
			v.follower = s.follow(m.Source, h)
			v.GuestPath = v.follower.path
		case KindTree:
			v.GuestPath = s.guestPath(h, base)
			h.paths = append(h.paths, v.GuestPath)
		case KindFile:
			if files == "" {
				files = s.guestPath(h, "files")
				h.paths = append(h.paths, files)
			}
			v.GuestPath = filepath.Join(files, base)
			if terminationRE.MatchString(m.Source) {
				p.TerminationSource, p.TerminationPath = m.Source, m.Destination
			}
		case KindLocal, KindMemory:
			v.GuestPath = v.dir.guestPath(v.Kind, s.sandbox)
			if v.dir.sub != "" {
				v.GuestPath = filepath.Join(subPathDir, r.Container+"-"+strconv.Itoa(i))
			}
		case KindShm:
			v.GuestPath = ShmPath
		}
		p.Volumes = append(p.Volumes, v)
	}
	return p, nil
}

// guestPath is a place in the guest that nothing had before. mu is held.
func (s *Set) guestPath(h *holding, name string) string {
	s.serial++
	name = strconv.Itoa(s.serial) + "-" + safeName(name)
	if h.put {
		return filepath.Join(extension.VolumesDir, name)
	}
	return filepath.Join(sharedDir, s.sandbox+"-"+name)
}

// safeName leaves of a name what every agent takes.
func safeName(name string) string {
	b := []byte(name[:min(len(name), 64)])
	for i, c := range b {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.') {
			b[i] = '_'
		}
	}
	return string(b)
}

// follow finds the follower of a directory or makes one, and has h hold it. mu is held.
func (s *Set) follow(source string, h *holding) *follower {
	f := s.followers[source]
	if f == nil {
		f = newFollower(source, s.guestPath(h, filepath.Base(source)))
		s.followers[source] = f
	}
	f.refs++
	h.followers = append(h.followers, f)
	return f
}

// Mounts is the spec's mount list with the guest's sources.
func (p *Plan) Mounts() []specs.Mount {
	var out []specs.Mount
	for _, v := range p.Volumes {
		m := v.Mount
		if v.GuestPath != "" {
			m.Source = v.GuestPath
		}
		if v.Kind == KindShm {
			m.Type = "bind"
		}
		out = append(out, m)
	}
	return out
}

// Bring brings the container's volumes into the guest: what is copied is there when
// it returns, and what is followed is there as it was on the node when it was called
// or later.
func (p *Plan) Bring(ctx context.Context, conn *guest.Conn) error {
	s := p.set
	s.mu.Lock()
	h := s.held[p.container]
	if h == nil || s.closed {
		s.mu.Unlock()
		return fmt.Errorf("volumes of container %s: %w", p.container, guest.ErrDead)
	}
	h.conn = conn
	for _, f := range h.followers {
		if f.stop == nil {
			var ctx context.Context
			ctx, f.stop = context.WithCancel(s.run)
			out := newSender(conn, h.put, f.path)
			s.wg.Go(func() { f.run(ctx, s.watcher, out) })
		}
	}
	s.mu.Unlock()
	// All at once: each is a round trip or a few.
	var tasks []func() error
	if task := p.files(ctx, conn); task != nil {
		tasks = append(tasks, task)
	}
	for _, v := range p.Volumes {
		switch v.Kind {
		case KindTree:
			tasks = append(tasks, v.explain(func() error { return bringTree(ctx, conn, p.put(), v.Mount.Source, v.GuestPath) }))
		case KindFollowed:
			tasks = append(tasks, v.explain(func() error { return v.follower.sync(ctx) }))
		case KindLocal, KindMemory:
			if v.dir.content {
				tasks = append(tasks, v.explain(func() error { return s.seed(ctx, conn, v) }))
			}
		}
	}
	errs := make([]error, len(tasks))
	var wg sync.WaitGroup
	for i, task := range tasks {
		wg.Go(func() { errs[i] = task() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (p *Plan) put() bool { return p.features.Has(extension.Volumes) }

// explain has an error name the volume.
func (v Volume) explain(f func() error) func() error {
	return func() error {
		if err := f(); err != nil {
			return fmt.Errorf("volume at %s: bring %s to the pod VM: %w", v.Mount.Destination, v.Mount.Source, err)
		}
		return nil
	}
}

// Release gives back what a container held. What nobody holds any more is removed
// from the guest in the background.
func (s *Set) Release(container string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.held[container]
	delete(s.held, container)
	if h == nil {
		return
	}
	remove := h.paths
	var ending []*follower
	for _, f := range h.followers {
		if f.refs--; f.refs > 0 {
			continue
		}
		delete(s.followers, f.source)
		if f.stop != nil {
			f.stop()
			ending = append(ending, f)
			remove = append(remove, f.path)
		}
	}
	// A stock agent has no call for it: what it has goes with the pod.
	if s.closed || h.conn == nil || !h.put || len(remove) == 0 {
		return
	}
	s.wg.Go(func() {
		for _, f := range ending {
			<-f.ended // what it sends must not come after the removal
		}
		for _, path := range remove {
			err := h.conn.PodVM(s.run, func(ctx context.Context, vm podvmpb.PodVMClient) error {
				_, err := vm.RemoveVolume(ctx, &podvmpb.RemoveVolumeRequest{Path: path})
				return err
			})
			if err != nil && s.run.Err() == nil && !errors.Is(err, guest.ErrDead) {
				log.G(s.run).WithError(err).WithField(logkey.Volume, path).Warn("volume was not removed from the pod VM")
			}
		}
	})
}

// propagates tells whether a mount asks for mount propagation.
func propagates(m specs.Mount) bool {
	return slices.ContainsFunc(m.Options, func(o string) bool {
		return slices.Contains([]string{"rslave", "slave", "rshared", "shared"}, o)
	})
}
