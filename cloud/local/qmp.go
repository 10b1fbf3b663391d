// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"
)

// qmp is a connection to QEMU's control socket: the QEMU Machine Protocol, JSON
// lines (docs/interop/qmp-spec.txt of QEMU). One caller at a time.
type qmp struct {
	conn net.Conn
	r    *bufio.Reader
}

// maxReply bounds one line from QEMU; the greeting and the replies used here are
// some hundred bytes.
const maxReply = 1 << 20

// dialQMP connects to the socket in dir and negotiates. The path goes through a
// descriptor of the directory, so that a long StateDir does not meet the limit of
// 107 bytes on socket names.
func dialQMP(ctx context.Context, dir string) (*qmp, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var nd net.Dialer
	conn, err := nd.DialContext(ctx, "unix", filepath.Join(fmt.Sprintf("/proc/self/fd/%d", d.Fd()), qmpName))
	if err != nil {
		return nil, orContext(ctx, err)
	}
	q := &qmp{conn: conn, r: bufio.NewReaderSize(conn, maxReply)}
	if err := q.hello(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("QMP: %w", err), q.close())
	}
	return q, nil
}

func (q *qmp) close() error { return q.conn.Close() }

func (q *qmp) hello(ctx context.Context) error {
	stop := q.until(ctx)
	defer stop()
	var greeting struct {
		QMP json.RawMessage `json:"QMP"`
	}
	if err := q.read(&greeting); err != nil {
		return orContext(ctx, err)
	}
	if greeting.QMP == nil {
		return errors.New("no greeting")
	}
	return q.do(ctx, "qmp_capabilities", nil)
}

// do runs a command and decodes its return value into out unless that is nil.
// Events that come in between are dropped.
func (q *qmp) do(ctx context.Context, command string, out any) error {
	stop := q.until(ctx)
	defer stop()
	if _, err := fmt.Fprintf(q.conn, "{\"execute\":%q}\n", command); err != nil {
		return orContext(ctx, err)
	}
	for {
		var reply struct {
			Return json.RawMessage `json:"return"`
			Event  string          `json:"event"`
			Error  *struct {
				Class string `json:"class"`
				Desc  string `json:"desc"`
			} `json:"error"`
		}
		if err := q.read(&reply); err != nil {
			return orContext(ctx, err)
		}
		switch {
		case reply.Error != nil:
			return fmt.Errorf("%s: %s (%s)", command, reply.Error.Desc, reply.Error.Class)
		case reply.Event != "":
		case out == nil:
			return nil
		default:
			return json.Unmarshal(reply.Return, out)
		}
	}
}

func (q *qmp) read(v any) error {
	line, err := q.r.ReadSlice('\n')
	if err != nil {
		return err
	}
	return json.Unmarshal(line, v)
}

// until makes the connection's reads and writes fail when ctx ends.
func (q *qmp) until(ctx context.Context) (stop func()) {
	end := context.AfterFunc(ctx, func() { _ = q.conn.SetDeadline(time.Unix(1, 0)) })
	return func() { end() }
}

// orContext returns the context's error in place of what its end did to the
// connection. The dialer's own deadline is that of ctx and may come a moment sooner.
func orContext(ctx context.Context, err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		<-ctx.Done()
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}
