// SPDX-License-Identifier: Apache-2.0

// Command sh is the shell of critest's images. Debian's busybox has one that runs
// applets without looking for a file, which critest's spec about masked paths is
// about; of the shells that look, none says what busybox says when it may not execute
// one, and critest compares that word by word.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"mvdan.cc/sh/v3/interp"
	"mvdan.cc/sh/v3/syntax"
)

func main() {
	err := run(os.Args)
	var status interp.ExitStatus
	switch {
	case errors.As(err, &status):
		os.Exit(int(status))
	case err != nil:
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
		os.Exit(2)
	}
}

// run is `sh`, `sh -c SCRIPT [NAME [ARG...]]` or `sh FILE [ARG...]`.
func run(args []string) error {
	var script io.Reader = os.Stdin
	var params []string
	switch {
	case len(args) > 2 && args[1] == "-c":
		script, params = strings.NewReader(args[2]), args[min(4, len(args)):]
	case len(args) > 1:
		f, err := os.Open(args[1])
		if err != nil {
			return err
		}
		defer f.Close()
		script, params = f, args[2:]
	}
	shell, err := interp.New(
		interp.StdIO(os.Stdin, os.Stdout, os.Stderr),
		interp.Params(append([]string{"--"}, params...)...),
		interp.ExecHandlers(func(interp.ExecHandlerFunc) interp.ExecHandlerFunc { return execute }))
	if err != nil {
		return err
	}
	// Line by line: what follows may depend on what a line has done, and of a terminal
	// or a pipe may not have been written yet.
	var ended error
	err = syntax.NewParser().Stmts(script, func(s *syntax.Stmt) bool {
		ended = shell.Run(context.Background(), s)
		return !shell.Exited()
	})
	return errors.Join(err, ended)
}

// execute runs a program, with a shell's words and statuses where it cannot.
func execute(ctx context.Context, args []string) error {
	h := interp.HandlerCtx(ctx)
	path, err := lookUp(args[0], h.Env.Get("PATH").String())
	if err != nil {
		what, status := "not found", interp.ExitStatus(127)
		if errors.Is(err, os.ErrPermission) {
			what, status = "Permission denied", 126
		}
		fmt.Fprintf(h.Stderr, "%s: %s: %s\n", os.Args[0], args[0], what)
		return status
	}
	cmd := exec.Cmd{Path: path, Args: args, Dir: h.Dir, Stdin: h.Stdin, Stdout: h.Stdout, Stderr: h.Stderr}
	for name, v := range h.Env.Each {
		if v.Exported {
			cmd.Env = append(cmd.Env, name+"="+v.String())
		}
	}
	var exit *exec.ExitError
	switch err := cmd.Run(); {
	case errors.As(err, &exit):
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return interp.ExitStatus(128 + uint8(ws.Signal()))
		}
		return interp.ExitStatus(exit.ExitCode())
	case err != nil:
		return err
	}
	return nil
}

// lookUp finds a program as POSIX has it: a file that is there and may not be executed
// is ErrPermission when there is no other.
func lookUp(name, path string) (string, error) {
	dirs := filepath.SplitList(path)
	if strings.Contains(name, "/") {
		dirs = []string{""}
	}
	found := os.ErrNotExist
	for _, dir := range dirs {
		file := filepath.Join(dir, name)
		fi, err := os.Stat(file)
		switch {
		case err != nil:
		case fi.Mode().IsRegular() && fi.Mode()&0o111 != 0:
			return file, nil
		default:
			found = os.ErrPermission
		}
	}
	return "", found
}
