// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"testing"
	"time"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
	"github.com/kata-remote/kata-remote/cloud/cloudtest"
)

func TestConformance(t *testing.T) {
	cloudtest.RunSynctest(t, func(t *testing.T) cloudtest.Harness {
		w := newWorld(t, fakearm.Config{})
		return cloudtest.Harness{
			New:     func(t *testing.T) cloud.Provider { return w.provider() },
			Leaks:   func() []string { return w.arm.Leaks(nil) },
			Timeout: 10 * time.Minute, Poll: 100 * time.Millisecond, Lag: ListSettle,
			CancelAfter: []time.Duration{0, time.Millisecond, time.Second, 2500 * time.Millisecond, 4 * time.Second, 20 * time.Second},
		}
	})
}
