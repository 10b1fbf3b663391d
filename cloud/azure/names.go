// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// tagRequest holds cloud.CreateRequest.Fingerprint, shortened, so that a token that
// comes with another request is noticed.
const tagRequest = cloud.TagPrefix + "request"

// Limits of tags: learn.microsoft.com, "Use tags to organize your Azure resources".
const (
	maxTags        = 50
	maxTagKey      = 512
	maxTagValue    = 256
	badInTagKey    = `<>%&\?/`
	fingerprintLen = 32 // hex digits: 128 bits
)

// place is one resource group.
type place struct{ subscription, group string }

func (l place) path() string {
	return "/subscriptions/" + l.subscription + "/resourceGroups/" + l.group
}

// things are the resources of one instance. Their names follow from the token, so
// that whatever a lost reply has left can be named again.
type things struct {
	place
	name string // the VM's
}

// nameOf derives the VM's name from the token alone. A name that held anything else
// of the request would let one token make two VMs. What people call the instance is
// its tag Name and its host name.
func nameOf(token string) string {
	sum := sha256.Sum256([]byte("peerpod instance\x00" + token))
	return "podvm-" + hex.EncodeToString(sum[:12])
}

func (t things) id() cloud.InstanceID { return cloud.InstanceID(t.vm()) }

func (t things) vm() string {
	return t.path() + "/providers/Microsoft.Compute/virtualMachines/" + t.name
}
func (t things) disk() string {
	return t.path() + "/providers/Microsoft.Compute/disks/" + t.name + diskSuffix
}
func (t things) nic() string {
	return t.path() + "/providers/Microsoft.Network/networkInterfaces/" + t.name + nicSuffix
}
func (t things) ip() string {
	return t.path() + "/providers/Microsoft.Network/publicIPAddresses/" + t.name + ipSuffix
}

// rest is all that belongs to the VM.
func (t things) rest() []string { return []string{t.nic(), t.disk(), t.ip()} }

const (
	diskSuffix = "-disk"
	nicSuffix  = "-net"
	ipSuffix   = "-ip"
)

var (
	idRule   = regexp.MustCompile(`^/subscriptions/([0-9a-f-]{36})/resourceGroups/([-\p{L}\p{N}_().]{1,90})/providers/Microsoft\.Compute/virtualMachines/(podvm-[0-9a-f]{24})$`)
	nameRule = regexp.MustCompile(`^podvm-[0-9a-f]{24}`)
)

// parseID reads an instance's id. NotFound: it is not one of ours, and nobody else's
// is ever touched.
func parseID(id cloud.InstanceID) (things, error) {
	m := idRule.FindStringSubmatch(string(id))
	if m == nil || !groupRule.MatchString(m[2]) {
		return things{}, fmt.Errorf("%q is not the id of an instance: %w", id, errdefs.ErrNotFound)
	}
	return things{place{m[1], m[2]}, m[3]}, nil
}

// tagsOf are the tags of all that is made for a request.
func tagsOf(req cloud.CreateRequest) map[string]*string {
	tags := map[string]*string{}
	for k, v := range req.Tags {
		tags[k] = &v
	}
	for k, v := range map[string]string{
		cloud.TagName: req.Name, cloud.TagToken: req.Token, cloud.TagSandbox: req.SandboxID,
		cloud.TagCluster: req.Owner.Cluster, cloud.TagNode: req.Owner.Node,
		tagRequest: fingerprint(req),
	} {
		tags[k] = &v
	}
	return tags
}

func fingerprint(req cloud.CreateRequest) string { return req.Fingerprint()[:fingerprintLen] }

// checkTags finds what Azure would refuse.
func checkTags(tags map[string]*string) error {
	if len(tags) > maxTags {
		return badKey("TAGS", "and our own are %d tags, Azure takes %d", len(tags), maxTags)
	}
	for k, v := range tags {
		if len(k) > maxTagKey || strings.ContainsAny(k, badInTagKey) {
			return badKey("TAGS", "has the key %q; Azure takes %d characters, none of %s", k, maxTagKey, badInTagKey)
		}
		if len(*v) > maxTagValue {
			return badKey("TAGS", "has a value of %d characters for %q; Azure takes %d", len(*v), k, maxTagValue)
		}
	}
	return nil
}

// tag reads a tag; Azure compares keys without regard to case.
func tag(tags map[string]*string, key string) string {
	if v := tags[key]; v != nil {
		return *v
	}
	for k, v := range tags {
		if v != nil && strings.EqualFold(k, key) {
			return *v
		}
	}
	return ""
}

// tagged fills in what the tags say of an instance.
func tagged(t things, tags map[string]*string) cloud.Instance {
	return cloud.Instance{
		ID: t.id(), Name: tag(tags, cloud.TagName), Token: tag(tags, cloud.TagToken), SandboxID: tag(tags, cloud.TagSandbox),
		Owner: cloud.Owner{Cluster: tag(tags, cloud.TagCluster), Node: tag(tags, cloud.TagNode)},
	}
}

func owned(o, by cloud.Owner) bool {
	return o.Cluster == by.Cluster && (by.Node == "" || o.Node == by.Node)
}
