// SPDX-License-Identifier: Apache-2.0

// Package vmnote is a note that says which pod VM a sandbox has and which adaptor it
// came from. A shim keeps one in the sandbox's bundle from before it asks for the
// VM, so that whoever cleans up after it knows what to give back. containerd removes
// a bundle whether or not the adaptor could be told; a note that could not be
// delivered is then left beside the adaptor's socket, where the adaptor looks when it
// starts and every few seconds, and every shim when it has reached the adaptor.
package vmnote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// version of the note's format.
const version = 1

// Note names a pod VM. It is written with mode 0600 and holds no secret.
type Note struct {
	// Sandbox is the id the adaptor knows the pod VM by.
	Sandbox string `json:"sandbox"`
	// Socket is the adaptor's.
	Socket string `json:"socket"`
}

// file is a note as it stands on disk.
type file struct {
	Version int `json:"version"`
	Note
}

// Write writes the note durably and whole.
func (n Note) Write(path string) (err error) {
	b, err := json.Marshal(file{version, n})
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

// Read reads a note. fs.ErrNotExist: there is none.
func Read(path string) (Note, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Note{}, err
	}
	var n file
	if err := json.Unmarshal(b, &n); err != nil {
		return Note{}, fmt.Errorf("%s: %w", path, err)
	}
	if n.Version != version || n.Sandbox == "" || n.Socket == "" {
		return Note{}, fmt.Errorf("%s: version %d is not %d, or a field is empty", path, n.Version, version)
	}
	return n.Note, nil
}

// dir is where notes for the adaptor at socket are left.
func dir(socket string) string { return filepath.Join(filepath.Dir(socket), "stop") }

// Leave leaves the note for its adaptor. Leaving it twice is leaving it once.
func (n Note) Leave() error {
	d := dir(n.Socket)
	if err := os.MkdirAll(d, 0o700); err != nil {
		return err
	}
	return n.Write(filepath.Join(d, filepath.Base(n.Sandbox)+".json"))
}

// stopTimeout bounds one delivery: StopVM answers at once.
const stopTimeout = 5 * time.Second

// Deliver hands every note left for the adaptor at socket to stop and removes those
// that it took. It goes on past errors and joins them. An unreadable note stays, for
// a person.
func Deliver(ctx context.Context, socket string, stop func(ctx context.Context, sandbox string) error) error {
	entries, err := os.ReadDir(dir(socket))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") { // one that is being written
			continue
		}
		path := filepath.Join(dir(socket), e.Name())
		n, err := Read(path)
		switch {
		case errors.Is(err, fs.ErrNotExist): // another was faster
			continue
		case err != nil:
			errs = append(errs, err)
			continue
		case n.Socket != socket:
			continue
		}
		sctx, cancel := context.WithTimeout(ctx, stopTimeout)
		err = stop(sctx, n.Sandbox)
		cancel()
		if err == nil {
			if err = os.Remove(path); errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
