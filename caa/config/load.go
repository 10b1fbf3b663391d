// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"sort"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/relay"
	"github.com/kata-remote/kata-remote/cloud"
)

// setting is a value and where it comes from.
type setting struct{ name, value, source string }

// Load reads the file at path ("": none), then the environment (as os.Environ gives
// it), then flags, and checks the result. InvalidArgument: every problem, one to a
// line.
func Load(path string, environ []string, flags Flags) (*Config, error) {
	var (
		p      problems
		values = map[string]setting{}
	)
	if path != "" {
		text, err := os.ReadFile(path)
		if err != nil {
			p.add("--config: %v", err)
		}
		for _, s := range p.parseFile(path, string(text)) {
			values[s.name] = s
		}
	}
	for _, e := range environ {
		if name, value, _ := strings.Cut(e, "="); known(name) {
			values[name] = setting{name, value, "the environment"}
		}
	}
	for name, value := range map[string]string{
		"STATE_DIR": flags.StateDir, "REMOTE_HYPERVISOR_ENDPOINT": flags.Socket, "PODS_DIR": flags.PodsDir, "LOG_LEVEL": flags.LogLevel,
	} {
		if value != "" {
			values[name] = setting{name, value, "flag " + flagNames[name]}
		}
	}
	c := p.apply(values)
	p.validate(c, values)
	if len(p) > 0 {
		sort.Strings(p)
		return nil, errdefs.ErrInvalidArgument.WithMessage(strings.Join(p, "\n"))
	}
	return c, nil
}

var flagNames = map[string]string{
	"STATE_DIR": "--state-dir", "REMOTE_HYPERVISOR_ENDPOINT": "--socket", "PODS_DIR": "--pods-dir", "LOG_LEVEL": "--log-level",
}

// problems are the sentences Load reports.
type problems []string

func (p *problems) add(format string, a ...any) { *p = append(*p, fmt.Sprintf(format, a...)) }

// known tells whether a key of the file is one of ours or of cloud-api-adaptor's.
func known(name string) bool {
	return slices.ContainsFunc(keys, func(k key) bool { return k.name == name }) ||
		slices.ContainsFunc(otherPrefixes, func(p string) bool { return strings.HasPrefix(name, p) }) ||
		slices.Contains(otherNames, name) || reasonNotHere(name) != ""
}

func reasonNotHere(name string) string {
	for _, k := range notHere {
		if k.name == name {
			return k.why
		}
	}
	return ""
}

var nameRule = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

func (p *problems) parseFile(path, text string) []setting {
	var (
		found []setting
		lines = map[string]int{}
	)
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		at := fmt.Sprintf("%s:%d", path, i+1)
		name, value, ok := strings.Cut(line, "=")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		switch {
		case !ok || !nameRule.MatchString(name):
			p.add("%s: want KEY=VALUE, got %q", at, line)
			continue
		case !known(name):
			p.add("%s: %s is not a setting%s", at, name, suggestion(name))
			continue
		case lines[name] != 0:
			p.add("%s: %s is set twice, first on line %d; remove one", at, name, lines[name])
			continue
		}
		lines[name] = i + 1
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		found = append(found, setting{name, value, at})
	}
	return found
}

// suggestion is the setting that was probably meant.
func suggestion(name string) string {
	best, distance := "", 3 // more edits than two are another word
	for _, k := range keys {
		if d := edits(strings.ToUpper(name), k.name); d < distance {
			best, distance = k.name, d
		}
	}
	if best == "" {
		return "; remove it"
	}
	return "; did you mean " + best + "?"
}

// edits is the Levenshtein distance of two words.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		last := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := last
			if a[i] != b[j] {
				cost++
			}
			last = row[j+1]
			row[j+1] = min(cost, row[j]+1, last+1)
		}
	}
	return row[len(b)]
}

var placeholderRule = regexp.MustCompile(`^<[^<>]*>$`)

// apply sets what is set. An empty value is one that is not set, as in ConfigMaps.
func (p *problems) apply(values map[string]setting) *Config {
	c := defaults()
	for _, k := range keys {
		s, ok := values[k.name]
		switch {
		case !ok || s.value == "":
		case placeholderRule.MatchString(s.value):
			p.add("%s is still the placeholder %q (%s): put a value in its place, or remove it", s.name, s.value, s.source)
		default:
			if err := k.set(&c, s.value); err != nil {
				p.add("%s is %q (%s): %v", s.name, s.value, s.source, err)
			}
		}
	}
	for _, k := range notHere {
		s, ok := values[k.name]
		switch {
		case !ok || s.value == "":
		case k.fine(s.value):
			// The environment of a pod has many of these; only what somebody wrote
			// for us is worth a word.
			if s.source != "the environment" {
				c.Warnings = append(c.Warnings, fmt.Sprintf("%s has no effect: %s", s.name, k.why))
			}
		default:
			p.add("%s is %q (%s): %s; remove it", s.name, s.value, s.source, k.why)
		}
	}
	if _, err := os.Stat(DefaultAuthFile); err == nil && c.Pull.AuthFile == "" {
		c.Pull.AuthFile = DefaultAuthFile
	}
	if c.Local.Dir == "" {
		c.Local.Dir = c.StateDir + "/local"
	}
	if c.Node == "" {
		name, err := os.Hostname()
		if err != nil || name == "" {
			p.add("NODE_NAME is not set and the host has no name: set it to the node's name")
		}
		c.Node = name
	}
	return &c
}

// sandboxIDBytes is the length of the ids that CRI runtimes make.
const sandboxIDBytes = 64

// validate checks what one value alone does not show.
func (p *problems) validate(c *Config, values map[string]setting) {
	source := func(name, def string) string {
		if s, ok := values[name]; ok && s.value != "" {
			return s.source
		}
		return def
	}
	if n := len(c.PodsDir) + 1 + sandboxIDBytes + len("/agent.ttrpc"); n > relay.MaxUnixPath {
		p.add("PODS_DIR is %q (%s): agent sockets in it would have paths of %d bytes and the kernel takes %d; choose a directory of at most %d bytes",
			c.PodsDir, source("PODS_DIR", "default"), n, relay.MaxUnixPath, relay.MaxUnixPath-n+len(c.PodsDir))
	}
	if strings.Contains(c.PodsDir, ":") {
		p.add("PODS_DIR is %q (%s): shims split the agent socket's path at ':'; choose a directory without it", c.PodsDir, source("PODS_DIR", "default"))
	}
	if len(c.Socket) > relay.MaxUnixPath {
		p.add("REMOTE_HYPERVISOR_ENDPOINT is %q (%s): the path has %d bytes and the kernel takes %d; choose a shorter one",
			c.Socket, source("REMOTE_HYPERVISOR_ENDPOINT", "default"), len(c.Socket), relay.MaxUnixPath)
	}
	for k := range c.Tags {
		if cloud.ReservedTag(k) {
			p.add("TAGS has %q (%s): keys that begin with %q, and %q, are the adaptor's own; rename it",
				k, source("TAGS", ""), cloud.TagPrefix, cloud.TagName)
		}
	}
	if c.Provider == ProviderLocal {
		for _, f := range []struct{ name, path string }{{"LOCAL_KERNEL", c.Local.Kernel}, {"LOCAL_INITRD", c.Local.Initrd}} {
			if f.path == "" {
				if s := values[f.name]; s.value == "" {
					p.add("%s is not set: give the path that `make podvm-image` prints", f.name)
				}
				continue
			}
			if fi, err := os.Stat(f.path); err != nil {
				p.add("%s is %q (%s): %v; build it with `make podvm-image`", f.name, f.path, source(f.name, ""), errors.Unwrap(err))
			} else if !fi.Mode().IsRegular() {
				p.add("%s is %q (%s): it is not a file", f.name, f.path, source(f.name, ""))
			}
		}
	}
}
