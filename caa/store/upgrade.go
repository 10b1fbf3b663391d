// SPDX-License-Identifier: Apache-2.0

package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// Version is the layout this build writes.
const Version = 2

// upgrades holds at index n what brings layout n to n+1. They run in one
// transaction, one after the other, so that a file is of its old layout or of the
// present one and never between.
var upgrades = [Version]func(*bolt.Tx) error{
	0: upgrade0,
	1: upgrade1,
}

// upgrade0 adds the installation id. Version 0 was written by builds before the
// first release, which tagged instances with the node's name alone.
func upgrade0(tx *bolt.Tx) error {
	if _, err := tx.CreateBucketIfNotExists(bucketSandboxes); err != nil {
		return err
	}
	return tx.Bucket(bucketMeta).Put(keyInstallation, []byte(newInstallation()))
}

// upgrade1 makes a list of the tunnel of each record: pods may have several interfaces. A
// record that cannot be read stays as it is, for All to tell of.
func upgrade1(tx *bolt.Tx) error {
	b := tx.Bucket(bucketSandboxes)
	changed := map[string][]byte{}
	err := b.ForEach(func(k, v []byte) error {
		var rec map[string]json.RawMessage
		if json.Unmarshal(v, &rec) != nil || rec["tunnel"] == nil {
			return nil
		}
		rec["tunnels"] = slices.Concat([]byte("["), rec["tunnel"], []byte("]"))
		delete(rec, "tunnel")
		out, err := json.Marshal(rec)
		changed[string(k)] = out
		return err
	})
	if err != nil {
		return err
	}
	for k, v := range changed { // a bucket must not change under ForEach
		if err := b.Put([]byte(k), v); err != nil {
			return err
		}
	}
	return nil
}

// upgrade copies the file aside and brings it up to Version.
func (s *Store) upgrade(from byte) error {
	if err := s.backup(fmt.Sprintf("%s.v%d.bak", s.path, from)); err != nil {
		return err
	}
	return s.db.Update(func(tx *bolt.Tx) error {
		for v := from; v < Version; v++ {
			if err := upgrades[v](tx); err != nil {
				return fmt.Errorf("from version %d to %d: %w", v, v+1, err)
			}
		}
		return tx.Bucket(bucketMeta).Put(keyVersion, []byte{Version})
	})
}

// backup writes a consistent copy of the file, whole or not at all.
func (s *Store) backup(path string) (err error) {
	tmp := path + ".new"
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("back up to %s: %w", path, err), os.RemoveAll(tmp))
		}
	}()
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = s.db.View(func(tx *bolt.Tx) error {
		_, err := tx.WriteTo(f)
		return err
	})
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
