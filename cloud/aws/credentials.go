// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

const (
	// lookAgain is how long a credential that may change is used without a look:
	// above what a burst of calls needs, below what a person waits after a change.
	lookAgain = 10 * time.Second
	// renewBefore is how long before its end a role's credential is renewed.
	renewBefore = 5 * time.Minute
	// roleSession is what the account's log of calls shows (CloudTrail).
	roleSession = "peer-pods"
)

// credentialError is a credential that could not be had.
type credentialError struct {
	action string
	err    error
}

func (e *credentialError) Error() string { return e.action + ": " + e.err.Error() }
func (e *credentialError) Unwrap() error { return e.err }

// newCredentials chooses where credentials come from. The SDK's own sources read
// files once; those here are asked every lookAgain and read what has changed.
// forget drops one that the service has refused.
func (c Config) newCredentials(base awssdk.Config) (p awssdk.CredentialsProvider, forget func()) {
	var source *changing
	switch {
	case c.LookUpKeys != nil, c.Keys.AccessKeyID != "":
		cache := awssdk.NewCredentialsCache(&keySource{c})
		return cache, cache.Invalidate
	case c.RoleARN != "":
		source = &changing{
			files: []string{c.WebIdentityTokenFile},
			open: func(context.Context) (awssdk.CredentialsProvider, error) {
				client := sts.NewFromConfig(base, func(o *sts.Options) { o.Credentials = awssdk.AnonymousCredentials{} })
				return stscreds.NewWebIdentityRoleProvider(client, c.RoleARN, stscreds.IdentityTokenFile(c.WebIdentityTokenFile),
					func(o *stscreds.WebIdentityRoleOptions) { o.RoleSessionName = roleSession }), nil
			},
			action: "the role of AWS_ROLE_ARN",
		}
	default:
		source = &changing{
			files: sharedFiles(),
			open: func(ctx context.Context) (awssdk.CredentialsProvider, error) {
				opts := []func(*config.LoadOptions) error{config.WithRegion(base.Region), config.WithHTTPClient(base.HTTPClient)}
				if c.Profile != "" {
					opts = append(opts, config.WithSharedConfigProfile(c.Profile))
				}
				if c.Endpoint != "" {
					opts = append(opts, config.WithBaseEndpoint(c.Endpoint))
				}
				cfg, err := config.LoadDefaultConfig(ctx, opts...)
				return cfg.Credentials, err
			},
			action: "the SDK's chain of credentials",
		}
	}
	cache := awssdk.NewCredentialsCache(source)
	return cache, func() { source.forget(); cache.Invalidate() }
}

// sharedFiles are those of the SDK's chain that a credential may be in.
func sharedFiles() []string {
	var files []string
	home, _ := os.UserHomeDir()
	for key, name := range map[string]string{"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"} {
		if f := os.Getenv(key); f != "" {
			files = append(files, f)
		} else if home != "" {
			files = append(files, filepath.Join(home, ".aws", name))
		}
	}
	if f := os.Getenv("AWS_WEB_IDENTITY_TOKEN_FILE"); f != "" {
		files = append(files, f)
	}
	return files
}

// keySource gives the keys of the configuration, or of Config.LookUpKeys.
type keySource struct{ cfg Config }

func (s *keySource) Retrieve(context.Context) (awssdk.Credentials, error) {
	keys := s.cfg.Keys
	if s.cfg.LookUpKeys != nil {
		var err error
		if keys, err = s.cfg.LookUpKeys(); err != nil {
			return awssdk.Credentials{}, &credentialError{"look up the keys", err}
		}
	}
	if keys.AccessKeyID == "" || keys.SecretAccessKey == "" {
		return awssdk.Credentials{}, &credentialError{"look up the keys", errors.New("AWS_ACCESS_KEY_ID or AWS_SECRET_ACCESS_KEY is empty")}
	}
	return awssdk.Credentials{
		AccessKeyID: keys.AccessKeyID, SecretAccessKey: string(keys.SecretAccessKey), SessionToken: string(keys.SessionToken),
		CanExpire: s.cfg.LookUpKeys != nil, Expires: time.Now().Add(lookAgain),
	}, nil
}

// changing keeps the credential of a source until it ends or one of the source's
// files changes; then the source is opened anew.
type changing struct {
	files  []string
	open   func(context.Context) (awssdk.CredentialsProvider, error)
	action string // for error texts

	mu     sync.Mutex
	stamps []stamp                    // of files, when creds was made; guarded by mu
	source awssdk.CredentialsProvider // guarded by mu
	creds  awssdk.Credentials         // guarded by mu
}

// stamp tells one content of a file from another.
type stamp struct {
	mtime time.Time
	size  int64
}

func stampOf(file string) stamp {
	i, err := os.Stat(file) // follows links: that is how a mounted Secret changes
	if err != nil {
		return stamp{}
	}
	return stamp{i.ModTime(), i.Size()}
}

// Retrieve implements awssdk.CredentialsProvider. The cache above it asks one at a time.
func (c *changing) Retrieve(ctx context.Context) (awssdk.Credentials, error) {
	now := time.Now()
	stamps := make([]stamp, len(c.files))
	same := true
	c.mu.Lock()
	for i, f := range c.files {
		stamps[i] = stampOf(f)
		same = same && i < len(c.stamps) && stamps[i] == c.stamps[i]
	}
	creds, source := c.creds, c.source
	c.mu.Unlock()
	if !same || source == nil {
		var err error
		if source, err = c.open(ctx); err != nil {
			return awssdk.Credentials{}, &credentialError{c.action, err}
		}
		creds = awssdk.Credentials{}
	}
	if !creds.HasKeys() || creds.CanExpire && now.Add(renewBefore).After(creds.Expires) {
		var err error
		if creds, err = source.Retrieve(ctx); err != nil {
			return awssdk.Credentials{}, &credentialError{c.action, err}
		}
	}
	c.mu.Lock()
	c.stamps, c.source, c.creds = stamps, source, creds
	c.mu.Unlock()
	if next := now.Add(lookAgain); !creds.CanExpire || next.Before(creds.Expires) {
		creds.CanExpire, creds.Expires = true, next
	}
	return creds, nil
}

// forget makes the next Retrieve ask the source, after the service has refused what it gave.
func (c *changing) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.creds, c.source = awssdk.Credentials{}, nil
}
