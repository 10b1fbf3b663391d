// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/caa/store"
	"github.com/kata-remote/kata-remote/cloud"
)

// Request is what CreateVM was asked. Annotations are those of kata's remote
// hypervisor (reference: kata virtcontainers/remote.go); a stock shim sends nine
// keys always, "" or "0" for what nobody asked for. Keys not known are ignored.
type Request struct {
	ID          string
	Annotations map[string]string
	NetNS       string // path of the pod's network namespace
}

// idRule is containerd's rule for identifiers (pkg/identifiers), which keeps ids
// usable as file names.
var idRule = regexp.MustCompile(`^[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*$`)

// maxIDBytes is containerd's too.
const maxIDBytes = 76

type parsed struct {
	pod    store.Pod
	size   cloud.Size
	digest string
}

// parse checks a request. InvalidArgument, every problem on its own line, each
// naming the key and the value.
func (r Request) parse() (parsed, error) {
	var (
		p    parsed
		errs []error
	)
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }

	if len(r.ID) > maxIDBytes || !idRule.MatchString(r.ID) {
		return p, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(
			"sandbox id %q: want 1 to %d letters and digits, with single '.', '_' or '-' between them", r.ID, maxIDBytes))
	}
	if r.NetNS == "" {
		bad("no network namespace: networkNamespacePath is empty; a pod with host networking cannot have a VM of its own")
	} else if !strings.HasPrefix(r.NetNS, "/") {
		bad("network namespace %q: networkNamespacePath must be an absolute path", r.NetNS)
	}
	number := func(key string, what string) int {
		v := strings.TrimSpace(r.Annotations[key])
		if v == "" {
			return 0
		}
		n, err := strconv.ParseUint(v, 10, 31)
		if err != nil {
			bad("annotation %s: %q is not a %s; give a whole number of 0 or more", key, v, what)
		}
		return int(n)
	}
	p.pod = r.pod()
	p.size = cloud.Size{
		Type:      strings.TrimSpace(r.Annotations[annotation.MachineType]),
		VCPUs:     number(annotation.DefaultVCPUs, "number of vCPUs"),
		MemoryMiB: number(annotation.DefaultMemory, "number of MiB"),
		GPUs:      number(annotation.DefaultGPUs, "number of GPUs"),
		GPUModel:  strings.TrimSpace(r.Annotations[annotation.DefaultGPUModel]),
		Image:     strings.TrimSpace(r.Annotations[annotation.Image]),
	}
	if v := r.Annotations[annotation.InitData]; v != "" {
		bad("annotation %s: init data (%d bytes) is not supported by this adaptor; remove the annotation", annotation.InitData, len(v))
	}
	if err := errors.Join(errs...); err != nil {
		return p, errdefs.ErrInvalidArgument.WithMessage(err.Error())
	}
	p.digest = r.digest()
	return p, nil
}

// pod finds the pod's names. Clients that know no pods (ctr, nerdctl) send none:
// the sandbox's id stands in. CRI-O's name is k8s_<pod>_<namespace>_<uid>_<attempt>.
func (r Request) pod() store.Pod {
	pod := store.Pod{
		Namespace: r.Annotations[annotation.SandboxNamespace],
		Name:      r.Annotations[annotation.SandboxName],
	}
	if pod.Name == "" {
		pod.Name = r.Annotations[annotation.CRIOSandboxName]
	}
	if pod.Namespace == "" {
		pod.Namespace = r.Annotations[annotation.CRIOSandboxNamespace]
	}
	if parts := strings.Split(pod.Name, "_"); len(parts) == 5 && parts[0] == "k8s" {
		pod.Name = parts[1]
		if pod.Namespace == "" {
			pod.Namespace = parts[2]
		}
	}
	if pod.Name == "" {
		pod.Name = r.ID
	}
	return pod
}

func (r Request) digest() string {
	keys := make([]string, 0, len(r.Annotations))
	for k := range r.Annotations {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	h := sha256.New()
	fmt.Fprintf(h, "%q", r.NetNS)
	for _, k := range keys {
		fmt.Fprintf(h, "%q=%q", k, r.Annotations[k])
	}
	return hex.EncodeToString(h.Sum(nil))
}

// instanceName is podvm-<pod>-<first 8 of the id>, made of [a-z0-9-] and at most 63
// bytes, so that it is a DNS label and a name on every cloud. It is the forwarder's
// name in its certificate, too.
func instanceName(pod, id string) string {
	const prefix, maxLen = "podvm-", 63
	suffix := sanitise(id)
	if len(suffix) > 8 {
		suffix = strings.Trim(suffix[:8], "-")
	}
	name := sanitise(pod)
	if room := maxLen - len(prefix) - 1 - len(suffix); len(name) > room {
		name = strings.TrimRight(name[:room], "-")
	}
	if name == "" {
		return prefix + suffix
	}
	return prefix + name + "-" + suffix
}

func sanitise(s string) string {
	s = strings.Map(func(c rune) rune {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
			return c
		case c >= 'A' && c <= 'Z':
			return c + 'a' - 'A'
		}
		return '-'
	}, s)
	return strings.Trim(s, "-")
}
