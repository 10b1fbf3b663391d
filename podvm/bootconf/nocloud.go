// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
)

// Label is the volume label of a NoCloud disk, compared without case.
// https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html
const Label = "cidata"

// NoCloud reads the seed from an ISO 9660 disk labelled cidata.
type NoCloud struct {
	Disks
}

// Name says what the source is.
func (NoCloud) Name() string { return "NoCloud disk" }

// Seed finds the disk and reads it. NotFound: no disk has the label.
func (n NoCloud) Seed(ctx context.Context) (*Seed, error) {
	return n.find(ctx, "no disk with label "+Label, func(f *os.File) (*Seed, error) { return readNoCloud(f) })
}

// readNoCloud reads a seed; nil when the disk is none.
func readNoCloud(f io.ReaderAt) (*Seed, error) {
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
