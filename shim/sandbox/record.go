// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/kata-remote/kata-remote/agent-protocol/vmnote"
)

// RecordName is the file in the sandbox's bundle that says which pod VM it has. It
// is written before the adaptor is asked for one, so that `delete`, which may run
// when the shim is dead, knows what to give back.
const RecordName = "peerpod.json"

// ReadRecord reads the record of a bundle. fs.ErrNotExist: the bundle is not a
// sandbox's, or no pod VM was asked for.
func ReadRecord(bundle string) (vmnote.Note, error) {
	return vmnote.Read(filepath.Join(bundle, RecordName))
}

// Release gives the pod VM of a record back: at once, or by leaving word where the
// adaptor will find it. Only when neither works is there an error.
func Release(ctx context.Context, n vmnote.Note) error {
	err := Hypervisor{n.Socket}.StopVM(ctx, n.Sandbox)
	if err == nil {
		return nil
	}
	if lerr := n.Leave(); lerr != nil {
		return errors.Join(err, fmt.Errorf("leave word for the adaptor: %w", lerr))
	}
	return nil
}
