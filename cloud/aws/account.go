// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ebs"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// Account makes API calls for what a person does now and then (publish an image, open
// ports), with the provider's credentials and its table of errors. It is safe for
// concurrent use.
type Account struct {
	cfg  Config
	http awssdk.HTTPClient
	conn lazy[*clients]
}

type clients struct {
	ec2    *ec2.Client
	ebs    *ebs.Client
	forget func()
}

// NewAccount takes of cfg the region, the endpoint and the credentials. It asks nobody
// anything. InvalidArgument: all that is wrong, each with its key.
func NewAccount(cfg Config) (*Account, error) {
	var errs []string
	cfg.checkAccount(func(format string, args ...any) { errs = append(errs, fmt.Sprintf(format, args...)) })
	if len(errs) > 0 {
		return nil, fmt.Errorf("%s: %w", strings.Join(errs, "\n"), errdefs.ErrInvalidArgument)
	}
	if cfg.Observe == nil {
		cfg.Observe = func(Call) {}
	}
	a := &Account{cfg: cfg}
	if a.http = cfg.HTTPClient; cfg.HTTPClient == nil {
		var err error
		if a.http, err = newHTTPClient(); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// Close lets go of idle connections.
func (a *Account) Close() {
	if c, ok := a.http.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

func (a *Account) connect(ctx context.Context) (*clients, error) {
	return a.conn.get(ctx, func() (*clients, error) {
		base := awssdk.Config{Region: a.cfg.Region, HTTPClient: a.http, Retryer: newRetryer}
		if base.Region == "" {
			ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
			defer cancel()
			var err error
			if base.Region, err = metadata(ctx, a.http)("placement/region"); err != nil {
				return nil, fmt.Errorf("AWS_REGION is not set, and there is no metadata service here that tells: set it: %w", errdefs.ErrInvalidArgument)
			}
		}
		if a.cfg.Endpoint != "" {
			base.BaseEndpoint = awssdk.String(a.cfg.Endpoint)
		}
		c := &clients{}
		base.Credentials, c.forget = a.cfg.newCredentials(base)
		c.ec2, c.ebs = ec2.NewFromConfig(base), ebs.NewFromConfig(base)
		return c, nil
	})
}

// CallEC2 makes a call that may be repeated: one that reads, or has a token, or whose
// repetition fails by an error that the caller expects. f is a method of the client.
// While the service throttles, or does not answer, it waits and asks again, for two
// minutes. Errors have the classes of the provider's.
func CallEC2[I, O any](ctx context.Context, a *Account, action string, f func(*ec2.Client, context.Context, *I, ...func(*ec2.Options)) (*O, error), in *I) (*O, error) {
	return persist(ctx, a, action, func(ctx context.Context, c *clients) (*O, error) { return f(c.ec2, ctx, in) })
}

// CallEBS is CallEC2 for the EBS direct API. in makes the input anew for each attempt,
// for its body is used up.
func CallEBS[I, O any](ctx context.Context, a *Account, action string, f func(*ebs.Client, context.Context, *I, ...func(*ebs.Options)) (*O, error), in func() *I) (*O, error) {
	return persist(ctx, a, "ebs:"+action, func(ctx context.Context, c *clients) (*O, error) { return f(c.ebs, ctx, in()) })
}

// Waits between attempts: as long as the smallest buckets of the service take to have
// a token again, and doubling; until patience is over, which outlasts what the service
// calls a brief outage.
const (
	firstPause = 500 * time.Millisecond
	mostPause  = 15 * time.Second
	patience   = 2 * time.Minute
)

func persist[O any](ctx context.Context, a *Account, action string, f func(context.Context, *clients) (*O, error)) (*O, error) {
	c, err := a.connect(ctx)
	if err != nil {
		return nil, err
	}
	end := time.Now().Add(patience)
	for pause := firstPause; ; pause = min(2*pause, mostPause) {
		begin := time.Now()
		bounded, cancel := context.WithTimeout(ctx, callTimeout)
		out, err := f(bounded, c)
		cancel()
		err = classify(ctx, action, err)
		a.cfg.Observe(Call{Action: action, Code: code(err), Err: err, Took: time.Since(begin)})
		if err == nil {
			return out, nil
		}
		if !errdefs.IsUnavailable(err) || time.Now().Add(pause).After(end) {
			return nil, err
		}
		if err := cloud.Pause(ctx, pause); err != nil {
			return nil, fmt.Errorf("%s: %w", action, err)
		}
	}
}

// ErrorCode is the service's code for an error, such as "InvalidAMIName.Duplicate"; ""
// where there is none.
func ErrorCode(err error) string { return code(err) }

var providerIDRule = regexp.MustCompile(`^aws:///(([a-z]{2,}(?:-[a-z]+)+-[0-9]+)[a-z0-9-]*)/(i-(?:` + idHex + `))$`)

// ParseProviderID takes the provider id of a node apart
// (aws:///us-east-1a/i-0123456789abcdef0; `kubectl get node -o
// jsonpath={.items[*].spec.providerID}` prints them) into its region and the id of its
// instance.
func ParseProviderID(s string) (region, instance string, err error) {
	m := providerIDRule.FindStringSubmatch(s)
	if m == nil {
		return "", "", fmt.Errorf("provider id %q is not of the form aws:///us-east-1a/i-0123456789abcdef0: %w", s, errdefs.ErrInvalidArgument)
	}
	return m[2], m[3], nil
}

// As is errors.As on what the SDK said, which the provider's errors do not show.
func As(err error, target any) bool {
	var e *apiError
	return errors.As(err, &e) && errors.As(e.cause, target)
}
