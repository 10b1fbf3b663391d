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
)

// Label is the volume label of a NoCloud disk, compared without case.
// https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html
const Label = "cidata"

// diskPatterns are the disks that may hold the seed: virtio, SCSI or SATA, CD.
var diskPatterns = []string{"vd*", "sd*", "sr*"}

const (
	// DefaultSeedWait bounds the wait for the disk to appear. Disks are there when
	// their driver's module has been loaded, except on slow SCSI controllers.
	DefaultSeedWait = 10 * time.Second
	// seedPoll is the time between two looks for the disk.
	seedPoll = 10 * time.Millisecond
)

// NoCloud reads the seed from an ISO 9660 disk labelled cidata.
type NoCloud struct {
	Sys  string        // directory that lists block devices; empty: /sys/block
	Dev  string        // directory of the device nodes; empty: /dev
	Wait time.Duration // for the disk to appear; 0: DefaultSeedWait, negative: look once
}

// Name says what the source is.
func (NoCloud) Name() string { return "NoCloud disk" }

// Seed finds the disk and reads it. NotFound: no disk has the label.
func (n NoCloud) Seed(ctx context.Context) (*Seed, error) {
	if n.Sys == "" {
		n.Sys = "/sys/block"
	}
	if n.Dev == "" {
		n.Dev = "/dev"
	}
	if n.Wait == 0 {
		n.Wait = DefaultSeedWait
	}
	deadline := time.NewTimer(n.Wait)
	defer deadline.Stop()
	tick := time.NewTicker(seedPoll)
	defer tick.Stop()
	for {
		seed, seen, err := n.look()
		if seed != nil || err != nil {
			return seed, err
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			return nil, fmt.Errorf("no disk with label %s (looked at: %s): %w", Label, strings.Join(seen, " "), errdefs.ErrNotFound)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// look reads the first disk with the label, and returns the names of all disks.
func (n NoCloud) look() (seed *Seed, seen []string, err error) {
	for _, pattern := range diskPatterns {
		found, err := filepath.Glob(filepath.Join(n.Sys, pattern))
		if err != nil {
			return nil, nil, err
		}
		slices.Sort(found)
		for _, f := range found {
			name := filepath.Base(f)
			seen = append(seen, name)
			seed, err := readDisk(filepath.Join(n.Dev, name))
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
func readDisk(path string) (*Seed, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // listed before its node was made: the next look sees it
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	v, err := readISO(f)
	if errors.Is(err, errNotISO) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !strings.EqualFold(v.label, Label) {
		return nil, nil
	}
	var s Seed
	for name, doc := range map[string]*[]byte{"user-data": &s.UserData, "meta-data": &s.MetaData, "network-config": &s.NetworkConfig} {
		if *doc, err = v.read(f, name); err != nil {
			return nil, err
		}
	}
	if s.UserData == nil {
		return nil, errors.New("it has no file user-data")
	}
	return &s, nil
}
