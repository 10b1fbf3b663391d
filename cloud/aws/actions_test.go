// SPDX-License-Identifier: Apache-2.0

package aws_test

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
)

// allowing is a region whose one user may do these things.
func allowing(actions []string) fakeec2.Config {
	key := fakeec2.DefaultKey
	key.Allow = actions
	return fakeec2.Config{Keys: []fakeec2.Key{key}}
}

func everySetting(c *aws.Config) {
	c.Spot, c.KeyName, c.PlacementGroup, c.PublicIP = aws.SpotFirst, fakeec2.DefaultKeyPair, fakeec2.DefaultPlacementGroup, true
}

// TestLeastPrivilege: a whole life needs the listed actions and no others, and Check
// names each that is missing.
func TestLeastPrivilege(t *testing.T) {
	bubble(t, allowing(aws.Actions), func(t *testing.T, s *fakeec2.Server) { wholeLife(t, s, provider(t, s)) })
	all := slices.Concat(aws.Actions, aws.ActionsFor["AWS_SPOT"], aws.ActionsFor["SSH_KP_NAME"], aws.ActionsFor["AWS_PLACEMENT_GROUP"])
	bubble(t, allowing(all), func(t *testing.T, s *fakeec2.Server) { wholeLife(t, s, provider(t, s, everySetting)) })

	for _, missing := range append(slices.Clone(aws.Actions), aws.ActionsFor["AWS_SPOT"][0]) {
		rest := slices.DeleteFunc(slices.Clone(all), func(a string) bool { return a == missing })
		s := fakeec2.New(allowing(rest))
		err := provider(t, s, everySetting).Check(t.Context())
		if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), strings.TrimPrefix(missing, "ec2:")) {
			t.Errorf("without %s, Check: %v", missing, err)
		}
	}
	for _, key := range slices.Collect(maps.Keys(aws.ActionsFor)) {
		for _, a := range aws.ActionsFor[key] {
			if slices.Contains(aws.Actions, a) {
				t.Errorf("%s for %s is always needed", a, key)
			}
		}
	}
}

func wholeLife(t *testing.T, s *fakeec2.Server, p *aws.Provider) {
	t.Helper()
	if err := p.Check(t.Context()); err != nil {
		t.Error(err)
	}
	inst := mustCreate(t, p, request(t, p, "life"))
	if _, err := p.Get(t.Context(), inst.ID); err != nil {
		t.Error(err)
	}
	if _, err := p.List(t.Context(), cloud.Owner{Cluster: cluster, Node: node}); err != nil {
		t.Error(err)
	}
	clean(t, s, p)
}
