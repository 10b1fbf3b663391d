// SPDX-License-Identifier: Apache-2.0

package process

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/shim/state/statetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestLife(t *testing.T) { statetest.Check(t, life, stateNames[:], "process.go") }
