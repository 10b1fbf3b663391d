// SPDX-License-Identifier: Apache-2.0

// Package store keeps the adaptor's records on disk: one bbolt file,
// <state-dir>/adaptor.db, mode 0600 in a directory of mode 0700, because records
// hold the keys to running pods.
//
//	adaptor.db
//	├── meta
//	│   ├── version        one byte: layout of the file (2)
//	│   └── installation   32 hex digits: made once, tells this file's instances
//	│                      from those of any other
//	└── sandboxes
//	    └── <sandbox id>   a Record as JSON
//
// A file of an older layout is copied to adaptor.db.v<N>.bak and then brought up
// in one transaction. A file that cannot be read is left alone: it may be all that
// names virtual machines that somebody pays for. Every write is on disk when it
// returns. See docs/state-file.md.
package store

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// FileName is the name of the file in the state directory.
const FileName = "adaptor.db"

// lockTimeout is how long to wait for another holder of the file: enough for an
// adaptor that is just exiting to close it, short enough that a mistake is reported
// while somebody is looking.
const lockTimeout = time.Second

var (
	bucketMeta      = []byte("meta")
	bucketSandboxes = []byte("sandboxes")
	keyVersion      = []byte("version")
	keyInstallation = []byte("installation")
)

// Store is an open file. It is safe for concurrent use.
type Store struct {
	db           *bolt.DB
	path         string
	installation string
}

// Open opens the file in dir, makes it (and dir) where there is none, and brings an
// older layout up to date. FailedPrecondition: another process has the file, or it
// is of a newer version. DataLoss: it cannot be read. The texts say what to do.
func Open(ctx context.Context, dir string) (*Store, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("close the state directory to others: %w", err)
	}
	path := filepath.Join(dir, FileName)
	if err := create(path); err != nil {
		return nil, err
	}
	db, err := open(path)
	if err != nil {
		return nil, err
	}
	s := &Store{db: db, path: path}
	if err := s.prepare(); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return s, nil
}

// create makes an empty file of the present layout unless there is one. It is built
// under another name and linked into place whole, so that a file that exists is
// never one that was left half-made: an empty adaptor.db is damage, not a start.
func create(path string) error {
	if _, err := os.Lstat(path); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), FileName+".new-*")
	if err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	tmp := f.Name()
	defer os.Remove(tmp)
	if err := f.Close(); err != nil {
		return err
	}
	db, err := bolt.Open(tmp, 0o600, nil)
	if err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	err = errors.Join(db.Update(initialise), db.Close())
	if err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	if err := os.Link(tmp, path); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make %s: %w", path, err)
	}
	return syncDir(filepath.Dir(path))
}

func initialise(tx *bolt.Tx) error {
	meta, err := tx.CreateBucket(bucketMeta)
	if err != nil {
		return err
	}
	if _, err := tx.CreateBucket(bucketSandboxes); err != nil {
		return err
	}
	if err := meta.Put(keyInstallation, []byte(newInstallation())); err != nil {
		return err
	}
	return meta.Put(keyVersion, []byte{Version})
}

func newInstallation() string {
	var b [16]byte
	rand.Read(b[:]) // never fails (crypto/rand, Go 1.24)
	return hex.EncodeToString(b[:])
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}

// open opens the bbolt file and reads all of it once, so that damage shows now and
// not under a running pod.
func open(path string) (db *bolt.DB, err error) {
	if fi, err := os.Stat(path); err != nil {
		return nil, err
	} else if fi.Size() == 0 {
		return nil, corrupt(path, errors.New("it is empty"))
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, fmt.Errorf("close the database to others: %w", err)
	}
	// A truncated file makes bbolt's memory map fault, and a damaged page makes
	// it panic; both become an error here.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			db, err = nil, corrupt(path, fmt.Errorf("%v", p))
		}
	}()
	db, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: lockTimeout})
	switch {
	case errors.Is(err, bolt.ErrTimeout):
		return nil, errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf(
			"another process has %s open: a second adaptor must have a --state-dir (and --socket and --pods-dir) of its own", path))
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("open %s: %w", path, err)
	case err != nil:
		return nil, corrupt(path, err)
	}
	err = db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error {
				touch(k)
				touch(v)
				return nil
			})
		})
	})
	if err != nil {
		return nil, corrupt(path, errors.Join(err, db.Close()))
	}
	return db, nil
}

// touch reads every byte, so that one that is not there faults.
func touch(b []byte) (sum byte) {
	for _, c := range b {
		sum ^= c
	}
	return sum
}

func corrupt(path string, cause error) error {
	return errdefs.ErrDataLoss.WithMessage(fmt.Sprintf(
		"the state file %s is damaged (%v): put a backup in its place, or, when there is none, move it away and delete this node's pod VMs by hand, because nothing else knows of them",
		path, cause))
}

// prepare checks the layout's version and upgrades the file.
func (s *Store) prepare() error {
	version, err := s.version()
	if err != nil {
		return err
	}
	if version > Version {
		return errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf(
			"the state file %s is of version %d and this adaptor knows versions up to %d: run the newer adaptor that wrote it, or restore %s.v%d.bak",
			s.path, version, Version, s.path, Version))
	}
	if version < Version {
		if err := s.upgrade(version); err != nil {
			return fmt.Errorf("upgrade %s from version %d: %w", s.path, version, err)
		}
	}
	return s.db.View(func(tx *bolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		if tx.Bucket(bucketSandboxes) == nil {
			return corrupt(s.path, errors.New("it has no bucket of sandboxes"))
		}
		s.installation = string(meta.Get(keyInstallation))
		if s.installation == "" {
			return corrupt(s.path, errors.New("it has no installation id"))
		}
		return nil
	})
}

func (s *Store) version() (version byte, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		if meta == nil {
			return corrupt(s.path, errors.New("it is a bbolt file, but not the adaptor's"))
		}
		v := meta.Get(keyVersion)
		if len(v) != 1 {
			return corrupt(s.path, fmt.Errorf("its version is %x, want one byte", v))
		}
		version = v[0]
		return nil
	})
	return version, err
}

// Installation is an id made with the file: instances tagged with it were asked for
// by the holder of this file.
func (s *Store) Installation() string { return s.installation }

// Path is the file.
func (s *Store) Path() string { return s.path }

// Close releases the file. It waits for transactions under way.
func (s *Store) Close() error { return s.db.Close() }

// All returns every record, and for those that cannot be understood an error by
// sandbox id: one bad record does not take the node down.
func (s *Store) All() ([]Record, map[string]error, error) {
	var (
		records []Record
		broken  = map[string]error{}
	)
	err := s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketSandboxes).ForEach(func(k, v []byte) error {
			var r Record
			if err := json.Unmarshal(v, &r); err != nil {
				broken[string(k)] = fmt.Errorf("record of sandbox %s in %s: %w", k, s.path, err)
				return nil
			}
			if r.ID != string(k) {
				broken[string(k)] = fmt.Errorf("record of sandbox %s in %s says it is of sandbox %q", k, s.path, r.ID)
				return nil
			}
			records = append(records, r)
			return nil
		})
	})
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", s.path, err)
	}
	return records, broken, nil
}

// Put writes a record in place of the one of its id. It is on disk when Put returns
// nil.
func (s *Store) Put(r Record) error {
	if r.ID == "" {
		return errdefs.ErrInvalidArgument.WithMessage("a record without a sandbox id")
	}
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write the record of sandbox %s: %w", r.ID, err)
	}
	err = s.db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketSandboxes).Put([]byte(r.ID), b)
	})
	if err != nil {
		return fmt.Errorf("write the record of sandbox %s to %s: %w", r.ID, s.path, err)
	}
	return nil
}

// Delete removes the record of id. None there is not an error.
func (s *Store) Delete(id string) error {
	err := s.db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketSandboxes).Delete([]byte(id))
	})
	if err != nil {
		return fmt.Errorf("remove the record of sandbox %s from %s: %w", id, s.path, err)
	}
	return nil
}
