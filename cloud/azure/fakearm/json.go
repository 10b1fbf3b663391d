// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Documents are kept as encoding/json reads them: objects, lists, strings, float64.

// at returns what stands at a path of property names with dots, or nil.
func at(doc any, path string) any {
	for _, name := range strings.Split(path, ".") {
		m, ok := doc.(map[string]any)
		if !ok {
			return nil
		}
		doc = m[name]
	}
	return doc
}

func text(doc any, path string) string {
	s, _ := at(doc, path).(string)
	return s
}

func number(doc any, path string) float64 {
	f, _ := at(doc, path).(float64)
	return f
}

func flag(doc any, path string) bool {
	b, _ := at(doc, path).(bool)
	return b
}

func list(doc any, path string) []any {
	l, _ := at(doc, path).([]any)
	return l
}

func object(doc any, path string) map[string]any {
	m, _ := at(doc, path).(map[string]any)
	return m
}

// put sets what stands at a path, making the objects on the way.
func put(doc map[string]any, path string, v any) {
	names := strings.Split(path, ".")
	for _, name := range names[:len(names)-1] {
		next, ok := doc[name].(map[string]any)
		if !ok {
			next = map[string]any{}
			doc[name] = next
		}
		doc = next
	}
	doc[names[len(names)-1]] = v
}

// drop removes what stands at a path.
func drop(doc map[string]any, path string) {
	i := strings.LastIndex(path, ".")
	if i < 0 {
		delete(doc, path)
		return
	}
	if m := object(doc, path[:i]); m != nil {
		delete(m, path[i+1:])
	}
}

// clone copies a document with all in it.
func clone[T any](doc T) T {
	b, err := json.Marshal(doc)
	if err != nil {
		panic(fmt.Sprintf("fakearm: a document of plain values does not marshal: %v", err))
	}
	var out T
	if err := json.Unmarshal(b, &out); err != nil {
		panic(fmt.Sprintf("fakearm: a document does not come back: %v", err))
	}
	return out
}

// same compares two documents.
func same(a, b any) bool {
	x, _ := json.Marshal(a)
	y, _ := json.Marshal(b)
	return string(x) == string(y)
}

// merge puts the properties of patch over those of doc, as a PATCH does.
func merge(doc, patch map[string]any) {
	for k, v := range patch {
		if sub, ok := v.(map[string]any); ok && k != "tags" {
			if into, ok := doc[k].(map[string]any); ok {
				merge(into, sub)
				continue
			}
		}
		doc[k] = v
	}
}

func sortedKeys[V any](m map[string]V) []string {
	return slices.Sorted(maps.Keys(m))
}
