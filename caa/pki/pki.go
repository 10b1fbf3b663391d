// SPDX-License-Identifier: Apache-2.0

// Package pki makes the certificates of one sandbox. Each sandbox has an authority
// of its own that signs two certificates, one for the forwarder in its pod VM and
// one for the adaptor, and is then forgotten: nothing else can ever be signed with
// it, and a certificate of one sandbox opens no other.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
)

const (
	// validity outlives any pod: nothing renews a certificate inside a VM, so
	// that a shorter one would be a date on which healthy pods fail. What ends a
	// certificate's use is the end of its pod.
	validity = 10 * 365 * 24 * time.Hour
	// skew is how far the guest's clock may be behind the node's. Instances start
	// with the clock of their host, which may lag before it is set right.
	skew = 24 * time.Hour
)

// Bundle is what one sandbox's two ends need. PEM throughout.
type Bundle struct {
	CA         string
	ServerCert string
	ServerKey  podvmconfig.Secret
	ClientCert string
	ClientKey  podvmconfig.Secret
}

// Issue makes the certificates of the sandbox whose forwarder is called serverName,
// a DNS name of at most 63 bytes.
func Issue(serverName string, now time.Time) (*Bundle, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	caTemplate := template("sandbox authority of "+serverName, now)
	caTemplate.IsCA = true
	caTemplate.BasicConstraintsValid = true
	caTemplate.MaxPathLenZero = true
	caTemplate.KeyUsage = x509.KeyUsageCertSign
	caDER, err := x509.CreateCertificate(rand.Reader, caTemplate, caTemplate, caKey.Public(), caKey)
	if err != nil {
		return nil, fmt.Errorf("make the authority of %s: %w", serverName, err)
	}
	ca, err := x509.ParseCertificate(caDER)
	if err != nil {
		return nil, err
	}

	server := template(serverName, now)
	server.DNSNames = []string{serverName}
	server.KeyUsage = x509.KeyUsageDigitalSignature
	server.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	client := template("adaptor", now)
	client.KeyUsage = x509.KeyUsageDigitalSignature
	client.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}

	b := &Bundle{CA: encode("CERTIFICATE", caDER)}
	if b.ServerCert, b.ServerKey, err = sign(server, ca, caKey); err != nil {
		return nil, fmt.Errorf("make the forwarder's certificate of %s: %w", serverName, err)
	}
	if b.ClientCert, b.ClientKey, err = sign(client, ca, caKey); err != nil {
		return nil, fmt.Errorf("make the adaptor's certificate of %s: %w", serverName, err)
	}
	return b, nil
}

func template(commonName string, now time.Time) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)) // crypto/rand never fails
	// X.520 limits a common name to 64 characters; the name that counts is the DNS name.
	if len(commonName) > 64 {
		commonName = commonName[:64]
	}
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{"peer pods"}, CommonName: commonName},
		NotBefore:    now.Add(-skew),
		NotAfter:     now.Add(validity),
	}
}

func sign(t, ca *x509.Certificate, caKey *ecdsa.PrivateKey) (cert string, key podvmconfig.Secret, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca, k.Public(), caKey)
	if err != nil {
		return "", "", err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return "", "", err
	}
	return encode("CERTIFICATE", der), podvmconfig.Secret(encode("PRIVATE KEY", keyDER)), nil
}

func encode(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// ClientConfig is how the adaptor speaks to a forwarder: TLS 1.3, with its own
// certificate, and only to the server of that name under that authority.
func ClientConfig(serverName, ca, clientCert string, clientKey podvmconfig.Secret) (*tls.Config, error) {
	if serverName == "" {
		return nil, errors.New("no server name to verify")
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(ca)) {
		return nil, fmt.Errorf("authority of %s: no certificate in it", serverName)
	}
	cert, err := tls.X509KeyPair([]byte(clientCert), []byte(clientKey))
	if err != nil {
		return nil, fmt.Errorf("adaptor's certificate for %s: %w", serverName, err)
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		ServerName:   serverName,
		RootCAs:      roots,
		Certificates: []tls.Certificate{cert},
		// Several records are sent together: see relay.TLSConn.
		DynamicRecordSizingDisabled: true,
	}, nil
}
