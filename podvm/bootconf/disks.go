// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// diskPatterns are the disks that may hold a seed: virtio, SCSI or SATA, CD.
var diskPatterns = []string{"vd*", "sd*", "sr*"}

const (
	// DefaultSeedWait bounds the wait for the disk to appear. Disks are there when
	// their driver's module has been loaded, except on slow SCSI controllers.
	DefaultSeedWait = 10 * time.Second
	// seedPoll is the time between two looks for the disk.
	seedPoll = 10 * time.Millisecond
)

// Disks says where a seed's disk is looked for, and how long.
type Disks struct {
	Sys  string        // directory that lists block devices; empty: /sys/block
	Dev  string        // directory of the device nodes; empty: /dev
	Wait time.Duration // for the disk to appear; 0: DefaultSeedWait, negative: look once
}

// find looks for the disk from which read makes a seed; it returns nil for one that is
// not meant. NotFound says what is missing, and which disks there are.
func (d Disks) find(ctx context.Context, missing string, read func(*os.File) (*Seed, error)) (*Seed, error) {
	if d.Sys == "" {
		d.Sys = "/sys/block"
	}
	if d.Dev == "" {
		d.Dev = "/dev"
	}
	if d.Wait == 0 {
		d.Wait = DefaultSeedWait
	}
	deadline := time.NewTimer(d.Wait)
	defer deadline.Stop()
	tick := time.NewTicker(seedPoll)
	defer tick.Stop()
	for {
		seed, seen, err := d.look(read)
		if seed != nil || err != nil {
			return seed, err
		}
		absent := fmt.Errorf("%s (looked at: %s): %w", missing, strings.Join(seen, " "), errdefs.ErrNotFound)
		select {
		case <-tick.C:
		case <-deadline.C:
			return nil, absent
		case <-ctx.Done():
			return nil, absent
		}
	}
}

// look reads the first disk that is meant, and returns the names of all disks.
func (d Disks) look(read func(*os.File) (*Seed, error)) (seed *Seed, seen []string, err error) {
	for _, pattern := range diskPatterns {
		found, err := filepath.Glob(filepath.Join(d.Sys, pattern))
		if err != nil {
			return nil, nil, err
		}
		slices.Sort(found)
		for _, f := range found {
			name := filepath.Base(f)
			seen = append(seen, name)
			seed, err := readDisk(filepath.Join(d.Dev, name), read)
			if err != nil {
				return nil, seen, fmt.Errorf("disk %s: %w", name, err)
			}
			if seed != nil {
				return seed, seen, nil
			}
		}
	}
	return nil, seen, nil
}

// readDisk reads a seed; nil when the disk is none.
func readDisk(path string, read func(*os.File) (*Seed, error)) (*Seed, error) {
	f, err := openDisk(path)
	if f == nil || err != nil {
		return nil, err
	}
	defer f.Close()
	return read(f)
}

// openDisk opens a disk; nil when there is none, or nothing in the drive.
func openDisk(path string) (*os.File, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOMEDIUM) {
		return nil, nil // listed before its node was made, or its medium put in: the next look sees it
	}
	return f, err
}
