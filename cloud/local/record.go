// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/cloud"
)

// record is what an instance is, on disk. Version 1.
type record struct {
	Version     int               `json:"version"`
	ID          cloud.InstanceID  `json:"id"`
	Token       string            `json:"token"`
	Fingerprint string            `json:"fingerprint"` // of the request; no user data is kept here
	Name        string            `json:"name"`
	SandboxID   string            `json:"sandbox_id"`
	Owner       cloud.Owner       `json:"owner"`
	Tags        map[string]string `json:"tags,omitempty"`
	Plan        cloud.Plan        `json:"plan"`
	CreatedAt   time.Time         `json:"created_at"`
	BootID      string            `json:"boot_id"` // of the node, when QEMU was started

	Addr   netip.Prefix `json:"addr"`
	MAC    string       `json:"mac"`
	Tap    string       `json:"tap"`
	Bridge string       `json:"bridge"`

	Accel    Accel   `json:"accel,omitempty"`
	Process  process `json:"process"`            // zero until QEMU was started
	Deleting bool    `json:"deleting,omitempty"` // Delete has begun and must be finished
}

const recordVersion = 1

var idRule = regexp.MustCompile(`^pp-[0-9a-f]{16}$`)

// idOf derives the ID from the token: the same token names the same directory.
func idOf(token string) cloud.InstanceID {
	sum := sha256.Sum256([]byte(token))
	return cloud.InstanceID("pp-" + hex.EncodeToString(sum[:8]))
}

func (p *Provider) instancesDir() string { return filepath.Join(p.cfg.StateDir, "instances") }

func (p *Provider) dir(id cloud.InstanceID) string {
	return filepath.Join(p.instancesDir(), string(id))
}

// load reads a record. NotFound: there is none.
func (p *Provider) load(id cloud.InstanceID) (*record, error) {
	if !idRule.MatchString(string(id)) {
		return nil, fmt.Errorf("instance %q: %w", id, errdefs.ErrNotFound)
	}
	b, err := os.ReadFile(filepath.Join(p.dir(id), recordName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("instance %q: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("instance %q: %w", id, err)
	}
	r := &record{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("instance %q: record is damaged: %w", id, err)
	}
	if r.Version != recordVersion || r.ID != id {
		return nil, fmt.Errorf("instance %q: record is of version %d and instance %q, want version %d", id, r.Version, r.ID, recordVersion)
	}
	return r, nil
}

// loadAll reads all records; those that cannot be read come back by id, so that
// one damaged file does not hide the others.
func (p *Provider) loadAll() ([]*record, map[cloud.InstanceID]error, error) {
	entries, err := os.ReadDir(p.instancesDir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	var out []*record
	broken := map[cloud.InstanceID]error{}
	for _, e := range entries {
		id := cloud.InstanceID(e.Name())
		if !idRule.MatchString(e.Name()) {
			continue
		}
		r, err := p.load(id)
		switch {
		case err == nil:
			out = append(out, r)
		case !errdefs.IsNotFound(err):
			broken[id] = err
		}
	}
	return out, broken, nil
}

// store writes the record so that a crash leaves either the old one or the new.
func (p *Provider) store(r *record) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(p.dir(r.ID), recordName), append(b, '\n'))
}

// newSuffix is on a file that is being written; one that stays was never finished.
const newSuffix = ".new"

// writeFile replaces path atomically and durably; mode 0600.
func writeFile(path string, data []byte) error {
	tmp := path + newSuffix
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lockPoll is the pause between tries for a lock. flock cannot wait on a context;
// the locks are held for milliseconds, and the start path allows polls up to 20 ms.
const lockPoll = 2 * time.Millisecond

// lock takes the exclusive lock at path and returns its release. flags is
// os.O_CREATE to make the file, 0 to leave it at fs.ErrNotExist.
func lock(ctx context.Context, path string, flags int) (func(), error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(path, os.O_RDWR|flags, 0o600)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && sameFile(f, path) {
			return func() { _ = f.Close() }, nil // closing the only descriptor unlocks
		}
		_ = f.Close()
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if err := cloud.Pause(ctx, lockPoll); err != nil {
			return nil, err
		}
	}
}

// sameFile is false when the file was removed, or replaced, while we waited.
func sameFile(f *os.File, path string) bool {
	a, errA := f.Stat()
	b, errB := os.Stat(path)
	return errA == nil && errB == nil && os.SameFile(a, b)
}

// lockState takes the lock that orders decisions over all instances.
func (p *Provider) lockState(ctx context.Context) (func(), error) {
	if err := os.MkdirAll(p.instancesDir(), 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	return lock(ctx, filepath.Join(p.cfg.StateDir, lockName), os.O_CREATE)
}

// lockInstance takes the lock of one instance. NotFound: it is gone.
func (p *Provider) lockInstance(ctx context.Context, id cloud.InstanceID) (func(), error) {
	if !idRule.MatchString(string(id)) {
		return nil, fmt.Errorf("instance %q: %w", id, errdefs.ErrNotFound)
	}
	unlock, err := lock(ctx, filepath.Join(p.dir(id), lockName), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("instance %q: %w", id, errdefs.ErrNotFound)
	}
	return unlock, err
}

func (r *record) mac() (net.HardwareAddr, error) { return net.ParseMAC(r.MAC) }

// macOf makes a locally administered address out of the VM's last three bytes.
func macOf(a netip.Addr) net.HardwareAddr {
	b := a.AsSlice()
	return append(net.HardwareAddr{0x02, 0x70, 0x70}, b[len(b)-3:]...)
}
