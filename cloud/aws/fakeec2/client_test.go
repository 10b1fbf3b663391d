// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// client calls a Server as the command line tools do: signed forms. It is not the
// SDK, which takes a minute and a half to compile; cloud/aws's tests use that.
type client struct {
	t   testing.TB
	s   *Server
	key Key
}

func newClient(t testing.TB, s *Server) *client { return &client{t, s, DefaultKey} }

// tree is an XML element: its text, or its children.
type tree struct {
	XMLName xml.Name
	Text    string `xml:",chardata"`
	Nodes   []tree `xml:",any"`
}

// all returns the elements at a path, such as "reservationSet/item".
func (t tree) all(path string) []tree {
	name, rest, more := strings.Cut(path, "/")
	var out []tree
	for _, n := range t.Nodes {
		if n.XMLName.Local != name {
			continue
		}
		if more {
			out = append(out, n.all(rest)...)
		} else {
			out = append(out, n)
		}
	}
	return out
}

// at is the text of the first element at a path, "" if there is none.
func (t tree) at(path string) string {
	if a := t.all(path); len(a) > 0 {
		return a[0].Text
	}
	return ""
}

// none takes a parameter away that was given before.
const none = "\x00"

// try calls an action with alternating names and values of parameters, of which the
// last wins. The error is an *Error when the service answered one.
func (c *client) try(action string, pairs ...string) (tree, error) {
	form := url.Values{"Action": {action}, "Version": {ec2Version}}
	for i := 0; i < len(pairs); i += 2 {
		form.Set(pairs[i], pairs[i+1])
		if pairs[i+1] == none {
			form.Del(pairs[i])
		}
	}
	if strings.HasPrefix(action, "Assume") || action == "GetCallerIdentity" {
		form.Set("Version", stsVersion)
	}
	r, err := http.NewRequestWithContext(context.Background(), http.MethodPost, "http://ec2.test/", strings.NewReader(form.Encode()))
	if err != nil {
		return tree{}, err
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	c.sign(r, "ec2", []byte(form.Encode()))
	resp, err := c.s.Transport().RoundTrip(r)
	if err != nil {
		return tree{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return tree{}, err
	}
	var out tree
	if err := xml.Unmarshal(body, &out); err != nil {
		return tree{}, err
	}
	if resp.StatusCode != http.StatusOK {
		e := &Error{Status: resp.StatusCode, Code: out.at("Errors/Error/Code"), Message: out.at("Errors/Error/Message")}
		if e.Code == "" {
			e.Code, e.Message = out.at("Error/Code"), out.at("Error/Message")
		}
		return out, e
	}
	return out, nil
}

// do is try for calls that must succeed.
func (c *client) do(action string, pairs ...string) tree {
	c.t.Helper()
	out, err := c.try(action, pairs...)
	if err != nil {
		c.t.Fatalf("%s %v: %v", action, pairs, err)
	}
	return out
}

// fails is try for calls that must be refused with a code.
func (c *client) fails(code, action string, pairs ...string) {
	c.t.Helper()
	_, err := c.try(action, pairs...)
	e, ok := err.(*Error)
	if !ok || e.Code != code {
		c.t.Errorf("%s %v: %v; want %s", action, pairs, err, code)
	}
}

func (c *client) sign(r *http.Request, service string, body []byte) {
	stamp := c.s.cfg.Now().UTC().Format("20060102T150405Z")
	r.Header.Set("X-Amz-Date", stamp)
	signed := []string{"host", "x-amz-date"}
	if c.key.Session != "" {
		r.Header.Set("X-Amz-Security-Token", c.key.Session)
		signed = append(signed, "x-amz-security-token")
	}
	in := r.Clone(r.Context())
	in.Host = r.URL.Host
	scope := []string{stamp[:8], c.s.cfg.Region, service, "aws4_request"}
	r.Header.Set("Authorization", fmt.Sprintf("AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%s",
		c.key.ID, strings.Join(scope, "/"), strings.Join(signed, ";"), signature(in, body, c.key.Secret, stamp, scope, signed)))
}

// launch are the parameters of a launch that succeeds, and more.
func launch(more ...string) []string {
	return append([]string{"ImageId", DefaultImage, "InstanceType", "m6a.large", "SubnetId", DefaultSubnet, "MinCount", "1", "MaxCount", "1",
		"TagSpecification.1.ResourceType", "instance", "TagSpecification.1.Tag.1.Key", "owner", "TagSpecification.1.Tag.1.Value", "test",
		"TagSpecification.2.ResourceType", "volume", "TagSpecification.2.Tag.1.Key", "owner", "TagSpecification.2.Tag.1.Value", "test",
		"TagSpecification.3.ResourceType", "network-interface", "TagSpecification.3.Tag.1.Key", "owner", "TagSpecification.3.Tag.1.Value", "test",
	}, more...)
}

// run launches one instance and returns its id.
func (c *client) run(more ...string) string {
	c.t.Helper()
	id := c.do("RunInstances", launch(more...)...).at("instancesSet/item/instanceId")
	if id == "" {
		c.t.Fatal("RunInstances gave no instance")
	}
	return id
}

// state is what DescribeInstances says of an instance.
func (c *client) state(id string) string {
	c.t.Helper()
	return c.do("DescribeInstances", "InstanceId.1", id).at("reservationSet/item/instancesSet/item/instanceState/name")
}

// clock is one that stands until it is moved.
type clock struct{ at time.Time }

func newClock() *clock { return &clock{time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)} }

func (c *clock) now() time.Time { return c.at }

func (c *clock) add(d time.Duration) { c.at = c.at.Add(d) }

// TestSignature checks the signature against the vendor's own example ("get-vanilla"
// of its Signature Version 4 test suite).
func TestSignature(t *testing.T) {
	r, err := http.NewRequest(http.MethodGet, "http://example.amazonaws.com/", bytes.NewReader(nil))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-Amz-Date", "20150830T123600Z")
	got := signature(r, nil, "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "20150830T123600Z",
		[]string{"20150830", "us-east-1", "service", "aws4_request"}, []string{"host", "x-amz-date"})
	if want := "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"; got != want {
		t.Errorf("signature %s, want %s", got, want)
	}
	if _, err := hex.DecodeString(got); err != nil {
		t.Error(err)
	}
}
