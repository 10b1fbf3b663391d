// SPDX-License-Identifier: Apache-2.0

package cloud

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
)

// Tags that every provider puts on everything it makes. No key holds a character
// that one of the clouds refuses in a tag.
const (
	TagPrefix  = "peerpod-"
	TagCluster = TagPrefix + "cluster" // Owner.Cluster
	TagNode    = TagPrefix + "node"    // Owner.Node
	TagToken   = TagPrefix + "token"   // CreateRequest.Token
	TagSandbox = TagPrefix + "sandbox" // CreateRequest.SandboxID
	TagImage   = TagPrefix + "image"   // of what publishing an image makes: "sha256:" and the disk's digest
	TagName    = "Name"                // CreateRequest.Name, where consoles look for it
)

// ReservedTag tells whether key belongs to the providers. Case does not matter:
// some clouds compare tag keys without it.
func ReservedTag(key string) bool {
	k := strings.ToLower(key)
	return strings.HasPrefix(k, TagPrefix) || k == strings.ToLower(TagName)
}

// Limits that hold on every cloud.
const (
	maxTokenBytes = 64 // EC2's ClientToken
	maxNameBytes  = 63 // a DNS label
)

var (
	tokenRule = regexp.MustCompile(`^[!-~]+$`)
	nameRule  = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)
)

// Validate checks what no provider could accept. InvalidArgument, all problems
// joined. Providers call it first in Create.
func (r CreateRequest) Validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("create request: "+format+": %w", append(args, errdefs.ErrInvalidArgument)...))
	}
	if len(r.Token) > maxTokenBytes || !tokenRule.MatchString(r.Token) {
		bad("token %q must be 1 to %d printable ASCII characters", r.Token, maxTokenBytes)
	}
	if len(r.Name) > maxNameBytes || !nameRule.MatchString(r.Name) {
		bad("name %q must be 1 to %d of [a-z0-9-], no dash first or last", r.Name, maxNameBytes)
	}
	if r.SandboxID == "" {
		bad("sandbox id is empty")
	}
	if r.Owner.Cluster == "" || r.Owner.Node == "" {
		bad("owner needs cluster and node, got cluster %q and node %q", r.Owner.Cluster, r.Owner.Node)
	}
	keys := make([]string, 0, len(r.Tags))
	for k := range r.Tags {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		if k == "" {
			bad("a tag has an empty key")
		} else if ReservedTag(k) {
			bad("tag %q is the provider's own; remove it from TAGS", k)
		}
	}
	return errors.Join(errs...)
}

// Fingerprint is equal for two requests exactly when they ask for the same
// instance; the token and the progress are left out. It reveals nothing of the user data and may be
// stored.
func (r CreateRequest) Fingerprint() string {
	r.Token = ""
	if len(r.Tags) == 0 {
		r.Tags = nil
	}
	if len(r.UserData) == 0 {
		r.UserData = nil
	}
	b, err := json.Marshal(r) // map keys are sorted by encoding/json
	if err != nil {
		panic(fmt.Sprintf("cloud: a create request of plain fields does not marshal: %v", err))
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// LogValue keeps the user data, which holds keys, out of logs.
func (r CreateRequest) LogValue() slog.Value {
	return slog.GroupValue(
		slog.String("token", r.Token), slog.String("name", r.Name), slog.String("sandbox", r.SandboxID),
		slog.Any("owner", r.Owner), slog.Any("plan", r.Plan), slog.Int("user_data_bytes", len(r.UserData)))
}
