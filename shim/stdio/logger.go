// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// loggerReady bounds the wait for a logging binary to say that it is ready.
	loggerReady = 10 * time.Second
	// loggerStop is how long a logging binary has to write what it has after its
	// input ended. containerd's own shim gives 12 s.
	loggerStop = 12 * time.Second
)

// logger is a process that takes a container's output: fd 3 is its standard output,
// fd 4 its standard error, and closing fd 5 says that it is ready (containerd,
// docs/runtime-v2.md, "Logging").
type logger struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when the process was reaped
	open sync.WaitGroup
}

type loggerPipe struct {
	*os.File
	l    *logger
	once sync.Once
}

// Close closes one stream; the process is stopped when both are closed.
func (p *loggerPipe) Close() error {
	err := os.ErrClosed
	p.once.Do(func() {
		err = p.File.Close()
		p.l.open.Done()
	})
	return err
}

// startLogger starts the binary that u, without its scheme, names.
func startLogger(u string, c Config) (_, _ io.WriteCloser, err error) {
	uri, err := url.Parse("binary://" + u)
	if err != nil || uri.Path == "" {
		return nil, nil, fmt.Errorf("logging binary %q is not binary:///path?args: %w", u, errdefs.ErrInvalidArgument)
	}
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	pipe := func() (r, w *os.File) {
		if err != nil {
			return nil, nil
		}
		if r, w, err = os.Pipe(); err == nil {
			files = append(files, r, w)
		}
		return r, w
	}
	outR, outW := pipe()
	errR, errW := pipe()
	readyR, readyW := pipe()
	if err != nil {
		return nil, nil, err
	}
	var args []string
	for k, vs := range uri.Query() {
		args = append(args, k)
		if len(vs) > 0 && vs[0] != "" {
			args = append(args, vs[0])
		}
	}
	l := &logger{cmd: exec.Command(uri.Path, args...), done: make(chan struct{})}
	l.cmd.Env = append(os.Environ(), "CONTAINER_ID="+c.Container, "CONTAINER_NAMESPACE="+c.Namespace)
	l.cmd.ExtraFiles = []*os.File{outR, errR, readyW}
	l.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := l.cmd.Start(); err != nil {
		return nil, nil, fmt.Errorf("start logging binary %s: %w", uri.Path, err)
	}
	l.open.Add(2)
	go l.run()
	readyW.Close()
	if err := readyR.SetReadDeadline(time.Now().Add(loggerReady)); err != nil {
		return nil, nil, err
	}
	if _, err := readyR.Read(make([]byte, 1)); err != nil && !errors.Is(err, io.EOF) {
		l.open.Add(-2)
		return nil, nil, fmt.Errorf("logging binary %s did not close fd 5 within %s: %w", uri.Path, loggerReady, err)
	}
	files = []*os.File{outR, errR, readyR}
	return &loggerPipe{File: outW, l: l}, &loggerPipe{File: errW, l: l}, nil
}

// run reaps the process and stops it when it outlives its input.
func (l *logger) run() {
	go func() {
		l.cmd.Wait() // its exit status interests nobody
		close(l.done)
	}()
	l.open.Wait()
	for _, sig := range []syscall.Signal{0, syscall.SIGTERM, syscall.SIGKILL} {
		if sig != 0 {
			l.cmd.Process.Signal(sig)
		}
		select {
		case <-l.done:
			return
		case <-time.After(loggerStop):
		}
	}
}
