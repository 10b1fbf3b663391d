// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
)

// volume is what PutVolume brought.
type volume struct {
	revision uint64
	files    map[string]File
	next     uint64 // revision that is being received
	archive  []byte // of it
}

// Volume is what is in place of a volume that PutVolume brought, by name in it as it
// was in the archive, with its revision. Nil: there is none.
func (a *Agent) Volume(path string) (map[string]File, uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if v := a.volumes[path]; v != nil && v.revision > 0 {
		return v.files, v.revision
	}
	return nil, 0
}

// Volumes are the paths of all volumes in place.
func (a *Agent) Volumes() (paths []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for p, v := range a.volumes {
		if v.revision > 0 {
			paths = append(paths, p)
		}
	}
	return paths
}

func (s extensionService) PutVolume(_ context.Context, r *podvmpb.PutVolumeRequest) (*podvmpb.PutVolumeResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	resp, err := s.put(r)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return resp, nil
}

// put does PutVolume; mu is held.
func (s extensionService) put(r *podvmpb.PutVolumeRequest) (*podvmpb.PutVolumeResponse, error) {
	if path.Dir(r.Path) != extension.VolumesDir || r.Revision == 0 || len(r.Data) > extension.MaxData {
		return nil, fmt.Errorf("path %q, revision %d, %d bytes: %w", r.Path, r.Revision, len(r.Data), errdefs.ErrInvalidArgument)
	}
	v := s.volumes[r.Path]
	if v == nil {
		v = &volume{}
		s.volumes[r.Path] = v
	}
	if r.Revision == v.revision {
		return &podvmpb.PutVolumeResponse{Offset: r.Offset + uint64(len(r.Data)), Done: true}, nil
	}
	if r.Revision < max(v.revision, v.next) {
		return nil, fmt.Errorf("revision %d came after %d: %w", r.Revision, max(v.revision, v.next), errdefs.ErrFailedPrecondition)
	}
	if r.Offset == 0 || r.Revision != v.next {
		v.next, v.archive = r.Revision, nil
	}
	if r.Offset != uint64(len(v.archive)) {
		return nil, fmt.Errorf("offset %d does not follow %d: %w", r.Offset, len(v.archive), errdefs.ErrOutOfRange)
	}
	v.archive = append(v.archive, r.Data...)
	have := uint64(len(v.archive))
	if !r.Eof {
		return &podvmpb.PutVolumeResponse{Offset: have}, nil
	}
	files, err := untar(v.archive)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	v.revision, v.files, v.next, v.archive = r.Revision, files, 0, nil
	return &podvmpb.PutVolumeResponse{Offset: have, Done: true}, nil
}

func (s extensionService) RemoveVolume(_ context.Context, r *podvmpb.RemoveVolumeRequest) (*podvmpb.RemoveVolumeResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.volumes, r.Path)
	return &podvmpb.RemoveVolumeResponse{}, nil
}

// untar reads an archive and checks the shape that PutVolume asks for.
func untar(archive []byte) (map[string]File, error) {
	files := map[string]File{}
	in := tar.NewReader(bytes.NewReader(archive))
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		f := File{Mode: uint32(h.Mode), UID: int32(h.Uid), GID: int32(h.Gid), Target: h.Linkname}
		switch h.Typeflag {
		case tar.TypeDir:
			f.Mode |= syscall.S_IFDIR
		case tar.TypeReg:
			f.Mode |= syscall.S_IFREG
		case tar.TypeSymlink:
			f.Mode |= syscall.S_IFLNK
		default:
			return nil, fmt.Errorf("entry %q has type %q", h.Name, h.Typeflag)
		}
		if f.Data, err = io.ReadAll(in); err != nil {
			return nil, err
		}
		files[path.Clean(h.Name)] = f
	}
	if files["."].Mode&syscall.S_IFMT != syscall.S_IFDIR {
		return nil, errors.New(`the archive has no directory "."`)
	}
	if data, ok := files["..data"]; ok {
		for name := range files {
			if first, _, _ := strings.Cut(name, "/"); first != "." && first != "..data" && first != data.Target {
				return nil, fmt.Errorf("entry %q is beside ..data, which names %q", name, data.Target)
			}
		}
	}
	return files, nil
}
