// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"slices"
	"strings"
	"testing"
)

// TestAuthority: what is issued is the authority's, names whom it should, and is not
// readable by others.
func TestAuthority(t *testing.T) {
	a, err := newAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	id := identity{"system:node:testbed", []string{"system:nodes"}, []string{"testbed", "10.0.0.1"}}
	if err := a.client("kubelet", id); err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(a.path("kubelet.crt"), a.path("kubelet.key"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	for _, host := range id.hosts {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, DNSName: host, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
			t.Errorf("as a server at %s: %v", host, err)
		}
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Errorf("as a client: %v", err)
	}
	if s := cert.Subject; s.CommonName != id.name || !slices.Equal(s.Organization, id.groups) {
		t.Errorf("it names %s", s)
	}
	for _, f := range []string{"ca.key", "sa.key", "kubelet.key", "kubelet.kubeconfig"} {
		fi, err := os.Stat(a.path(f))
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", f, fi.Mode())
		}
	}
	text, err := os.ReadFile(a.path("kubelet.kubeconfig"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{apiURL, a.path("ca.crt"), a.path("kubelet.crt"), a.path("kubelet.key")} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the kubeconfig lacks %s", want)
		}
	}
}
