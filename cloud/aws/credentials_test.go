// SPDX-License-Identifier: Apache-2.0

package aws_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
)

// works tells whether a call is let through now.
func works(t *testing.T, p *aws.Provider) error {
	t.Helper()
	_, err := p.List(t.Context(), cloud.Owner{Cluster: cluster})
	return err
}

// rotate makes another key valid in place of the server's.
func rotate(s *fakeec2.Server, old, id string) fakeec2.Key {
	k := fakeec2.Key{ID: id, Secret: "secret-of-" + id, User: "peer-pods"}
	s.SetKey(k)
	s.RemoveKey(old)
	return k
}

func TestKeysChange(t *testing.T) {
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		defer s.SetKey(fakeec2.DefaultKey)
		keys, lookups := aws.Keys{AccessKeyID: fakeec2.DefaultKey.ID, SecretAccessKey: aws.Secret(fakeec2.DefaultKey.Secret)}, 0
		var fail error
		p := provider(t, s, func(c *aws.Config) {
			c.Keys = aws.Keys{}
			c.LookUpKeys = func() (aws.Keys, error) { lookups++; return keys, fail }
		})
		for range 20 {
			if err := works(t, p); err != nil {
				t.Fatal(err)
			}
		}
		if lookups != 1 {
			t.Errorf("%d look-ups for a burst of calls", lookups)
		}
		k := rotate(s, fakeec2.DefaultKey.ID, "AKIAIOSFODNN7SECOND0")
		keys = aws.Keys{AccessKeyID: k.ID, SecretAccessKey: aws.Secret(k.Secret)}
		err := works(t, p) // with the old one, which is forgotten then
		if !errdefs.IsPermissionDenied(err) {
			t.Errorf("the old key: %v", err)
		}
		says(t, err, "AWS_ACCESS_KEY_ID")
		if err := works(t, p); err != nil {
			t.Errorf("the new key: %v", err)
		}
		// A new key that comes before the old one is refused is used soon.
		other := fakeec2.Key{ID: "AKIAIOSFODNN7THIRD00", Secret: "third", User: "peer-pods"}
		s.SetKey(other)
		keys = aws.Keys{AccessKeyID: other.ID, SecretAccessKey: "third"}
		time.Sleep(11 * time.Second) // of the bubble
		s.RemoveKey(k.ID)
		if err := works(t, p); err != nil {
			t.Errorf("the third key: %v", err)
		}
		fail = errors.New("the Secret is being written")
		time.Sleep(11 * time.Second)
		if err := works(t, p); !errdefs.IsPermissionDenied(err) || strings.Contains(err.Error(), "third") {
			t.Errorf("keys that cannot be read: %v", err)
		}
	})
}

// jwt is a token as a cluster issues it, without a signature.
func jwt(t *testing.T, expires time.Time) []byte {
	t.Helper()
	claims, err := json.Marshal(map[string]any{"sub": "system:serviceaccount:ns:adaptor", "aud": []string{"sts.amazonaws.com"}, "exp": expires.Unix()})
	if err != nil {
		t.Fatal(err)
	}
	e := base64.RawURLEncoding.EncodeToString
	return []byte(e([]byte(`{"alg":"RS256"}`)) + "." + e(claims) + "." + e([]byte("signature")))
}

func TestWebIdentity(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		write := func(token []byte) {
			if err := os.WriteFile(file, token, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		p := provider(t, s, func(c *aws.Config) {
			c.Keys = aws.Keys{}
			c.RoleARN, c.WebIdentityTokenFile = "arn:aws:iam::"+fakeec2.DefaultAccount+":role/peer-pods", file
		})
		err := works(t, p)
		if !errdefs.IsPermissionDenied(err) {
			t.Errorf("no file: %v", err)
		}
		says(t, err, file, "AWS_ROLE_ARN")
		write(jwt(t, time.Now().Add(time.Hour)))
		if err := works(t, p); err != nil {
			t.Fatal(err)
		}
		assumed := s.Calls("AssumeRoleWithWebIdentity")
		time.Sleep(30 * time.Second) // of the bubble
		if err := works(t, p); err != nil || s.Calls("AssumeRoleWithWebIdentity") != assumed {
			t.Errorf("a little later: %v, and the role was assumed %d times", err, s.Calls("AssumeRoleWithWebIdentity")-assumed)
		}
		write([]byte("another, longer, and no token at all"))
		time.Sleep(11 * time.Second)
		err = works(t, p)
		if !errdefs.IsPermissionDenied(err) {
			t.Errorf("a changed file: %v", err)
		}
		says(t, err, "AWS_WEB_IDENTITY_TOKEN_FILE")
		write(jwt(t, time.Now().Add(10*time.Hour)))
		if err := works(t, p); err != nil {
			t.Errorf("a good one again: %v", err)
		}
		time.Sleep(2 * time.Hour) // the credential has ended, the token has not
		if err := works(t, p); err != nil {
			t.Errorf("hours later: %v", err)
		}
	})
}

func TestProfile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "credentials")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", file)
	t.Setenv("AWS_CONFIG_FILE", filepath.Join(dir, "config"))
	for _, k := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN", "AWS_CA_BUNDLE"} {
		t.Setenv(k, "")
	}
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		defer s.SetKey(fakeec2.DefaultKey)
		write := func(k fakeec2.Key) {
			text := fmt.Sprintf("[other]\naws_access_key_id = x\naws_secret_access_key = y\n[pods]\naws_access_key_id = %s\naws_secret_access_key = %s\n", k.ID, k.Secret)
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write(fakeec2.DefaultKey)
		p := provider(t, s, func(c *aws.Config) { c.Keys, c.Profile = aws.Keys{}, "pods" })
		if err := works(t, p); err != nil {
			t.Fatal(err)
		}
		write(rotate(s, fakeec2.DefaultKey.ID, "AKIAIOSFODNN7ANOTHERKEY"))
		time.Sleep(11 * time.Second) // of the bubble
		if err := works(t, p); err != nil {
			t.Errorf("a changed file: %v", err)
		}
	})
}

// What the configuration leaves out comes from the node, where that is an instance.
func TestNode(t *testing.T) {
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "")
	bubble(t, fakeec2.Config{StartTime: time.Second}, func(t *testing.T, s *fakeec2.Server) {
		first := provider(t, s, func(c *aws.Config) { c.SubnetIDs = []string{fakeec2.DefaultSubnetC} })
		worker := running(t, first, mustCreate(t, first, request(t, first, "worker")).ID)
		left := func(c *aws.Config) {
			c.Region, c.SubnetIDs, c.SecurityGroupIDs = "", nil, nil
			c.HTTPClient = &http.Client{Transport: node169{s.Transport(), s.Metadata(string(worker.ID))}}
		}
		p := provider(t, s, left)
		mustCreate(t, p, request(t, p, "a"))
		if i := alive(s)[1]; i.Subnet != fakeec2.DefaultSubnetC {
			t.Errorf("made %+v", i)
		}
		if err := p.Check(t.Context()); err != nil {
			t.Error(err)
		}
		nowhere := provider(t, s, left, func(c *aws.Config) {
			c.HTTPClient = &http.Client{Transport: node169{s.Transport(), http.NotFoundHandler()}}
		})
		_, err := nowhere.Plan(t.Context(), cloud.Size{})
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v, want InvalidArgument", err)
		}
		says(t, err, "AWS_REGION", "AWS_SUBNET_ID", "AWS_SG_IDS")
	})
}

func TestSecretsAreNotShown(t *testing.T) {
	cfg := baseConfig(fakeec2.New(fakeec2.Config{}))
	cfg.HTTPClient = nil
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("configuration", "config", cfg.Keys, "secret", cfg.Keys.SecretAccessKey)
	j, err := json.Marshal(cfg.Keys)
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range []string{log.String(), string(j), fmt.Sprint(cfg.Keys), fmt.Sprintf("%+v %#v %q %x", cfg.Keys, cfg.Keys, cfg.Keys, cfg.Keys)} {
		if strings.Contains(shown, fakeec2.DefaultKey.Secret) || strings.Contains(shown, fmt.Sprintf("%x", fakeec2.DefaultKey.Secret)) || !strings.Contains(shown, fakeec2.DefaultKey.ID) {
			t.Errorf("shown: %s", shown)
		}
	}
}
