// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/opencontainers/runc/libcontainer/exeseal"
	"golang.org/x/sys/unix"
)

// sealProbe makes the test binary say what it runs from.
const sealProbe = "AGENT_TEST_SEAL"

func reportSeal() {
	_, mark := os.LookupEnv("PEERPOD_SEALED")
	fmt.Printf("pid %d sealed %v mark %v args %q", os.Getpid(), exeseal.IsSelfExeCloned(), mark, os.Args[1:])
}

func TestPID1RunsFromASealedCopy(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		argv0 string
		flags uintptr
		want  string
	}{
		{"as PID 1", self, unix.CLONE_NEWPID, `pid 1 sealed true mark false args ["a" "b c"]`},
		{"as PID 1 by a name that is no path", "podvmd", unix.CLONE_NEWPID, `pid 1 sealed false mark false args ["a" "b c"]`},
		{"as another process", self, 0, `sealed false mark false args ["a" "b c"]`},
	} {
		cmd := exec.Command(self, "a", "b c")
		cmd.Args[0] = tc.argv0
		cmd.Env = append(os.Environ(), sealProbe+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: tc.flags}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", tc.name, err, out)
		}
		got := string(out)
		if tc.flags == 0 {
			got = got[len(fmt.Sprintf("pid %d ", cmd.Process.Pid)):]
		}
		if got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, out, tc.want)
		}
	}
}
