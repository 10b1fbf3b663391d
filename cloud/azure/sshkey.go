// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// sshKey is the public key that goes into each VM. Azure makes no Linux VM from a
// generalised image without a key or a password. Where the configuration has no key,
// one is made whose private half is dropped at once, so that it opens nothing: once
// for the process, because it costs tenths of a second, and of 2048 bits in ssh-rsa
// format, which is what the API asks for at least (SshPublicKey.keyData).
type sshKey struct {
	file string // "" or missing: nobody's key
	once func() (string, error)
}

func newSSHKey(file string) *sshKey {
	return &sshKey{file: file, once: sync.OnceValues(nobodysKey)}
}

// line returns the key as in an authorized_keys file. The file is read each time: a
// Secret may change.
func (k *sshKey) line() (string, error) {
	if k.file == "" {
		return k.once()
	}
	b, err := os.ReadFile(k.file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return k.once()
	case err != nil:
		return "", badKey("AZURE_SSH_PUBLIC_KEY_FILE", "cannot be read: %v", err)
	}
	line := strings.TrimSpace(string(b))
	return line, checkSSHKey(k.file, line)
}

// checkSSHKey refuses what Azure refuses.
func checkSSHKey(file, line string) error {
	f := strings.Fields(line)
	bad := func(format string, args ...any) error {
		return badKey("AZURE_SSH_PUBLIC_KEY_FILE", "names %s, which "+format, append([]any{file}, args...)...)
	}
	if strings.Contains(line, "PRIVATE KEY") {
		return bad("holds a private key; the public one is meant")
	}
	if strings.Contains(line, "\n") || len(f) < 2 {
		return bad("holds no single key")
	}
	wire, err := base64.StdEncoding.DecodeString(f[1])
	kind, rest, ok := sshString(wire)
	if err != nil || !ok || string(kind) != f[0] {
		return bad("holds no key")
	}
	switch f[0] {
	case "ssh-ed25519":
		return nil
	case "ssh-rsa":
		_, rest, _ = sshString(rest) // the exponent
		n, _, ok := sshString(rest)
		if bits := new(big.Int).SetBytes(n).BitLen(); !ok || bits < 2048 {
			return bad("holds an RSA key of %d bits; Azure takes 2048 and more", bits)
		}
		return nil
	}
	return bad("holds a key of kind %q; Azure takes ssh-rsa and ssh-ed25519", f[0])
}

// sshString reads a string of RFC 4251 §5.
func sshString(b []byte) (s, rest []byte, ok bool) {
	if len(b) < 4 {
		return nil, nil, false
	}
	n := binary.BigEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return nil, nil, false
	}
	return b[4 : 4+n], b[4+n:], true
}

func nobodysKey() (string, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return "", fmt.Errorf("make a key for SSH: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	var wire []byte // RFC 4253 §6.6
	for _, s := range [][]byte{[]byte("ssh-rsa"), mpint(big.NewInt(int64(key.E))), mpint(key.N)} {
		wire = binary.BigEndian.AppendUint32(wire, uint32(len(s)))
		wire = append(wire, s...)
	}
	return "ssh-rsa " + base64.StdEncoding.EncodeToString(wire) + " nobody", nil
}

// mpint writes a positive number of RFC 4251 §5.
func mpint(n *big.Int) []byte {
	b := n.Bytes()
	if len(b) > 0 && b[0]&0x80 != 0 {
		b = append([]byte{0}, b...)
	}
	return b
}
