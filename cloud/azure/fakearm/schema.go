// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

//go:embed schema.tsv
var schemaTable string

// property is one of a type's.
type property struct{ kind, flag string }

type schema struct {
	types map[string]map[string]property
	enums map[string][]string
}

// readSchema reads the table once.
var readSchema = sync.OnceValue(func() *schema {
	s := &schema{types: map[string]map[string]property{}, enums: map[string][]string{}}
	for line := range strings.Lines(schemaTable) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if name, ok := strings.CutPrefix(f[0], "="); ok {
			s.enums[name] = strings.Split(f[1], "|")
			continue
		}
		if s.types[f[0]] == nil {
			s.types[f[0]] = map[string]property{}
		}
		s.types[f[0]][f[1]] = property{f[2], f[3]}
	}
	return s
})

// sizeEnum is the one enumeration that the service does not hold requests to: the
// sizes are those of the SKU list.
const sizeEnum = "=compute.VirtualMachineSizeTypes"

// check holds v, the body of a request, to the type and removes what is read-only.
// The error names the property by its path.
func (s *schema) check(typ string, v map[string]any) *apiError {
	return s.object(typ, "", v)
}

func (s *schema) object(typ, path string, v map[string]any) *apiError {
	fields, ok := s.types[typ]
	if !ok {
		panic("fakearm: schema.tsv has no type " + typ)
	}
	for _, name := range sortedKeys(v) {
		p, ok := fields[name]
		at := join(path, name)
		if !ok {
			_, short, _ := strings.Cut(typ, ".")
			return &apiError{status: http.StatusBadRequest, code: "InvalidRequestContent", target: at, message: fmt.Sprintf(
				"The request content was invalid and could not be deserialized: 'Could not find member '%s' on object of type '%s'. Path '%s'.'.", name, short, at)}
		}
		if p.flag == "readonly" {
			delete(v, name)
			continue
		}
		if v[name] == nil {
			delete(v, name)
			continue
		}
		if err := s.value(p.kind, at, v[name]); err != nil {
			return err
		}
	}
	for _, name := range sortedKeys(fields) {
		if fields[name].flag == "required" && v[name] == nil {
			at := join(path, name)
			return &apiError{status: http.StatusBadRequest, code: "InvalidParameter", target: at,
				message: fmt.Sprintf("Required parameter '%s' is missing (null).", at)}
		}
	}
	return nil
}

func (s *schema) value(kind, at string, v any) *apiError {
	wrong := func(want string) *apiError {
		text, _ := json.Marshal(v)
		return &apiError{status: http.StatusBadRequest, code: "InvalidRequestContent", target: at, message: fmt.Sprintf(
			"The request content was invalid and could not be deserialized: 'Error converting value %.80s to type '%s'. Path '%s'.'.", text, want, at)}
	}
	switch {
	case strings.HasPrefix(kind, "[]"):
		l, ok := v.([]any)
		if !ok {
			return wrong("array")
		}
		for i, e := range l {
			if err := s.value(kind[2:], fmt.Sprintf("%s[%d]", at, i), e); err != nil {
				return err
			}
		}
		return nil
	case strings.HasPrefix(kind, "{}"):
		m, ok := v.(map[string]any)
		if !ok {
			return wrong("object")
		}
		for _, k := range sortedKeys(m) {
			if err := s.value(kind[2:], join(at, k), m[k]); err != nil {
				return err
			}
		}
		return nil
	case strings.HasPrefix(kind, "="):
		text, ok := v.(string)
		if !ok || kind != sizeEnum && !slices.Contains(s.enums[kind[1:]], text) {
			return wrong(kind[strings.Index(kind, ".")+1:] + "' (" + strings.Join(s.enums[kind[1:]], ", ") + ") '")
		}
		return nil
	}
	ok := true
	switch kind {
	case "any":
	case "string":
		_, ok = v.(string)
	case "bool":
		_, ok = v.(bool)
	case "int":
		f, isNumber := v.(float64)
		ok = isNumber && f == math.Trunc(f)
	case "number":
		_, ok = v.(float64)
	case "time":
		text, isText := v.(string)
		_, err := time.Parse(time.RFC3339, text)
		ok = isText && err == nil
	default:
		m, isObject := v.(map[string]any)
		if !isObject {
			return wrong(kind[strings.Index(kind, ".")+1:])
		}
		return s.object(kind, at, m)
	}
	if !ok {
		return wrong(kind)
	}
	return nil
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// checkTags holds tags to the limits of a resource's tags.
func checkTags(doc map[string]any) *apiError {
	tags := object(doc, "tags")
	if len(tags) > 50 {
		return badRequest("InvalidTagsCount", "tags", "The number of tags '%d' exceeds the maximum of '50'.", len(tags))
	}
	seen := map[string]bool{}
	for _, k := range sortedKeys(tags) {
		v, _ := tags[k].(string)
		switch {
		case k == "" || len(k) > 512 || strings.ContainsAny(k, `<>%&\?/`):
			return badRequest("InvalidTagNameCharacters", "tags", `The tag names '%s' have reserved characters '<,>,%%,&,\,?,/' or control characters, or are empty or longer than 512.`, k)
		case len(v) > 256:
			return badRequest("InvalidTagValueLength", "tags", "Tag value too large. Following tag value '%s...' exceeded the maximum length of '256'.", v[:32])
		case seen[strings.ToLower(k)]:
			return badRequest("InvalidTagName", "tags", "The tag name '%s' occurs twice: tag names are compared without case.", k)
		}
		seen[strings.ToLower(k)] = true
	}
	return nil
}

// base64Bytes tells how many bytes a property's base64 stands for.
func base64Bytes(target, text string) (int, *apiError) {
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return 0, badRequest("InvalidParameter", target, "The value of parameter %s is invalid: it is not a Base64-encoded string.", target)
	}
	return len(b), nil
}
