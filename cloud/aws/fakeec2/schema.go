// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	_ "embed"
	"fmt"
	"strings"
)

// model is the vendor's own description of the calls this package serves, one shape
// a line, in the order of the services:
//
//	service NAME VERSION        what follows is of this service
//	op NAME INPUT OUTPUT        OUTPUT "-": the reply has only a return of true
//	enum NAME VALUE...          values are percent-encoded
//	in NAME MEMBER:TYPE...      a structure of requests; "!" behind the type: required
//	out NAME MEMBER:TYPE...     a structure of replies
//
// A member's name is the one on the wire. A type is str, num, bool, time or blob, an
// enum or a structure; "T*" is a list of T, and in replies "T*item" says what its
// elements are called.
//
//go:embed model.txt
var model string

// schema is one service's part of the table.
type schema struct {
	version string
	ops     map[string]operation
	enums   map[string][]string
	in, out map[string]shape
}

type operation struct {
	name    string
	in, out string // out "": nothing but "true"
}

type shape map[string]member

type member struct {
	typ      string // str, num, bool, time, blob, or the name of an enum or a shape
	list     bool
	item     string // of a list in a reply: what its elements are called
	required bool
}

// scalar tells whether a value of the type is text on the wire.
func (m member) scalar(s *schema) bool {
	switch m.typ {
	case "str", "num", "bool", "time", "blob":
		return true
	}
	_, ok := s.enums[m.typ]
	return ok
}

// schemas are the services by the version that a request names.
var schemas = parseModel(model)

func parseModel(text string) map[string]*schema {
	all := map[string]*schema{}
	var s *schema
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] == "#" {
			continue
		}
		switch f[0] {
		case "service":
			s = &schema{version: f[2], ops: map[string]operation{}, enums: map[string][]string{},
				in: map[string]shape{}, out: map[string]shape{}}
			all[f[2]] = s
		case "op":
			s.ops[f[1]] = operation{name: f[1], in: f[2], out: strings.TrimPrefix(f[3], "-")}
		case "enum":
			for _, v := range f[2:] {
				s.enums[f[1]] = append(s.enums[f[1]], unescape(v))
			}
		case "in":
			s.in[f[1]] = parseShape(f[2:])
		case "out":
			s.out[f[1]] = parseShape(f[2:])
		default:
			panic(fmt.Sprintf("fakeec2: model.txt: a line begins with %q", f[0]))
		}
	}
	return all
}

func parseShape(fields []string) shape {
	s := shape{}
	for _, f := range fields {
		name, typ, _ := strings.Cut(f, ":")
		var m member
		typ, m.required = strings.CutSuffix(typ, "!")
		m.typ, m.item, m.list = strings.Cut(typ, "*")
		s[name] = m
	}
	return s
}
