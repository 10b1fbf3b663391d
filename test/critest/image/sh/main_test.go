// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// asShell makes the test's program the shell.
const asShell = "CRITEST_SH"

func TestMain(m *testing.M) {
	if os.Getenv(asShell) != "" {
		os.Unsetenv(asShell)
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// TestShell: what critest's specs and the images' scripts make use of.
func TestShell(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"program": 0o755, "masked": 0o644, "script": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/cat\necho \"$1\" two; exit 4\n"), mode); err != nil {
			t.Fatal(err)
		}
	}
	for name, tc := range map[string]struct {
		args           []string
		stdin          string
		stdout, stderr string
		status         int
	}{
		"statuses and builtins": {[]string{"-c", `echo $(echo a):$(echo b); false || [ -f /etc/passwd ] && echo Found; exit 3`}, "", "a:b\nFound\n", "", 3},
		"parameters":            {[]string{"-c", `echo $1`, "name", "one"}, "", "one\n", "", 0},
		"loop":                  {[]string{"-c", `i=0; while ! echo $i | grep 2; do i=$((i+1)); done`}, "", "2\n", "", 0},
		"standard input":        {nil, "echo -n hello\nexit 2\n", "hello", "", 2},
		"file":                  {[]string{filepath.Join(dir, "script"), "one"}, "", "one two\n", "", 4},
		"not found":             {[]string{"-c", "no-such-program"}, "", "", "SH: no-such-program: not found\n", 127},
		"masked":                {[]string{"-c", "masked"}, "", "", "SH: masked: Permission denied\n", 126},
		"killed":                {[]string{"-c", `/bin/sh -c 'kill -9 $$'`}, "", "", "", 137},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(os.Args[0], tc.args...)
			cmd.Env = append(os.Environ(), asShell+"=1", "PATH="+dir+":/usr/bin:/bin")
			cmd.Stdin = strings.NewReader(tc.stdin)
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			err := cmd.Run()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			said := strings.ReplaceAll(stderr.String(), os.Args[0], "SH")
			if stdout.String() != tc.stdout || said != tc.stderr || cmd.ProcessState.ExitCode() != tc.status {
				t.Errorf("said %q and %q, ended with %d; want %q, %q, %d", stdout.String(), said, cmd.ProcessState.ExitCode(), tc.stdout, tc.stderr, tc.status)
			}
		})
	}
}
