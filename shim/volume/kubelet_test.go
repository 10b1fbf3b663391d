// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/guest"
	"github.com/kata-remote/kata-remote/shim/shimtest"
	"github.com/kata-remote/kata-remote/shim/volume/volumetest"
)

// patience bounds what a test waits for; a machine busy with other tests is slow.
const patience = 60 * time.Second

// kubelet is a kubelet's directory of one pod.
type kubelet struct {
	t    *testing.T
	root string
}

func newKubelet(t *testing.T) kubelet { return kubelet{t, t.TempDir()} }

func (k kubelet) path(parts ...string) string {
	return filepath.Join(append([]string{k.root, "pods", "uid"}, parts...)...)
}

func (k kubelet) must(errs ...error) {
	k.t.Helper()
	if err := errors.Join(errs...); err != nil {
		k.t.Fatal(err)
	}
}

func (k kubelet) dir(parts ...string) string {
	k.t.Helper()
	p := k.path(parts...)
	k.must(os.MkdirAll(p, 0o755))
	return p
}

func (k kubelet) file(content string, parts ...string) string {
	k.t.Helper()
	p := k.path(parts...)
	k.must(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(content), 0o644))
	return p
}

func bind(source, dest string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: dest, Options: append([]string{"rbind", "rprivate"}, options...)}
}

func (k kubelet) writer(kind, name string) *volumetest.Writer {
	return &volumetest.Writer{Dir: k.dir("volumes", "kubernetes.io~"+kind, name)}
}

// pod is a Set with a guest behind an adaptor.
type pod struct {
	t       *testing.T
	agent   *agenttest.Agent
	adaptor *shimtest.Adaptor
	conn    *guest.Conn
	set     *Set
}

func newPod(t *testing.T, agent *agenttest.Agent) *pod {
	t.Helper()
	p := &pod{t: t, agent: agent, adaptor: shimtest.NewAdaptor(t, agent), set: NewSet("pod")}
	p.conn = guest.New(guest.Config{Socket: p.adaptor.AgentSocket})
	t.Cleanup(p.conn.Close)
	t.Cleanup(p.set.Close)
	return p
}

// ours is an agent that takes volumes.
func ours() *agenttest.Agent {
	return &agenttest.Agent{Features: []extension.Feature{extension.Volumes}}
}

func (p *pod) features() (out extension.Set) {
	for _, f := range p.agent.Features {
		out = append(out, string(f))
	}
	return out
}

func (p *pod) context() context.Context {
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	p.t.Cleanup(cancel)
	return ctx
}

func (p *pod) plan(container string, mounts ...specs.Mount) (*Plan, error) {
	return p.set.Plan(Request{Container: container, Mounts: mounts, Features: p.features()})
}

// bring brings a container's volumes into the guest and returns the plan.
func (p *pod) bring(container string, mounts ...specs.Mount) *Plan {
	p.t.Helper()
	plan, err := p.plan(container, mounts...)
	if err == nil {
		err = plan.Bring(p.context(), p.conn)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	return plan
}

// eventually waits until f finds nothing wrong.
func (p *pod) eventually(f func() error) {
	p.t.Helper()
	ctx := p.context()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-time.After(2 * time.Millisecond):
		case <-ctx.Done():
			p.t.Fatal(err)
		}
	}
}

// content is what a container sees at its names in a volume.
func (p *pod) content(path string) map[string]string {
	files, _ := p.agent.Volume(path)
	dir := files["..data"].Target
	out := map[string]string{}
	for name, f := range files {
		if rel, ok := strings.CutPrefix(name, dir+"/"); ok && f.Mode&0o170000 == 0o100000 {
			out[rel] = string(f.Data)
		}
	}
	return out
}

func (p *pod) count(method string) (n int) {
	for _, c := range p.agent.Calls() {
		if c == method {
			n++
		}
	}
	return n
}
