// SPDX-License-Identifier: Apache-2.0

package cloud

import (
	"context"
	"time"
)

// Pause waits for d, and returns the context's error if that ends first. A d of 0 or
// less is no wait.
func Pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
