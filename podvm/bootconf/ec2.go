// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/podvm/metadata"
)

// EC2 reads the seed from EC2's instance metadata service.
type EC2 struct {
	URL string // of the service; empty: the real one
}

// ec2TokenTTL is how long a token is good for: the few requests of a start.
const ec2TokenTTL = time.Minute

// Name says what the source is.
func (EC2) Name() string { return "EC2 metadata service" }

// Seed gets user data and host name. NotFound: there is no user data, or the service at
// that address is another cloud's.
func (e EC2) Seed(ctx context.Context) (*Seed, error) {
	c := metadata.New()
	defer c.Close()
	ec2 := metadata.EC2{Client: c, URL: e.URL, TTL: ec2TokenTTL}
	var s Seed
	var err error
	if s.UserData, err = ec2.Get(ctx, "/latest/user-data"); err != nil {
		return nil, err
	}
	if len(s.UserData) == 0 {
		return nil, fmt.Errorf("the user data is empty: %w", errdefs.ErrNotFound)
	}
	// A pod VM works as well without its name, and with a name that cannot be had now.
	if name, err := ec2.Get(ctx, "/latest/meta-data/local-hostname"); err == nil {
		s.Hostname = strings.TrimSpace(string(name))
	}
	return &s, nil
}
