// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/cloud/userdata"
)

const (
	// authLimit is how large credentials may be, bytes: user data is 16 KiB on EC2,
	// and has more in it. cloud-api-adaptor 0.22 has the same limit
	// (DefaultAuthfileLimit) and leaves what is larger out without a word.
	authLimit = 12 << 10
	// caLimit is the same for the additional authorities.
	caLimit = 8 << 10
)

// Pull is what pod VMs are told that pull images themselves. The files are read for
// each pod, so that what is in them may change.
type Pull struct {
	AuthFile string   // docker configuration with credentials; "": none
	CAFile   string   // PEM, authorities of registries beside those the VM knows; "": none
	Insecure []string // registries that may be spoken to in plain HTTP
}

// LogValue tells where things are and not what.
func (p Pull) LogValue() slog.Value {
	return slog.GroupValue(slog.String("auth_file", p.AuthFile), slog.String("ca_file", p.CAFile), slog.Any("insecure", p.Insecure))
}

// Check reads the files. FailedPrecondition: one cannot be used; the message names its
// setting and shows nothing of what is in it.
func (p Pull) Check() error {
	_, err := p.tell(&podvmconfig.Config{})
	return err
}

// tell adds to the pod VM's configuration and returns the other files it is to have.
func (p Pull) tell(cfg *podvmconfig.Config) ([]userdata.File, error) {
	cfg.InsecureRegistries = p.Insecure
	if p.CAFile != "" {
		pem, err := readSetting("PULL_CA_FILE", p.CAFile, caLimit)
		if err != nil {
			return nil, err
		}
		if !x509.NewCertPool().AppendCertsFromPEM(pem) {
			return nil, unusable("PULL_CA_FILE", p.CAFile, "it has no certificate in PEM")
		}
		cfg.RegistryCA = string(pem)
	}
	if p.AuthFile == "" {
		return nil, nil
	}
	text, err := readSetting("PULL_AUTH_FILE", p.AuthFile, 0)
	if err != nil {
		return nil, err
	}
	var doc struct {
		Auths map[string]json.RawMessage `json:"auths"`
	}
	if json.Unmarshal(text, &doc) != nil {
		return nil, unusable("PULL_AUTH_FILE", p.AuthFile, `it is not a docker configuration, {"auths": {"REGISTRY": {"auth": "..."}}}`)
	}
	if len(doc.Auths) == 0 {
		return nil, nil
	}
	// Without what docker has beside the credentials, on one line.
	if text, err = json.Marshal(doc); err != nil {
		return nil, err
	}
	if len(text) > authLimit {
		return nil, unusable("PULL_AUTH_FILE", p.AuthFile, fmt.Sprintf("its credentials have %d bytes and a machine's user data takes %d; leave out registries that pods do not need", len(text), authLimit))
	}
	return []userdata.File{{Path: podvmconfig.AuthPath, Content: append(text, '\n')}}, nil
}

// readSetting reads the file of a setting; limit bounds it, bytes, 0 does not.
func readSetting(key, path string, limit int) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, unusable(key, path, err.Error())
	}
	if limit > 0 && len(b) > limit {
		return nil, unusable(key, path, fmt.Sprintf("it has %d bytes and a machine's user data takes %d", len(b), limit))
	}
	return b, nil
}

func unusable(key, path, why string) error {
	return fmt.Errorf("%s is %s: %s: %w", key, path, why, errdefs.ErrFailedPrecondition)
}
