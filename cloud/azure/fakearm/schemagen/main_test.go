// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestTable: the table is of the version of the vendor's module that the provider is
// built with. The network's module is not among this module's; its part is not looked
// at.
func TestTable(t *testing.T) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/compute/armcompute/v8").Output()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := bufio.NewWriter(&b)
	if err := generate(w, "compute", strings.TrimSpace(string(out))); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	table, err := os.ReadFile("../schema.tsv")
	if err != nil {
		t.Fatal(err)
	}
	if b.Len() < 10_000 || !bytes.HasPrefix(table, b.Bytes()) {
		t.Errorf("schema.tsv is of another version of the module: make it again as the comment of this command says")
	}
}
