// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// optionsName is the file in a bundle that keeps the options of the runtime handler.
// With the Sandbox API they are passed to `start` alone, and it is the server that
// needs them.
const optionsName = "peerpod-options.pb"

// Known tells whether a message is runtime options, those that Load uses and those of
// runc alike.
func Known(a *anypb.Any) bool {
	name := a.GetTypeUrl()[strings.LastIndexByte(a.GetTypeUrl(), '/')+1:]
	return slices.Contains(typeURLs, name) || slices.Contains(runcOptions, name)
}

// WriteOptions keeps options in a bundle.
func WriteOptions(bundle string, options *anypb.Any) error {
	b, err := proto.Marshal(options)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(bundle, optionsName), b, 0o600)
}

// ReadOptions returns what WriteOptions kept, nil where nothing was.
func ReadOptions(bundle string) (*anypb.Any, error) {
	b, err := os.ReadFile(filepath.Join(bundle, optionsName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var a anypb.Any
	if err := proto.Unmarshal(b, &a); err != nil {
		return nil, fmt.Errorf("%s/%s: %w: %w", bundle, optionsName, err, errdefs.ErrInvalidArgument)
	}
	return &a, nil
}
