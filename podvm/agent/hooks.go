// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// guestHooks are the executable files of a directory of the guest's image: those in
// its prestart, poststart and poststop belong to every container's hooks of that name.
// CreateSandbox says which directory; an image without it has no hooks. Hooks that a
// container's own spec names run before them; they too are files of the guest.
func guestHooks(dir string) (*specs.Hooks, error) {
	h := &specs.Hooks{}
	if dir == "" {
		return h, nil
	}
	for kind, list := range map[string]*[]specs.Hook{"prestart": &h.Prestart, "poststart": &h.Poststart, "poststop": &h.Poststop} { //nolint:staticcheck // Prestart is deprecated, not gone
		entries, err := os.ReadDir(filepath.Join(dir, kind))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("guest_hook_path: %w", err)
		}
		for _, e := range entries {
			path := filepath.Join(dir, kind, e.Name())
			st, err := os.Stat(path)
			if err != nil {
				return nil, fmt.Errorf("guest_hook_path: %w", err)
			}
			if st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
				*list = append(*list, specs.Hook{Path: path, Args: []string{path}})
			}
		}
	}
	return h, nil
}

// addHooks appends the guest's hooks to a container's.
func addHooks(spec *specs.Spec, guest *specs.Hooks) {
	if guest == nil {
		return
	}
	if spec.Hooks == nil {
		spec.Hooks = &specs.Hooks{}
	}
	spec.Hooks.Prestart = append(spec.Hooks.Prestart, guest.Prestart...) //nolint:staticcheck // as above
	spec.Hooks.Poststart = append(spec.Hooks.Poststart, guest.Poststart...)
	spec.Hooks.Poststop = append(spec.Hooks.Poststop, guest.Poststop...)
}
