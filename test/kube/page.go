// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/kata-remote/kata-remote/test/compat"
	"github.com/kata-remote/kata-remote/test/kube/cluster"
	"github.com/kata-remote/kata-remote/test/kube/conformance"
)

// command is what a reader types to have the page written again.
const command = "make e2e-k8s"

// writePage puts the verdicts into docs/compatibility.md.
func (b *bench) writePage(ctx context.Context, verdicts []conformance.Verdict) error {
	kubernetes, containerd, err := b.cluster.Versions(ctx)
	if err != nil {
		return err
	}
	var text strings.Builder
	onRunc, onKata, excluded, again := 0, 0, 0, 0
	var rows [][]string
	for _, v := range verdicts {
		if v.Runc.State == conformance.StatePassed {
			onRunc++
		}
		kata := word(v.Kata)
		switch {
		case v.Excluded != nil:
			excluded++
			kata = "excluded: " + v.Excluded.Why + " The user gets: " + v.Excluded.Instead
		case v.Kata.State == conformance.StatePassed:
			onKata++
		}
		if v.Kata.Again && v.Kata.State == conformance.StatePassed {
			again++
		}
		rows = append(rows, []string{v.Name, word(v.Runc), kata})
	}
	fmt.Fprintf(&text, `Kubernetes %s (etcd, API server, controller manager, scheduler, kubelet and kube-proxy of one build), containerd %s. Of
Kubernetes' own suite, the tests marked `+"`[NodeConformance]`"+` of the groups Pods, RuntimeClass, ConfigMap, Secrets, Downward API, EmptyDir,
Projected, Probing, Container Lifecycle Hook and Sysctls, without those it marks Slow, Serial or as features behind a gate; first with
every pod on runc, then with every pod on `+"`%s`"+`, on the same node. Excluded are those of [excluded.md](../test/kube/excluded.md).

%s`, kubernetes, containerd, cluster.RuntimeClass,
		compat.Table([]string{"tests", "passed on runc", "passed on kata-remote", "of these, in a second run, alone", "excluded"},
			[][]string{{fmt.Sprint(len(verdicts)), fmt.Sprint(onRunc), fmt.Sprint(onKata), fmt.Sprint(again), fmt.Sprint(excluded)}}))
	text.WriteString("\n" + compat.Table([]string{"test", "runc", "kata-remote"}, rows))
	return compat.Update(b.page, compat.Section{
		Name: "nodeconformance", Title: "Kubernetes' own node conformance tests", Command: command, Body: text.String(),
	})
}

func word(r conformance.Result) string {
	switch {
	case r.State == "":
		return "not run"
	case r.Again && r.State == conformance.StatePassed:
		return "passed, alone"
	}
	return string(r.State)
}
