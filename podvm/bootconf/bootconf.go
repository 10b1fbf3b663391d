// SPDX-License-Identifier: Apache-2.0

// Package bootconf is what a pod VM is told when it starts: the user data with its
// files, its host name and its network, as the cloud hands them over.
//
// Where they come from is a Source. There is one today, the NoCloud disk
// (NoCloud), which the local provider, libvirt and vSphere use; a cloud's metadata
// service is another Source beside it.
//
// The user data is the only input from outside before the first authenticated
// connection, so it is read strictly: what is not known is an error that names it,
// and files are written to the few places that are agreed on.
package bootconf

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
)

// MaxDocument is the most bytes any of a seed's documents may have. Clouds allow 16
// to 64 KiB; a corrupt length must not take the guest's memory.
const MaxDocument = 1 << 20

// Seed holds the documents of one source as they came. A nil one was not there.
type Seed struct {
	UserData      []byte // cloud-config, see ParseUserData
	MetaData      []byte // see ParseMetaData
	NetworkConfig []byte // see ParseNetworkConfig
}

// source is a channel through which a cloud hands over a seed.
type source interface {
	// Name of the channel, for messages.
	Name() string
	// Seed reads the documents. NotFound: this machine has no such channel.
	Seed(ctx context.Context) (*Seed, error)
}

// Config is all a pod VM is told.
type Config struct {
	Files    []File
	Hostname string     // empty: not told
	Links    []Ethernet // nil: no network configuration was given
}

// Read takes the first source that there is, and parses its documents. NotFound:
// there is none. Every other error names the source, the document and the field to
// mend.
func Read(ctx context.Context, sources ...source) (*Config, error) {
	var missing []error
	for _, s := range sources {
		seed, err := s.Seed(ctx)
		if errdefs.IsNotFound(err) {
			missing = append(missing, err)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("user data from %s: %w", s.Name(), err)
		}
		cfg, err := seed.parse()
		if err != nil {
			return nil, fmt.Errorf("user data from %s: %w", s.Name(), err)
		}
		return cfg, nil
	}
	return nil, fmt.Errorf("no user data: %w", errors.Join(missing...))
}

func (s *Seed) parse() (*Config, error) {
	var cfg Config
	var err error
	if cfg.Files, err = ParseUserData(s.UserData); err != nil {
		return nil, fmt.Errorf("user-data: %w", err)
	}
	if s.MetaData != nil {
		if cfg.Hostname, err = ParseMetaData(s.MetaData); err != nil {
			return nil, fmt.Errorf("meta-data: %w", err)
		}
	}
	if s.NetworkConfig != nil {
		if cfg.Links, err = ParseNetworkConfig(s.NetworkConfig); err != nil {
			return nil, fmt.Errorf("network-config: %w", err)
		}
	}
	return &cfg, nil
}
