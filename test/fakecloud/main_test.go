// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/kata-remote/kata-remote/cloud/local"
	"github.com/kata-remote/kata-remote/test/cloudbed"
	"github.com/kata-remote/kata-remote/test/testbed"
)

func TestMain(m *testing.M) {
	if code, done := testbed.Isolate(testbed.Isolation{}); done {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// TestRun starts each cloud, reads what it prints, asks it something and ends it.
func TestRun(t *testing.T) {
	for _, provider := range cloudbed.Providers() {
		t.Run(provider, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			r, w := io.Pipe()
			ended := make(chan error, 1)
			go func() {
				err := run(ctx, cloudbed.Config{Provider: provider, Dir: t.TempDir(), Accel: local.AccelTCG}, w)
				w.CloseWithError(io.EOF)
				ended <- err
			}()
			env := map[string]string{}
			lines := bufio.NewScanner(r)
			for url(env) == "" || env["DISABLECVM"] == "" {
				if !lines.Scan() {
					t.Fatalf("it ended with %v after %v", <-ended, env)
				}
				key, value, _ := strings.Cut(lines.Text(), "=")
				env[key] = value
			}
			go io.Copy(io.Discard, r)
			if env["CLOUD_PROVIDER"] != provider {
				t.Errorf("it prints %v", env)
			}
			if _, err := netlink.LinkByName("cloud0"); err != nil {
				t.Error(err)
			}
			status := ask(t, url(env), env["SSL_CERT_FILE"])
			if status/100 != 4 { // nobody said who asks
				t.Errorf("it answers %d", status)
			}
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
			if _, err := netlink.LinkByName("cloud0"); err == nil {
				t.Error("its network is still there")
			}
		})
	}
}

func url(env map[string]string) string { return env["AWS_ENDPOINT_URL"] + env["AZURE_ENDPOINT"] }

// ask asks for nothing in particular, and returns the answer's status.
func ask(t *testing.T, url, authority string) int {
	t.Helper()
	roots := x509.NewCertPool()
	if authority != "" {
		pem, err := os.ReadFile(authority)
		if err != nil || !roots.AppendCertsFromPEM(pem) {
			t.Fatalf("%s: %v", authority, err)
		}
	}
	tr := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots}}
	resp, err := (&http.Client{Transport: tr}).Post(url+"/", "application/x-www-form-urlencoded", strings.NewReader("Action=DescribeInstances&Version=2016-11-15"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}
