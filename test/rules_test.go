// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/kata-remote/kata-remote/"

// mayImport lists, for each part, the parts it may import besides itself. The
// reasons stand beside what is forbidden, because they are what a person who meets a
// breach needs.
var mayImport = map[string][]string{
	"agent-protocol": {},
	"cloud":          {},
	"netns":          {},
	"shim":           {"agent-protocol"},
	"podvm":          {"agent-protocol", "netns"},
	"caa":            {"agent-protocol", "cloud", "netns"},
	"operator":       {"agent-protocol", "caa/config"},
	"test":           {"agent-protocol", "cloud", "netns", "shim", "podvm", "caa", "operator"},
}

var whyNot = map[string]string{
	"agent-protocol": "contracts only: whoever speaks the protocol would link what it imports",
	"cloud":          "a provider must be usable, and testable, without the adaptor",
	"netns":          "it runs on the node and in the guest, and must know of neither",
	"shim":           "one runs per pod: everything it links costs memory in every pod",
	"podvm":          "it is trusted with the guest: what it links is what can be attacked",
	"caa":            "it serves any shim and any agent: it knows only the contracts between them",
	"operator":       "a node must work without it, so it may know of the node only the configuration",
}

// forbidden are other people's packages that a part must never link, even through
// another package.
var forbidden = []struct{ part, prefix, why string }{
	{"shim/cmd/", "github.com/vishvananda/netlink", "the adaptor owns the network; netlink in every pod's shim is memory for nothing"},
	{"shim/cmd/", "k8s.io/", "the shim serves containerd; Kubernetes is not known below it"},
	{"shim/cmd/", "github.com/aws/", "cloud SDKs belong to the adaptor's providers"},
	{"shim/cmd/", "github.com/Azure/", "cloud SDKs belong to the adaptor's providers"},
	{"podvm/cmd/podvmd", "k8s.io/", "the guest knows no Kubernetes"},
	{"podvm/cmd/podvmd", "github.com/aws/", "the guest needs no cloud credential, so no SDK"},
	{"podvm/cmd/podvmd", "github.com/Azure/", "the guest needs no cloud credential, so no SDK"},
}

type pkg struct {
	ImportPath   string
	Name         string
	Imports      []string
	TestImports  []string
	XTestImports []string
	Deps         []string
}

func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Name,Imports,TestImports,XTestImports,Deps", "./...")
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			t.Fatalf("go list: %v\n%s", err, ee.Stderr)
		}
		t.Fatal(err)
	}
	var pkgs []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
	if len(pkgs) < 10 {
		t.Fatalf("go list found %d packages: that is not the whole module", len(pkgs))
	}
	return pkgs
}

func TestImportRules(t *testing.T) {
	for _, p := range list(t) {
		self := strings.TrimPrefix(p.ImportPath, module)
		part, _, _ := strings.Cut(self, "/")
		allowed, ok := mayImport[part]
		if !ok {
			t.Errorf("%s: the top level is the architecture, and %q is no part of it", self, part)
			continue
		}
		for _, imp := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			of, ok := strings.CutPrefix(imp, module)
			if ok && !reaches(part, allowed, of) {
				t.Errorf("%s imports %s: %s", self, of, whyNot[part])
			}
		}
		for _, f := range forbidden {
			if !strings.HasPrefix(self, f.part) {
				continue
			}
			for _, d := range p.Deps {
				if strings.HasPrefix(d, f.prefix) {
					t.Errorf("%s links %s: %s", self, d, f.why)
				}
			}
		}
	}
}

// reaches tells whether a part may import package of.
func reaches(part string, allowed []string, of string) bool {
	for _, a := range append([]string{part}, allowed...) {
		if of == a || strings.HasPrefix(of, a+"/") {
			return true
		}
	}
	return false
}

// sources walks the module's Go files.
func sources(t *testing.T, f func(name string, src []byte)) {
	t.Helper()
	err := filepath.WalkDir("..", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(name, "go.mod")); err == nil && d.IsDir() && name != ".." {
			return fs.SkipDir // a tool's own module
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), "_") || d.Name() == ".git" || d.Name() == "testdata") {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(name, ".go") {
			return nil
		}
		src, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		f(strings.TrimPrefix(filepath.ToSlash(name), "../"), src)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

const (
	maxFile     = 600 // lines
	maxFunction = 80  // lines
)

// TestSources holds every file to what a reader relies on: one package comment, a
// licence, a length that can be read at a sitting. A longer function says why in a
// comment that begins with "Long:".
func TestSources(t *testing.T) {
	comments := map[string][]string{} // package folder to files with a package comment
	folders := map[string]bool{}
	sources(t, func(name string, src []byte) {
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, name, src, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Error(err)
			return
		}
		if ast.IsGenerated(f) {
			return
		}
		dir := path.Dir(name)
		if f.Doc != nil && !strings.HasPrefix(f.Doc.Text(), "SPDX") && !strings.HasSuffix(name, "_test.go") {
			comments[dir] = append(comments[dir], name)
		}
		if !bytes.HasPrefix(src, []byte("// SPDX-License-Identifier: Apache-2.0\n")) {
			t.Errorf("%s: the first line is not the licence identifier", name)
		}
		if formatted, err := format.Source(src); err != nil || !bytes.Equal(formatted, src) {
			t.Errorf("%s is not as gofmt writes it: run gofmt -w (%v)", name, err)
		}
		if n := bytes.Count(src, []byte("\n")); n > maxFile {
			t.Errorf("%s has %d lines: split it where it changes subject (limit %d)", name, n, maxFile)
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			n := set.Position(fn.End()).Line - set.Position(fn.Pos()).Line + 1
			if n > maxFunction && !strings.Contains(fn.Doc.Text(), "Long:") {
				t.Errorf("%s: function %s has %d lines (limit %d)", name, fn.Name.Name, n, maxFunction)
			}
		}
		if !strings.HasSuffix(name, "_test.go") {
			folders[dir] = true
		}
	})
	for dir := range folders {
		if c := comments[dir]; len(c) != 1 {
			t.Errorf("%s: %d package comments %v, want one", dir, len(c), c)
		}
	}
}

// TestNoLeftovers: a requirement is built or it is in an issue.
func TestNoLeftovers(t *testing.T) {
	words := []string{"TO" + "DO", "FIX" + "ME", "XX" + "X", "not implemented" + " yet"}
	sources(t, func(name string, src []byte) {
		for i, line := range bytes.Split(src, []byte("\n")) {
			for _, w := range words {
				if bytes.Contains(line, []byte(w)) {
					t.Error(fmt.Sprintf("%s:%d: %s", name, i+1, bytes.TrimSpace(line)))
				}
			}
		}
	})
}
