// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
)

// Step is one named step of a sandbox's start, from the adaptor's log.
type Step struct {
	Name   string
	Millis float64
}

// Steps reads the adaptor's log for the steps of a sandbox, in order.
func Steps(log, sandbox string) ([]Step, error) {
	f, err := os.Open(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var steps []Step
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		var line map[string]any
		if json.Unmarshal(s.Bytes(), &line) != nil || line["msg"] != "step done" || line[logkey.Sandbox] != sandbox {
			continue
		}
		name, _ := line[logkey.Step].(string)
		ms, ok := line[logkey.Duration].(float64)
		if name == "" || !ok {
			return nil, fmt.Errorf("%s: a step without name or duration: %s", log, s.Text())
		}
		steps = append(steps, Step{name, ms})
	}
	return steps, s.Err()
}

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// timing gathers where the start of the first pod went, while its log is there.
func (s *Scenario) timing(ctx context.Context) (string, error) {
	steps, err := Steps(s.Bed.Log("adaptor"), s.pod.ID)
	if err != nil {
		return "", err
	}
	if len(steps) < 4 {
		return "", fmt.Errorf("the adaptor's log has %d steps of sandbox %.12s, want reserve, instance, tunnel and agent", len(steps), s.pod.ID)
	}
	bare, err := BareBoot(ctx, s.Bed)
	if err != nil {
		return "", fmt.Errorf("boot a bare virtual machine: %w", err)
	}
	var b strings.Builder
	row := func(name string, ms float64) { fmt.Fprintf(&b, "%-44s %9.1f ms\n", name, ms) }
	rest := millis(s.pod.Took)
	for _, st := range steps {
		row("adaptor: "+st.Name, st.Millis)
		rest -= st.Millis
	}
	row("CNI, containerd, shim and sandbox container", rest)
	row("pod ready (crictl runp)", millis(s.pod.Took))
	row("first container (create and start)", millis(s.ContainerStart))
	row("a bare VM of the same size, to userspace", millis(bare))
	fmt.Fprintf(&b, "pod ready / bare VM: %.2f", millis(s.pod.Took)/millis(bare))
	return b.String(), nil
}
