// SPDX-License-Identifier: Apache-2.0

package aws_test

import (
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"encoding/pem"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
)

// Over real connections, as the adaptor talks: to an emulation's address, by http and
// by https with an authority of one's own.
func TestSockets(t *testing.T) {
	s := fakeec2.New(fakeec2.Config{})
	plain, secure := httptest.NewServer(s), httptest.NewTLSServer(s)
	defer plain.Close()
	defer secure.Close()
	bundle := filepath.Join(t.TempDir(), "ca.pem")
	for name, c := range map[string]struct {
		endpoint, bundle string
		err              error
	}{
		"http":                     {plain.URL, "", nil},
		"https":                    {secure.URL, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})), nil},
		"https, unknown authority": {secure.URL, "", errdefs.ErrUnavailable},
		"no authority":             {secure.URL, "x", errdefs.ErrInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("AWS_CA_BUNDLE", "")
			if c.bundle != "" {
				t.Setenv("AWS_CA_BUNDLE", bundle)
				if err := os.WriteFile(bundle, []byte(c.bundle), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			cfg := baseConfig(s)
			cfg.HTTPClient, cfg.Endpoint = nil, c.endpoint
			p, err := aws.New(cfg)
			if err == nil {
				defer p.Close()
				err = p.Check(t.Context())
			}
			if c.err == nil && err != nil || c.err != nil && errdefs.Resolve(err) != c.err {
				t.Errorf("%v, want %v", err, c.err)
			}
		})
	}
}
