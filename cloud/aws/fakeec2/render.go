// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"sort"
	"strconv"
	"time"
)

// obj is a structure of a reply: members by their name on the wire. A value is a
// string, an int, a bool, a time.Time, an obj, or a slice of obj or string; nil, an
// empty string, an empty obj and a zero time are left out. An empty slice is an empty
// list, which the service writes too.
type obj map[string]any

// present is text that is written even when it is empty.
type present string

// render writes a reply's body. It panics when a member is not in the model or of
// another type there: that is a mistake in this package, which any test must find.
func (s *schema) render(op operation, body obj, requestID string) []byte {
	var b bytes.Buffer
	b.WriteString(xml.Header)
	ns := "http://ec2.amazonaws.com/doc/" + s.version + "/"
	if s.version == stsVersion {
		ns = "https://sts.amazonaws.com/doc/" + s.version + "/"
		fmt.Fprintf(&b, `<%sResponse xmlns="%s"><%sResult>`, op.name, ns, op.name)
		s.members(&b, op.out, body)
		fmt.Fprintf(&b, "</%sResult><ResponseMetadata><RequestId>%s</RequestId></ResponseMetadata></%sResponse>\n",
			op.name, requestID, op.name)
		return b.Bytes()
	}
	fmt.Fprintf(&b, `<%sResponse xmlns="%s"><requestId>%s</requestId>`, op.name, ns, requestID)
	if op.out == "" {
		b.WriteString("<return>true</return>")
	} else {
		s.members(&b, op.out, body)
	}
	fmt.Fprintf(&b, "</%sResponse>\n", op.name)
	return b.Bytes()
}

func (s *schema) members(b *bytes.Buffer, name string, o obj) {
	sh := s.out[name]
	names := make([]string, 0, len(o))
	for n := range o {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		m, ok := sh[n]
		if !ok {
			panic(fmt.Sprintf("fakeec2: %s has no %s", name, n))
		}
		s.value(b, name+"."+n, n, m, o[n])
	}
}

func (s *schema) value(b *bytes.Buffer, path, tag string, m member, v any) {
	if list, ok := elements(v); ok != m.list && v != nil {
		panic(fmt.Sprintf("fakeec2: %s is %T, and in the model a list: %v", path, v, m.list))
	} else if ok {
		b.WriteString("<" + tag + ">")
		for _, e := range list {
			s.value(b, path, m.item, member{typ: m.typ}, e)
		}
		b.WriteString("</" + tag + ">")
		return
	}
	if o, ok := v.(obj); ok {
		if s.out[m.typ] == nil {
			panic(fmt.Sprintf("fakeec2: %s is %s in the model, not a structure", path, m.typ))
		}
		if len(o) > 0 {
			b.WriteString("<" + tag + ">")
			s.members(b, m.typ, o)
			b.WriteString("</" + tag + ">")
		}
		return
	}
	text, ok := scalarText(m.typ, v)
	if !ok {
		panic(fmt.Sprintf("fakeec2: %s is %T, and in the model %s", path, v, m.typ))
	}
	if _, always := v.(present); text != "" || always {
		b.WriteString("<" + tag + ">")
		xml.EscapeText(b, []byte(text))
		b.WriteString("</" + tag + ">")
	}
}

func elements(v any) ([]any, bool) {
	var out []any
	switch l := v.(type) {
	case []obj:
		for _, e := range l {
			out = append(out, e)
		}
	case []string:
		for _, e := range l {
			out = append(out, e)
		}
	default:
		return nil, false
	}
	return out, true
}

// scalarText writes a value as its type in the model; false if it is of another.
func scalarText(typ string, v any) (string, bool) {
	switch x := v.(type) {
	case nil:
		return "", true
	case string:
		return x, typ == "str" || typ == "blob"
	case present:
		return string(x), typ == "str"
	case int:
		return strconv.Itoa(x), typ == "num"
	case float64:
		return strconv.FormatFloat(x, 'f', -1, 64), typ == "num"
	case bool:
		return strconv.FormatBool(x), typ == "bool"
	case time.Time:
		if x.IsZero() {
			return "", typ == "time"
		}
		return timeText(x), typ == "time"
	}
	return "", false
}

// timeText is a time as the service writes it.
func timeText(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }
