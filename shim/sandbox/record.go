// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// RecordName is the file in the sandbox's bundle that says which pod VM it has. It
// is written before the adaptor is asked for one, so that `delete`, which may run
// when the shim is dead, knows what to give back.
const RecordName = "peerpod.json"

// recordVersion is the version of the record's format.
const recordVersion = 1

// Record is what `delete` needs to know. The file has mode 0600 and holds no secret.
type Record struct {
	Version int `json:"version"`
	// Sandbox is the id the adaptor knows the pod VM by.
	Sandbox string `json:"sandbox"`
	// Socket is the adaptor's.
	Socket string `json:"socket"`
}

// Write writes the record durably.
func (r Record) Write(dir string) error {
	return writeJSON(filepath.Join(dir, RecordName), r)
}

func writeJSON(path string, v any) (err error) {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// ReadRecord reads the record of a bundle. fs.ErrNotExist: the bundle is not a
// sandbox's, or no pod VM was asked for.
func ReadRecord(dir string) (Record, error) { return readRecord(filepath.Join(dir, RecordName)) }

func readRecord(path string) (Record, error) {
	var r Record
	b, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	if r.Version != recordVersion || r.Sandbox == "" || r.Socket == "" {
		return r, fmt.Errorf("%s: version %d is not one this shim can read, or a field is empty", path, r.Version)
	}
	return r, nil
}

// Pending stops. containerd removes a bundle, and the record with it, whether or
// not the adaptor could be told. A stop that could not be delivered is therefore
// left in a directory beside the adaptor's socket, one record per file, from where
// the next shim on the node delivers it (and an adaptor may, when it starts).

func pendingDir(socket string) string { return filepath.Join(filepath.Dir(socket), "stop") }

// Defer leaves a stop to be delivered later.
func (r Record) Defer() error {
	dir := pendingDir(r.Socket)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return writeJSON(filepath.Join(dir, r.Sandbox+".json"), r)
}

// Release gives the pod VM of a record back: at once, or by leaving word where it
// will be found. Only when neither works is there an error.
func (r Record) Release(ctx context.Context) error {
	err := Hypervisor{r.Socket}.StopVM(ctx, r.Sandbox)
	if err == nil {
		return nil
	}
	if derr := r.Defer(); derr != nil {
		return errors.Join(err, fmt.Errorf("leave word for the adaptor: %w", derr))
	}
	return nil
}

// DeliverPending delivers the stops left beside the adaptor's socket.
func DeliverPending(ctx context.Context, socket string) error {
	entries, err := os.ReadDir(pendingDir(socket))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(pendingDir(socket), e.Name())
		r, rerr := readRecord(path)
		if rerr != nil || r.Socket != socket {
			if rerr != nil && !errors.Is(rerr, fs.ErrNotExist) && e.Name()[0] != '.' {
				err = errors.Join(err, rerr)
			}
			continue
		}
		sctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		serr := Hypervisor{socket}.StopVM(sctx, r.Sandbox)
		cancel()
		if serr == nil {
			serr = os.Remove(path)
		}
		err = errors.Join(err, serr)
	}
	return err
}
