// SPDX-License-Identifier: Apache-2.0

// Schemagen writes the table of shapes that package fakearm holds requests to
// (schema.tsv). It reads the names of properties, their types, which are required or
// read-only, and the values of enumerations from the vendor's own Go modules, which
// are generated from the specification; it takes facts from them, no code, and links
// nothing of them. From the root of this module:
//
//	cd $(mktemp -d) && go mod init x
//	go get github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/compute/armcompute/v8@v8.3.0 \
//	       github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/network/armnetwork/v9@v9.0.0
//	go list -m -f '{{.Dir}}' all     # says where they are
//	go run ./cloud/azure/fakearm/schemagen -compute DIR -network DIR > cloud/azure/fakearm/schema.tsv
//
// A line is "type TAB property TAB kind TAB flag", or "=enum TAB values" with bars between them. A kind is
// string, int, number, bool, time, any, the name of a type or "=" and that of an
// enumeration; "[]" before it is a list and "{}" a map. The flag is "required",
// "readonly" or nothing.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"log"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
)

// roots are the bodies that requests have.
var roots = map[string][]string{
	"compute": {"VirtualMachine", "VirtualMachineUpdate", "Disk", "DiskUpdate", "GrantAccessData", "Image",
		"Gallery", "GalleryImage", "GalleryImageVersion"},
	"network": {"Interface", "PublicIPAddress", "SecurityGroup", "SecurityRule", "VirtualNetwork", "Subnet", "TagsObject"},
}

func main() {
	log.SetFlags(0)
	compute := flag.String("compute", "", "folder of module armcompute")
	network := flag.String("network", "", "folder of module armnetwork")
	flag.Parse()
	out := bufio.NewWriter(os.Stdout)
	for _, m := range []struct{ name, dir string }{{"compute", *compute}, {"network", *network}} {
		if m.dir == "" {
			log.Fatalf("schemagen: -%s is missing: the folder of the vendor's module", m.name)
		}
		if err := generate(out, m.name, m.dir); err != nil {
			log.Fatalf("schemagen: %s: %v", m.dir, err)
		}
	}
	if err := out.Flush(); err != nil {
		log.Fatalf("schemagen: %v", err)
	}
}

// model is what a module says of its types.
type model struct {
	fields map[string][]field  // by type
	wire   map[string]string   // "Type.Field" to the property's name
	enums  map[string][]string // by name
}

type field struct{ name, kind, flag string }

func generate(out *bufio.Writer, prefix, dir string) error {
	m := model{fields: map[string][]field{}, wire: map[string]string{}, enums: map[string][]string{}}
	if err := m.read(dir); err != nil {
		return err
	}
	seen := map[string]bool{}
	queue := slices.Clone(roots[prefix])
	var lines []string
	for len(queue) > 0 {
		typ := queue[0]
		queue = queue[1:]
		if seen[typ] {
			continue
		}
		seen[typ] = true
		if values, ok := m.enums[typ]; ok {
			lines = append(lines, "="+prefix+"."+typ+"\t"+strings.Join(values, "|"))
			continue
		}
		fields, ok := m.fields[typ]
		if !ok {
			return fmt.Errorf("there is no type %s", typ)
		}
		for _, f := range fields {
			wire, ok := m.wire[typ+"."+f.name]
			if !ok {
				return fmt.Errorf("%s.%s is never put on the wire", typ, f.name)
			}
			kind, inner := m.kind(prefix, f.kind)
			if f.flag == "readonly" {
				kind = "any" // answered, never asked for
			} else if inner != "" {
				queue = append(queue, inner)
			}
			lines = append(lines, strings.Join([]string{prefix + "." + typ, wire, kind, f.flag}, "\t"))
		}
	}
	sort.Strings(lines)
	for _, l := range lines {
		fmt.Fprintln(out, l)
	}
	return nil
}

// kind turns a Go type into the table's; inner is the type it needs, if any.
func (m *model) kind(prefix, goType string) (kind, inner string) {
	for {
		switch {
		case strings.HasPrefix(goType, "*"):
			goType = goType[1:]
			continue
		case goType == "[]byte":
			return kind + "string", ""
		case strings.HasPrefix(goType, "[]"):
			kind, goType = kind+"[]", goType[2:]
			continue
		case strings.HasPrefix(goType, "map[string]"):
			kind, goType = kind+"{}", strings.TrimPrefix(goType, "map[string]")
			continue
		}
		break
	}
	switch goType {
	case "string", "bool", "any":
		return kind + goType, ""
	case "int32", "int64":
		return kind + "int", ""
	case "float32", "float64":
		return kind + "number", ""
	case "time.Time":
		return kind + "time", ""
	}
	if _, ok := m.enums[goType]; ok {
		return kind + "=" + prefix + "." + goType, goType
	}
	return kind + prefix + "." + goType, goType
}

// What models_serde.go looks like: a method of each type, with a case for each
// property that sets a field.
var (
	unmarshal = regexp.MustCompile(`^func \(\w+ \*(\w+)\) UnmarshalJSON\(`)
	property  = regexp.MustCompile(`^\s*case "([^"]+)":`)
	setField  = regexp.MustCompile(`^\s*(?:err = |\w+\.\w+, err = )\w+(?:\[[^\]]*\])?\(.*?"?(\w+)"?, &\w+\.(\w+)`)
)

func (m *model) read(dir string) error {
	set := token.NewFileSet()
	for _, name := range []string{"models.go", "constants.go"} {
		f, err := parser.ParseFile(set, filepath.Join(dir, name), nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, d := range f.Decls {
			if g, ok := d.(*ast.GenDecl); ok {
				for _, s := range g.Specs {
					m.spec(s)
				}
			}
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, "models_serde.go"))
	if err != nil {
		return err
	}
	typ, wire := "", ""
	for _, line := range strings.Split(string(b), "\n") {
		if g := unmarshal.FindStringSubmatch(line); g != nil {
			typ = g[1]
		} else if g := property.FindStringSubmatch(line); g != nil {
			wire = g[1]
		} else if g := setField.FindStringSubmatch(line); g != nil {
			m.wire[typ+"."+g[2]] = wire
		}
	}
	return nil
}

func (m *model) spec(s ast.Spec) {
	switch s := s.(type) {
	case *ast.TypeSpec:
		switch t := s.Type.(type) {
		case *ast.StructType:
			m.fields[s.Name.Name] = nil
			for _, f := range t.Fields.List {
				flag := ""
				if doc := f.Doc.Text(); strings.HasPrefix(doc, "REQUIRED") {
					flag = "required"
				} else if strings.HasPrefix(doc, "READ-ONLY") {
					flag = "readonly"
				}
				for _, n := range f.Names {
					m.fields[s.Name.Name] = append(m.fields[s.Name.Name], field{n.Name, goType(f.Type), flag})
				}
			}
		case *ast.Ident:
			if t.Name == "string" || t.Name == "int32" {
				m.enums[s.Name.Name] = nil
			}
		}
	case *ast.ValueSpec:
		t, ok := s.Type.(*ast.Ident)
		if !ok || len(s.Values) != 1 {
			return
		}
		if lit, ok := s.Values[0].(*ast.BasicLit); ok {
			v, err := strconv.Unquote(lit.Value)
			if err != nil {
				v = lit.Value
			}
			m.enums[t.Name] = append(m.enums[t.Name], v)
		}
	}
}

func goType(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.StarExpr:
		return "*" + goType(e.X)
	case *ast.ArrayType:
		return "[]" + goType(e.Elt)
	case *ast.MapType:
		return "map[" + goType(e.Key) + "]" + goType(e.Value)
	case *ast.SelectorExpr:
		return goType(e.X) + "." + e.Sel.Name
	case *ast.InterfaceType:
		return "any"
	}
	return fmt.Sprintf("%T", e)
}
