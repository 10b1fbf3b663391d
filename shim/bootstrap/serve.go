// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/shim/service"
)

// gcPercent trades a little CPU for memory: there is a server for every pod of the
// node, and each does next to nothing.
const gcPercent = 40

// answerTimeout bounds how long the end of the server waits for its clients to leave:
// one that has its answer does so at once.
const answerTimeout = 500 * time.Millisecond

// Serve serves the Task API and the Sandbox API on the socket passed as fd 3 until containerd shuts the
// shim down or ctx ends.
func Serve(ctx context.Context, f Flags, version string) error {
	debug.SetGCPercent(gcPercent)
	setLog(f)
	// Mounts that the node makes later are to be seen here, ours are not to be seen
	// there. It fails where there is no mount namespace of our own.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make the mounts slaves of the node's: %w", err)
	}
	lf := os.NewFile(3, "socket")
	l, err := net.FileListener(lf)
	if err != nil {
		return fmt.Errorf("fd 3 is not the socket that start passes on: %w", err)
	}
	lf.Close()
	served := newClients()
	server, err := ttrpc.NewServer(ttrpc.WithServerHandshaker(served))
	if err != nil {
		return err
	}
	path := strings.TrimPrefix(f.Socket, "unix://")
	ended := make(chan struct{})
	svc := service.New(service.Config{
		Namespace: f.Namespace, Version: version,
		Events: service.NewEvents(os.Getenv("TTRPC_ADDRESS"), f.Namespace),
		Exit:   func() { close(ended) },
	})
	svc.Register(server)
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	go func() {
		select {
		case <-ctx.Done(): // the node goes down, and with it the pod
			log.L.Info("shim ends by signal")
			svc.Close()
		case <-ended:
		}
	}()
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		<-ended
		os.Remove(path)
		// The answer to Shutdown may be lost, which containerd expects; but where that to
		// ShutdownSandbox is, it reports that the pod could not be removed. With the
		// answer in hand it closes its connections.
		sctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
		defer cancel()
		served.wait(sctx)
		server.Close()
	}()
	log.L.WithField(logkey.Sandbox, f.ID).Debug("shim serves")
	if err := server.Serve(context.WithoutCancel(ctx), l); err != nil && !errors.Is(err, ttrpc.ErrServerClosed) {
		svc.Close()
		<-closed
		return err
	}
	<-closed
	return nil
}

// setLog sends the log to the bundle's FIFO, which containerd copies to its own log.
// Without one (CRI-O makes none) it goes to a file beside it.
func setLog(f Flags) {
	logger := logrus.StandardLogger()
	logger.SetFormatter(formatter{&logrus.TextFormatter{TimestampFormat: log.RFC3339NanoFixed, FullTimestamp: true, DisableColors: true}})
	if f.Debug {
		logger.SetLevel(logrus.DebugLevel)
	}
	// Opened for reading too, so that a write never fails for want of a reader.
	fd, err := unix.Open(filepath.Join(f.Bundle, "log"), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == nil {
		logger.SetOutput(lossy(fd))
	} else if file, err := os.OpenFile(filepath.Join(f.Bundle, "shim.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600); err == nil {
		logger.SetOutput(file)
	}
	log.L = logger.WithField("runtime", "kata-remote").WithField(logkey.Sandbox, f.ID)
}

// formatter leaves out what ttrpc logs as an error although it is none: an output
// stream may end in the guest while our last acknowledgement is on its way, and the
// guest then answers on a stream that is no more.
type formatter struct{ logrus.Formatter }

func (f formatter) Format(e *logrus.Entry) ([]byte, error) {
	if e.Message == "ttrpc: received message on inactive stream" {
		return nil, nil
	}
	return f.Formatter.Format(e)
}

// lossy writes to a FIFO. When it is full, because nobody reads it, the record is
// lost: a log must not hold up a pod.
type lossy int

func (fd lossy) Write(b []byte) (int, error) {
	if len(b) > 0 {
		unix.Write(int(fd), b)
	}
	return len(b), nil
}
