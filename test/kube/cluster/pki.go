// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// authority signs what the cluster's programs show each other. Its files stand in one
// folder: NAME.crt, NAME.key, and NAME.kubeconfig with the two inside.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	next int64 // serial number
}

// caName and saName are the files of the authority, and of the key that signs service
// accounts' tokens.
const (
	caName = "ca"
	saName = "sa"
)

// certLife is longer than any run and short enough to be no key for anything else.
const certLife = 24 * time.Hour

func newAuthority(dir string) (*authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	a := &authority{dir: dir}
	err := a.issue(caName, identity{name: "testbed"})
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return a, a.writeKey(saName, key)
}

func (a *authority) path(file string) string { return filepath.Join(a.dir, file) }

// identity is whom a certificate names.
type identity struct {
	name   string   // common name: the user
	groups []string // organizations: the user's groups
	hosts  []string // names and addresses it serves
}

// issue makes a key and its certificate. The first one is the authority's own.
func (a *authority) issue(file string, id identity) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	a.next++
	t := &x509.Certificate{
		SerialNumber: big.NewInt(a.next),
		Subject:      pkix.Name{CommonName: id.name, Organization: id.groups},
		// Started before now: the clocks of pod VMs are set from the node's, to the second.
		NotBefore:   time.Now().Add(-time.Hour),
		NotAfter:    time.Now().Add(certLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, h := range id.hosts {
		if ip := net.ParseIP(h); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		t.IsCA, t.BasicConstraintsValid = true, true
		t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageCertSign, nil
		parent, signer = t, key
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, &key.PublicKey, signer)
	if err != nil {
		return fmt.Errorf("certificate %s: %w", file, err)
	}
	if a.cert == nil {
		a.key = key
		if a.cert, err = x509.ParseCertificate(der); err != nil {
			return err
		}
	}
	return errors.Join(a.writeKey(file, key),
		os.WriteFile(a.path(file+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644))
}

func (a *authority) writeKey(file string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(a.path(file+".key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

// client issues a certificate for a client of the API server and writes its
// kubeconfig.
func (a *authority) client(file string, id identity) error {
	if err := a.issue(file, id); err != nil {
		return err
	}
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: testbed, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: %s, user: {client-certificate: %q, client-key: %q}}]
contexts: [{name: testbed, context: {cluster: testbed, user: %[3]s}}]
current-context: testbed
`, apiURL, a.path(caName+".crt"), file, a.path(file+".crt"), a.path(file+".key"))
	return os.WriteFile(a.path(file+".kubeconfig"), []byte(text), 0o600)
}
