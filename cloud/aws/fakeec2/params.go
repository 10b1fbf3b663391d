// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"encoding/base64"
	"net/url"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"
)

// params are a request's parameters, or a structure of them: text by name, other
// structures, and lists of either. Everything in it is in the vendor's model.
type params struct {
	text  map[string]string
	texts map[string][]string
	sub   map[string]*params
	subs  map[string][]*params
}

func unescape(s string) string {
	if u, err := url.PathUnescape(s); err == nil {
		return u
	}
	return s
}

// parse reads the form of a request of shape name. Errors are the service's own:
// UnknownParameter, MissingParameter, InvalidParameterValue.
func (s *schema) parse(name string, form url.Values) (*params, error) {
	flat := map[string]string{}
	keys := make([]string, 0, len(form))
	for k, v := range form {
		if k == "Action" || k == "Version" {
			continue
		}
		if len(v) > 1 {
			return nil, errorf(400, "InvalidQueryParameter", "The parameter %s occurs more than once", k)
		}
		flat[k] = v[0]
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return s.structure(name, "", keys, flat)
}

// structure reads the parameters below prefix, which keys are, as a shape.
func (s *schema) structure(name, prefix string, keys []string, flat map[string]string) (*params, error) {
	sh := s.in[name]
	p := &params{text: map[string]string{}, texts: map[string][]string{}, sub: map[string]*params{}, subs: map[string][]*params{}}
	byMember := map[string][]string{}
	for _, k := range keys {
		member, _, _ := strings.Cut(k[len(prefix):], ".")
		if _, ok := sh[member]; !ok {
			return nil, errorf(400, "UnknownParameter", "The parameter %s is not recognized", k)
		}
		byMember[member] = append(byMember[member], k)
	}
	names := make([]string, 0, len(sh))
	for n := range sh {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		m, below := sh[n], byMember[n]
		if len(below) == 0 {
			if m.required {
				return nil, errorf(400, "MissingParameter", "The request must contain the parameter %s", prefix+n)
			}
			continue
		}
		if err := s.member(p, n, m, prefix+n, below, flat); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// member reads one member, whose name with all before it is full.
func (s *schema) member(p *params, n string, m member, full string, keys []string, flat map[string]string) error {
	if m.list {
		return s.list(p, n, m, full, keys, flat)
	}
	if m.scalar(s) {
		if len(keys) != 1 || keys[0] != full {
			return errorf(400, "UnknownParameter", "The parameter %s is not recognized", keys[len(keys)-1])
		}
		p.text[n] = flat[full]
		return s.check(m, full, flat[full])
	}
	if keys[0] == full {
		return errorf(400, "InvalidParameterValue", "Value (%s) for parameter %s is invalid. It is a structure", flat[full], full)
	}
	var err error
	p.sub[n], err = s.structure(m.typ, full+".", keys, flat)
	return err
}

// list reads Name.1, Name.2 and so on, in the order of their numbers, which may have
// gaps; of services other than EC2, Name.member.1.
func (s *schema) list(p *params, n string, m member, full string, keys []string, flat map[string]string) error {
	prefix := full + "."
	if m.item != "" {
		prefix += m.item + "."
	}
	byIndex := map[int][]string{}
	var order []int
	for _, k := range keys {
		rest, ok := strings.CutPrefix(k, prefix)
		index, _, _ := strings.Cut(rest, ".")
		i, err := strconv.Atoi(index)
		if !ok || err != nil || i < 0 {
			return errorf(400, "InvalidParameterValue", "The parameter %s is a list: %s1 and so on", k, prefix)
		}
		if byIndex[i] == nil {
			order = append(order, i)
		}
		byIndex[i] = append(byIndex[i], k)
	}
	sort.Ints(order)
	for _, i := range order {
		at := prefix + strconv.Itoa(i)
		keys := byIndex[i]
		if m.scalar(s) {
			if len(keys) != 1 || keys[0] != at {
				return errorf(400, "UnknownParameter", "The parameter %s is not recognized", keys[len(keys)-1])
			}
			if err := s.check(m, at, flat[at]); err != nil {
				return err
			}
			p.texts[n] = append(p.texts[n], flat[at])
			continue
		}
		if keys[0] == at {
			return errorf(400, "InvalidParameterValue", "Value (%s) for parameter %s is invalid. It is a structure", flat[at], at)
		}
		sub, err := s.structure(m.typ, at+".", keys, flat)
		if err != nil {
			return err
		}
		p.subs[n] = append(p.subs[n], sub)
	}
	return nil
}

// check holds a value to its type.
func (s *schema) check(m member, name, v string) error {
	invalid := func(why string) error {
		return errorf(400, "InvalidParameterValue", "Value (%s) for parameter %s is invalid. %s", v, name, why)
	}
	switch m.typ {
	case "num":
		if _, err := strconv.ParseFloat(v, 64); err != nil {
			return invalid("It must be a number")
		}
	case "bool":
		if v != "true" && v != "false" {
			return invalid("It must be true or false")
		}
	case "time":
		if _, err := time.Parse(time.RFC3339, v); err != nil {
			return invalid("It must be a time as ISO 8601 has it")
		}
	case "blob":
		if _, err := base64.StdEncoding.DecodeString(v); err != nil {
			return invalid("It must be base64")
		}
	case "str":
	default:
		if !slices.Contains(s.enums[m.typ], v) {
			return invalid("Valid values: " + strings.Join(s.enums[m.typ], ", "))
		}
	}
	return nil
}

// paths are the names of all values, without the numbers of lists, sorted.
func (p *params) paths(prefix string) []string {
	var out []string
	for n := range p.text {
		out = append(out, prefix+n)
	}
	for n := range p.texts {
		out = append(out, prefix+n)
	}
	for n, sub := range p.sub {
		out = append(out, sub.paths(prefix+n+".")...)
	}
	for n, list := range p.subs {
		for _, sub := range list {
			out = append(out, sub.paths(prefix+n+".")...)
		}
	}
	sort.Strings(out)
	return slices.Compact(out)
}

// The accessors take the name on the wire. A parameter that is absent is the zero
// value; on a nil *params, which stands for an absent structure, everything is.

func (p *params) has(n string) bool {
	if p == nil {
		return false
	}
	_, text := p.text[n]
	return text || p.sub[n] != nil || len(p.texts[n]) > 0 || len(p.subs[n]) > 0
}

func (p *params) str(n string) string {
	if p == nil {
		return ""
	}
	return p.text[n]
}

func (p *params) num(n string) int {
	f, _ := strconv.ParseFloat(p.str(n), 64)
	return int(f)
}

func (p *params) bool(n string) bool { return p.str(n) == "true" }

func (p *params) strs(n string) []string {
	if p == nil {
		return nil
	}
	return p.texts[n]
}

func (p *params) at(n string) *params {
	if p == nil {
		return nil
	}
	return p.sub[n]
}

func (p *params) all(n string) []*params {
	if p == nil {
		return nil
	}
	return p.subs[n]
}

// or returns the parameter, or def where it is absent.
func (p *params) or(n, def string) string {
	if p.has(n) {
		return p.str(n)
	}
	return def
}
