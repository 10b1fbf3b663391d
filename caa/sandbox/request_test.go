// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/caa/store"
	"github.com/kata-remote/kata-remote/cloud"
)

func TestParse(t *testing.T) {
	for name, c := range map[string]struct {
		annotations map[string]string
		pod         store.Pod
		size        cloud.Size
	}{
		"a client without pods": {nil, store.Pod{Name: "id1"}, cloud.Size{}},
		"a stock shim's nine keys": {map[string]string{
			annotation.SandboxName: "nginx", annotation.SandboxNamespace: "default", annotation.MachineType: "", annotation.Image: "",
			annotation.DefaultVCPUs: "0", annotation.DefaultMemory: "0", annotation.InitData: "", annotation.DefaultGPUs: "0", annotation.DefaultGPUModel: "",
		}, store.Pod{Namespace: "default", Name: "nginx"}, cloud.Size{}},
		"a size": {map[string]string{
			annotation.SandboxName: "nginx", annotation.MachineType: "m6a.large", annotation.Image: "ami-1",
			annotation.DefaultVCPUs: "4", annotation.DefaultMemory: "8192", annotation.DefaultGPUs: "1", annotation.DefaultGPUModel: "tesla",
		}, store.Pod{Name: "nginx"}, cloud.Size{Type: "m6a.large", Image: "ami-1", VCPUs: 4, MemoryMiB: 8192, GPUs: 1, GPUModel: "tesla"}},
		"CRI-O": {map[string]string{
			annotation.SandboxName: "k8s_web_prod_0d5e_0",
		}, store.Pod{Namespace: "prod", Name: "web"}, cloud.Size{}},
		"CRI-O's own keys": {map[string]string{
			annotation.CRIOSandboxName: "k8s_web_prod_0d5e_0", annotation.CRIOSandboxNamespace: "prod",
		}, store.Pod{Namespace: "prod", Name: "web"}, cloud.Size{}},
	} {
		p, err := Request{ID: "id1", NetNS: "/run/netns/x", Annotations: c.annotations}.parse()
		if err != nil || p.pod != c.pod || p.size != c.size {
			t.Errorf("%s: %+v, %v; want %+v and %+v", name, p, err, c.pod, c.size)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		r    Request
		want []string
	}{
		"no netns":       {Request{ID: "a"}, []string{"networkNamespacePath"}},
		"relative netns": {Request{ID: "a", NetNS: "run/netns/x"}, []string{"networkNamespacePath", `"run/netns/x"`}},
		"everything at once": {Request{ID: "a", NetNS: "/x", Annotations: map[string]string{
			annotation.DefaultVCPUs: "two", annotation.DefaultMemory: "-1", annotation.DefaultGPUs: "1.5", annotation.InitData: "x = 1",
		}}, []string{annotation.DefaultVCPUs, `"two"`, annotation.DefaultMemory, `"-1"`, annotation.DefaultGPUs, `"1.5"`, annotation.InitData}},
		"huge number":   {Request{ID: "a", NetNS: "/x", Annotations: map[string]string{annotation.DefaultMemory: "99999999999999999999"}}, []string{annotation.DefaultMemory}},
		"no id":         {Request{NetNS: "/x"}, []string{`""`}},
		"id of a path":  {Request{ID: "../../etc", NetNS: "/x"}, []string{`"../../etc"`}},
		"id with colon": {Request{ID: "a:b", NetNS: "/x"}, []string{`"a:b"`}},
		"long id":       {Request{ID: strings.Repeat("a", 77), NetNS: "/x"}, []string{"76"}},
	} {
		_, err := c.r.parse()
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q does not mention %s", name, err, w)
			}
		}
		if strings.Contains(err.Error(), "x = 1") {
			t.Errorf("%s: init data is in the message", name)
		}
	}
}

func TestDigestTellsRequestsApart(t *testing.T) {
	base := Request{ID: "a", NetNS: "/x", Annotations: map[string]string{"a": "1", "b": "2"}}
	if d := (Request{ID: "a", NetNS: "/x", Annotations: map[string]string{"b": "2", "a": "1"}}).digest(); d != base.digest() {
		t.Error("the order of annotations changes the digest")
	}
	for _, other := range []Request{
		{ID: "a", NetNS: "/y", Annotations: base.Annotations},
		{ID: "a", NetNS: "/x", Annotations: map[string]string{"a": "1"}},
		{ID: "a", NetNS: "/x", Annotations: map[string]string{"a": "1\"b=2", "b": ""}},
	} {
		if other.digest() == base.digest() {
			t.Errorf("%+v has the digest of %+v", other, base)
		}
	}
}

func TestInstanceName(t *testing.T) {
	rule := regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)
	id := strings.Repeat("0123456789abcdef", 4)
	for _, c := range []struct{ pod, id, want string }{
		{"nginx", id, "podvm-nginx-01234567"},
		{"My_Pod.v2", id, "podvm-my-pod-v2-01234567"},
		{"-.-", id, "podvm-01234567"},
		{"ünïcode", id, ""},
		{strings.Repeat("x", 253), id, "podvm-" + strings.Repeat("x", 48) + "-01234567"},
		{strings.Repeat("x", 47) + "-y", id, "podvm-" + strings.Repeat("x", 47) + "-01234567"},
		{"a", "b", "podvm-a-b"},
		{"a", "test_one", "podvm-a-test-one"},
	} {
		got := instanceName(c.pod, c.id)
		if c.want != "" && got != c.want {
			t.Errorf("instanceName(%q, %q) = %q, want %q", c.pod, c.id, got, c.want)
		}
		if len(got) > 63 || !rule.MatchString(got) {
			t.Errorf("instanceName(%q, %q) = %q is not a DNS label", c.pod, c.id, got)
		}
	}
}

func FuzzInstanceName(f *testing.F) {
	rule := regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)
	f.Add("nginx", "a1")
	f.Fuzz(func(t *testing.T, pod, id string) {
		if !idRule.MatchString(id) {
			return
		}
		if got := instanceName(pod, id); len(got) > 63 || !rule.MatchString(got) {
			t.Errorf("instanceName(%q, %q) = %q", pod, id, got)
		}
	})
}
