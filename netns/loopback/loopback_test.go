// SPDX-License-Identifier: Apache-2.0

package loopback

import (
	"errors"
	"net"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns/nstest"
)

const port = 15151

// TestEnsure: whatever port is dialled inside, on whatever address of the loopback
// network, the listener has the connection; other addresses are left alone.
func TestEnsure(t *testing.T) {
	ns := nstest.New(t, "pod")
	var l net.Listener
	ns.Do(func() (err error) {
		l, err = net.Listen("tcp4", "127.0.0.1:15151")
		return err
	})
	defer l.Close()
	accepted := make(chan error)
	go func() {
		for {
			c, err := l.Accept()
			if err == nil {
				c.Close()
			}
			select {
			case accepted <- err:
			case <-t.Context().Done():
			}
			if err != nil {
				return
			}
		}
	}()
	dial := func(addr string) error {
		var c net.Conn
		err := ns.Try(func() (err error) {
			c, err = net.Dial("tcp4", addr)
			return err
		})
		if err == nil {
			c.Close()
		}
		return err
	}
	if err := dial("127.0.0.1:8080"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatalf("before: %v", err)
	}
	for _, p := range []uint16{1, port, port} { // another one first; and again
		if err := Ensure(t.Context(), ns.Path, p); err != nil {
			t.Fatal(err)
		}
	}
	for _, addr := range []string{"127.0.0.1:8080", "127.0.0.1:1", "127.9.9.9:65535", "127.0.0.1:15151"} {
		if err := dial(addr); err != nil {
			t.Errorf("%s: %v", addr, err)
		} else if err := <-accepted; err != nil {
			t.Errorf("%s: accept: %v", addr, err)
		}
	}
	if err := dial("10.1.1.1:80"); err == nil {
		t.Error("an address outside of the loopback network was redirected")
	}
	for range 2 {
		if err := Remove(t.Context(), ns.Path); err != nil {
			t.Fatal(err)
		}
	}
	if err := dial("127.0.0.1:8080"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("after: %v", err)
	}
	if err := Remove(t.Context(), filepath.Join(t.TempDir(), "none")); err != nil {
		t.Errorf("remove without a namespace: %v", err)
	}
}
