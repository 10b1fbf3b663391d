// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair returns the two ends of a unix stream connection.
func pair(t testing.TB) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a.(*net.UnixConn), b.(*net.UnixConn)
}

func TestRelayPassesBytesAndHalfClose(t *testing.T) {
	left, a := pair(t)
	b, right := pair(t)
	done := make(chan error, 1)
	go func() { done <- Relay(t.Context(), a, b) }()

	sent := make([]byte, 3<<20)
	rand.Read(sent)
	go func() {
		left.Write(sent)
		left.CloseWrite()
	}()
	got, err := io.ReadAll(right)
	if err != nil {
		t.Fatal(err)
	}
	if sha256.Sum256(got) != sha256.Sum256(sent) {
		t.Fatalf("received %d bytes that differ from the %d sent", len(got), len(sent))
	}
	// The other direction is still open after the half-close.
	if _, err := right.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	right.Close()
	answer, err := io.ReadAll(left)
	if err != nil || string(answer) != "answer" {
		t.Fatalf("answer = %q, %v", answer, err)
	}
	if err := <-done; err != nil {
		t.Fatalf("relay ended with %v", err)
	}
}

func TestRelayEndsWithItsContext(t *testing.T) {
	left, a := pair(t)
	b, right := pair(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Relay(ctx, a, b) }()
	left.Write([]byte("x"))
	io.ReadFull(right, make([]byte, 1))
	cancel()
	if err := <-done; err != nil {
		t.Fatalf("relay ended with %v", err)
	}
	for _, c := range []net.Conn{left, right} {
		if n, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("read %d bytes from a connection whose relay has ended", n)
		}
	}
}

func TestRelayEndsWhenOnePeerIsGone(t *testing.T) {
	left, a := pair(t)
	b, right := pair(t)
	done := make(chan error, 1)
	go func() { done <- Relay(t.Context(), a, b) }()
	right.Close()
	go io.Copy(left, bytes.NewReader(make([]byte, 1<<20)))
	io.Copy(io.Discard, left)
	left.Close()
	if err := <-done; err != nil {
		t.Fatalf("relay ended with %v", err)
	}
}

func TestDialSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for path, want := range map[string]string{
		filepath.Join(dir, "absent"): "does not exist",
		stale:                        "nobody listens",
		filepath.Join(dir, strings.Repeat("x", 200)): "the kernel takes 107",
	} {
		_, err := Dial(t.Context(), path)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("Dial(%q) = %v, want %q and the path in it", path, err, want)
		}
	}
}

func BenchmarkRelay(b *testing.B) {
	left, a := pair(b)
	c, right := pair(b)
	go Relay(b.Context(), a, c)
	buf := make([]byte, 128<<10)
	go func() {
		for range b.N {
			left.Write(buf)
		}
		left.CloseWrite()
	}()
	b.SetBytes(int64(len(buf)))
	n, err := io.Copy(io.Discard, right)
	if err != nil || n != int64(b.N)*int64(len(buf)) {
		b.Fatal(n, err)
	}
	right.Close()
}
