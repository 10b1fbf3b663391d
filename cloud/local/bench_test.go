// SPDX-License-Identifier: Apache-2.0

package local

import (
	"fmt"
	"testing"

	"github.com/kata-remote/kata-remote/cloud"
)

// BenchmarkBoot measures an instance from Create to QEMU's answer and to that of
// the guest, and its removal.
func BenchmarkBoot(b *testing.B) {
	img, err := image()
	if err != nil {
		b.Fatal(err)
	}
	p, err := New(Config{Kernel: img[0], Initrd: img[1], StateDir: b.TempDir(), CPUOvercommit: 64})
	if err != nil {
		b.Fatal(err)
	}
	if _, reason, err := p.Accel(b.Context()); err != nil {
		b.Fatal(err)
	} else {
		b.Log(reason)
	}
	var made, answered, removed float64
	n := 0
	for b.Loop() {
		n++
		plan, err := p.Plan(b.Context(), cloud.Size{})
		if err != nil {
			b.Fatal(err)
		}
		begin := b.Elapsed()
		inst, err := p.Create(b.Context(), cloud.CreateRequest{
			Token: fmt.Sprint("bench-", n), Name: "podvm-bench", SandboxID: "s", Owner: cloud.Owner{Cluster: "c", Node: "n"},
			Plan: plan, UserData: []byte("sekret"),
		})
		if err != nil {
			b.Fatal(err)
		}
		made += (b.Elapsed() - begin).Seconds()
		ask(b, p, inst)
		answered += (b.Elapsed() - begin).Seconds()
		begin = b.Elapsed()
		if err := p.Delete(b.Context(), inst.ID); err != nil {
			b.Fatal(err)
		}
		removed += (b.Elapsed() - begin).Seconds()
	}
	b.ReportMetric(made/float64(n)*1000, "ms/create")
	b.ReportMetric(answered/float64(n)*1000, "ms/answer")
	b.ReportMetric(removed/float64(n)*1000, "ms/delete")
}
