// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/smithy-go"
	"github.com/containerd/errdefs"
)

const (
	// callTimeout bounds one API call with its repetitions, headerTimeout the wait
	// for the answer to one of them: a connection that is silently dead costs that
	// much. RunInstances takes 1.5 s (daemonology.net, 2021-08-12), the others less.
	callTimeout   = 30 * time.Second
	headerTimeout = 12 * time.Second
	// nodeTimeout bounds a look at the node's own metadata service, which is on the
	// node or nowhere.
	nodeTimeout = 2 * time.Second
	// maxAttempts is how often a call is made that does not come through. Throttles
	// and capacity errors are not repeated here: the first wait in the caller's
	// loop, the second would ask the same pool again.
	maxAttempts = 3
	maxBackoff  = 2 * time.Second
)

// session is what all calls need.
type session struct {
	api     *ec2.Client
	forget  func() // drops the credential, after the service has refused it
	region  string
	subnets []string // where instances go; "" is the launch template's
	groups  []string // nil: the launch template's
}

// connect finds out what the configuration leaves to the node and makes the client.
func (p *Provider) connect(ctx context.Context) (*session, error) {
	return p.conn.get(ctx, func() (*session, error) {
		s := &session{region: p.cfg.Region, subnets: p.cfg.SubnetIDs, groups: p.cfg.SecurityGroupIDs}
		if p.cfg.LaunchTemplate != "" && len(s.subnets) == 0 {
			s.subnets = []string{""}
		}
		if err := p.askNode(ctx, s); err != nil {
			return nil, err
		}
		base := awssdk.Config{Region: s.region, HTTPClient: p.http}
		if p.cfg.Endpoint != "" {
			base.BaseEndpoint = awssdk.String(p.cfg.Endpoint)
		}
		base.Credentials, s.forget = p.cfg.newCredentials(base)
		base.Retryer = newRetryer
		s.api = ec2.NewFromConfig(base)
		return s, nil
	})
}

// newRetryer repeats what did not come through. The answer that cannot be read is
// among it: every call of ours has an idempotency token or is idempotent.
func newRetryer() awssdk.Retryer {
	return retry.NewStandard(func(o *retry.StandardOptions) {
		o.MaxAttempts, o.MaxBackoff = maxAttempts, maxBackoff
		o.Retryables = slices.Insert(o.Retryables, 0, retry.IsErrorRetryable(retry.IsErrorRetryableFunc(func(err error) awssdk.Ternary {
			var api smithy.APIError
			var cred *credentialError
			switch {
			case errors.As(err, &cred):
				return awssdk.FalseTernary
			case errors.As(err, &api) && throttled(api.ErrorCode()):
				return awssdk.FalseTernary
			case errors.As(err, &api) && rules[api.ErrorCode()].class != nil:
				return awssdk.BoolTernary(rules[api.ErrorCode()].class == errdefs.ErrUnavailable)
			case malformed(err):
				return awssdk.TrueTernary
			}
			return awssdk.UnknownTernary
		})))
	})
}

// askNode completes s from the metadata service of the node, as cloud-api-adaptor
// does, if the node is an EC2 instance.
func (p *Provider) askNode(ctx context.Context, s *session) error {
	var missing []string
	if s.region == "" {
		missing = append(missing, "AWS_REGION")
	}
	if len(s.subnets) == 0 {
		missing = append(missing, "AWS_SUBNET_ID")
	}
	if len(s.groups) == 0 && p.cfg.LaunchTemplate == "" {
		missing = append(missing, "AWS_SG_IDS")
	}
	if len(missing) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	get := metadata(ctx, p.http)
	err := func() error {
		if s.region == "" {
			region, err := get("placement/region")
			if err != nil {
				return err
			}
			s.region = region
		}
		mac, err := get("mac")
		if err != nil {
			return err
		}
		if len(s.subnets) == 0 {
			subnet, err := get("network/interfaces/macs/" + mac + "/subnet-id")
			if err != nil {
				return err
			}
			s.subnets = []string{subnet}
		}
		if len(s.groups) == 0 && p.cfg.LaunchTemplate == "" {
			groups, err := get("network/interfaces/macs/" + mac + "/security-group-ids")
			if err != nil {
				return err
			}
			s.groups = strings.Fields(groups)
		}
		return nil
	}()
	if err != nil {
		return fmt.Errorf("%s not set, and the metadata service of this node does not tell: %w; set %s: %w",
			strings.Join(missing, ", ")+map[bool]string{true: " is", false: " are"}[len(missing) == 1],
			bare(err), strings.Join(missing, " and "), errdefs.ErrInvalidArgument)
	}
	return nil
}

// metadata reads the metadata service of the node.
func metadata(ctx context.Context, client awssdk.HTTPClient) func(path string) (string, error) {
	// The variable is the SDK's own.
	node := imds.New(imds.Options{HTTPClient: client, Endpoint: os.Getenv("AWS_EC2_METADATA_SERVICE_ENDPOINT")})
	return func(path string) (string, error) {
		out, err := node.GetMetadata(ctx, &imds.GetMetadataInput{Path: path})
		if err != nil {
			return "", err
		}
		defer out.Content.Close()
		b, err := io.ReadAll(io.LimitReader(out.Content, 64<<10))
		return strings.TrimSpace(string(b)), err
	}
}

// call makes one API call: it waits for its token, bounds the time, and gives the
// error its class. f is a method of the client. The wait is not part of the bound.
func call[I, O any](ctx context.Context, p *Provider, l *limit, urgent bool, action string,
	f func(*ec2.Client, context.Context, *I, ...func(*ec2.Options)) (*O, error), in *I) (*O, error) {
	s, err := p.connect(ctx)
	if err != nil {
		return nil, err
	}
	if err := l.wait(ctx, urgent); err != nil {
		return nil, fmt.Errorf("%s: %w", action, err)
	}
	begin := time.Now()
	bounded, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	out, err := f(s.api, bounded, in)
	err = classify(ctx, action, err)
	c := code(err)
	switch {
	case throttled(c):
		l.refused()
	case err == nil:
		l.passed()
	case errdefs.IsPermissionDenied(err) && c != codeUnauthorized:
		s.forget() // what refuses this one may accept the next
	}
	p.cfg.Observe(Call{Action: action, Code: c, Err: err, Took: time.Since(begin)})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// newHTTPClient has the SDK's timeouts for connecting, and room for as many
// connections as calls go on at once. AWS_CA_BUNDLE, the SDK's own variable, names
// the authorities to trust instead of the system's.
func newHTTPClient() (awssdk.HTTPClient, error) {
	c := awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
		t.MaxIdleConnsPerHost, t.ResponseHeaderTimeout = 32, headerTimeout
	})
	file := os.Getenv("AWS_CA_BUNDLE")
	if file == "" {
		return c, nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("AWS_CA_BUNDLE: %w; correct or unset it: %w", err, errdefs.ErrInvalidArgument)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("AWS_CA_BUNDLE: %s holds no certificate in PEM; correct or unset it: %w", file, errdefs.ErrInvalidArgument)
	}
	return c.WithTransportOptions(func(t *http.Transport) {
		if t.TLSClientConfig == nil {
			t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		t.TLSClientConfig.RootCAs = pool
	}), nil
}
