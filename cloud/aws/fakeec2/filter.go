// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"encoding/base64"
	"slices"
	"sort"
	"strconv"
	"strings"
)

// matches tells whether a thing passes the request's filters, which have been
// checked. attr gives the values of a filter by its name.
func (c *call) matches(tags map[string]string, attr func(name string) []string) bool {
	for _, f := range c.all("Filter") {
		name := f.str("Name")
		var have []string
		if key, ok := strings.CutPrefix(name, "tag:"); ok {
			if v, ok := tags[key]; ok {
				have = []string{v}
			}
		} else if name == "tag-key" {
			for k := range tags {
				have = append(have, k)
			}
		} else {
			have = attr(name)
		}
		if !slices.ContainsFunc(f.strs("Value"), func(pattern string) bool {
			return slices.ContainsFunc(have, func(v string) bool { return wildcard(pattern, v) })
		}) {
			return false
		}
	}
	return true
}

// attrs are the filters of a kind of thing: the values they compare with.
type attrs[T any] map[string]func(T) []string

// one is for the filters that have one value.
func one[T any](f func(T) string) func(T) []string {
	return func(v T) []string { return []string{f(v)} }
}

// check refuses unknown filters even when there is nothing to filter.
func (a attrs[T]) check(c *call) error {
	for _, f := range c.all("Filter") {
		name := f.str("Name")
		if a[name] == nil && name != "tag-key" && !strings.HasPrefix(name, "tag:") {
			return errorf(400, "InvalidParameterValue", "The filter '%s' is invalid", name)
		}
		if len(f.strs("Value")) == 0 {
			return errorf(400, "InvalidParameterValue", "The filter '%s' has no values", name)
		}
	}
	return nil
}

// filtered returns those of items that pass the request's filters.
func filtered[T any](c *call, items []T, tags func(T) map[string]string, a attrs[T]) ([]T, error) {
	if err := a.check(c); err != nil {
		return nil, err
	}
	var out []T
	for _, v := range items {
		if c.matches(tags(v), func(name string) []string { return a[name](v) }) {
			out = append(out, v)
		}
	}
	return out, nil
}

// wildcard matches with * (any text), ? (one character) and \ before either.
func wildcard(pattern, v string) bool {
	for i := 0; i < len(pattern); i++ {
		switch pattern[i] {
		case '*':
			for j := 0; j <= len(v); j++ {
				if wildcard(pattern[i+1:], v[j:]) {
					return true
				}
			}
			return false
		case '?':
			if v == "" {
				return false
			}
			v = v[1:]
			continue
		case '\\':
			if i+1 < len(pattern) {
				i++
			}
		}
		if v == "" || v[0] != pattern[i] {
			return false
		}
		v = v[1:]
	}
	return v == ""
}

// page cuts the things that belong on the request's page out of items, which are in
// the order of seq, and returns the token of the next page, "" if there is none.
// lowest and highest bound MaxResults.
func page[T any](c *call, lowest, highest int, items []T, seq func(T) int) ([]T, string, error) {
	if t := c.str("NextToken"); t != "" {
		raw, err := base64.StdEncoding.DecodeString(t)
		after, err2 := strconv.Atoi(strings.TrimPrefix(string(raw), "after "))
		if err != nil || err2 != nil {
			return nil, "", errorf(400, "InvalidNextToken", "The token '%s' is invalid", t)
		}
		from := sort.Search(len(items), func(i int) bool { return seq(items[i]) > after })
		items = items[from:]
	}
	if !c.has("MaxResults") {
		return items, "", nil
	}
	n := c.num("MaxResults")
	if n < lowest {
		return nil, "", errorf(400, "InvalidParameterValue", "Value ( %d ) for parameter maxResults is invalid. "+
			"Expecting a value greater than or equal to %d.", n, lowest)
	}
	if n = min(n, highest); n >= len(items) {
		return items, "", nil
	}
	items = items[:n]
	return items, base64.StdEncoding.EncodeToString([]byte("after " + itoa(seq(items[n-1])))), nil
}

// pick returns the things of m that a Describe call sees: those named by the list
// parameter ids, each of which must be there, or all; of them, those that pass the
// filters.
func pick[T any](c *call, m map[string]T, ids, prefix string, res func(T) *resource, a attrs[T]) ([]T, error) {
	want := c.strs(ids)
	if err := wellFormed(prefix, want...); err != nil {
		return nil, err
	}
	var missing []string
	for _, id := range want {
		if v, ok := m[id]; !ok || !res(v).seen(c.now) {
			missing = append(missing, id)
		}
	}
	if len(missing) > 0 {
		return nil, unknownID(prefix, missing...)
	}
	var seen []T
	for _, v := range sorted(m, func(v T) int { return res(v).seq }) {
		if res(v).seen(c.now) && (len(want) == 0 || slices.Contains(want, res(v).id)) {
			seen = append(seen, v)
		}
	}
	out, err := filtered(c, seen, func(v T) map[string]string { return res(v).tags }, a)
	if err != nil {
		return nil, err
	}
	return out, c.dryRun()
}

// tagSet is a thing's tags in a reply.
func tagSet(tags map[string]string) []obj {
	out := []obj{}
	keys := make([]string, 0, len(tags))
	for k := range tags {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		out = append(out, obj{"key": k, "value": present(tags[k])})
	}
	return out
}
