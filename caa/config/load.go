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
	return load(path, environ, flags, false)
}

// LoadAccount is Load for commands that work in the account of a provider, before there
// is an adaptor: what only pods need may be missing, or still be a placeholder. The
// provider is the one given, whatever CLOUD_PROVIDER says.
func LoadAccount(path string, environ []string, provider string) (*Config, error) {
	return load(path, append(slices.Clone(environ), keyProvider+"="+provider), Flags{}, true)
}

func load(path string, environ []string, flags Flags, account bool) (*Config, error) {
	var (
		p      problems
		values = map[string]setting{}
	)
	var file []setting
	if path != "" {
		text, err := os.ReadFile(path)
		if err != nil {
			p.add("--config: %v", err)
		}
		file = p.parseFile(path, string(text))
	}
	provider := chosen(file, environ)
	warnings := p.names(file, environ, provider)
	for _, s := range file {
		values[s.name] = s
	}
	for _, e := range environ {
		if name, value, _ := strings.Cut(e, "="); standingOf(name, provider) == aSetting {
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
	if account {
		for name, s := range values {
			if slices.Contains(podKeys, name) && unfilled(name, s.value) != "" {
				delete(values, name)
			}
		}
	}
	c := p.apply(values, provider)
	c.account = account
	p.validate(c, values)
	if len(p) > 0 {
		sort.Strings(p)
		return nil, errdefs.ErrInvalidArgument.WithMessage(strings.Join(p, "\n"))
	}
	c.Warnings = append(c.Warnings, warnings...)
	c.reload = func() (*Config, error) { return load(path, environ, flags, account) }
	return c, nil
}

// podKeys are those that manuals leave to be filled in after the account is set up.
var podKeys = []string{"PODVM_AMI_ID", "AWS_SUBNET_ID", "AWS_VPC_ID", "AWS_SG_IDS", "AZURE_IMAGE_ID", "AZURE_SUBNET_ID", "AZURE_NSG_ID"}

// Reload reads the same file, environment and flags again. Only the file can have
// changed; who uses the result decides what may change while the adaptor runs.
func (c *Config) Reload() (*Config, error) { return c.reload() }

// chosen is the provider whose settings count. "": CLOUD_PROVIDER names none that
// there is, which is reported elsewhere.
func chosen(file []setting, environ []string) string {
	name := ""
	for _, s := range file {
		if s.name == keyProvider {
			name = s.value
		}
	}
	for _, e := range environ {
		if v, ok := strings.CutPrefix(e, keyProvider+"="); ok {
			name = v
		}
	}
	switch {
	case name == "":
		return ProviderLocal
	case slices.Contains(Providers, name):
		return name
	}
	return ""
}

// names reports what is set under names that are wrong, and returns warnings about
// those that are right and without effect.
func (p *problems) names(file []setting, environ []string, provider string) (warnings []string) {
	set := map[string]bool{}
	for _, s := range file {
		set[s.name] = s.value != ""
	}
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		set[name] = value != ""
	}
	for _, s := range file {
		switch standingOf(s.name, provider) {
		case unheard:
			p.add("%s: %s is not a setting%s", s.source, s.name, suggestion(s.name, provider))
		case ofLibrary:
			warnings = append(warnings, s.name+" has no effect in a file: the cloud's library reads it from the environment")
		}
	}
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		if right := slip(name, provider, func(n string) bool { return set[n] }); right != "" && value != "" {
			p.add("%s (the environment) is not a setting; did you mean %s?", name, right)
		}
	}
	return warnings
}

var flagNames = map[string]string{
	"STATE_DIR": "--state-dir", "REMOTE_HYPERVISOR_ENDPOINT": "--socket", "PODS_DIR": "--pods-dir", "LOG_LEVEL": "--log-level",
}

// problems are the sentences Load reports.
type problems []string

func (p *problems) add(format string, a ...any) { *p = append(*p, fmt.Sprintf(format, a...)) }

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
			// Not the line: it may be a secret, or the rest of one.
			if word := strings.TrimSuffix(strings.Fields(line)[0], ":"); has(allKeys, word) {
				p.add("%s: want %s=VALUE, with nothing else on the line", at, word)
			} else {
				p.add("%s: want KEY=VALUE, or a # before it", at)
			}
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

// What manuals have in the place of a value. Within values it is looked for in those of
// the clouds, whose ids and names hold no such characters.
var (
	placeholderRule = regexp.MustCompile(`^<[^<>]*>$`)
	withinRule      = regexp.MustCompile(`<[^<>]+>`)
	userRule        = regexp.MustCompile(`//[^/@]*@`) // of a URL, with a password
	shellRule       = regexp.MustCompile(`\$(\{[A-Za-z_][A-Za-z0-9_]*\}|[A-Za-z_][A-Za-z0-9_]*)`)
)

// unfilled is what is still to be put into a value. "": nothing.
func unfilled(name, value string) string {
	switch {
	case placeholderRule.MatchString(value):
		return fmt.Sprintf("still the placeholder %q", value)
	case slices.Contains(secretKeys, name), !has(cloudKeys, name) && !has(awsKeys, name) && !has(azureKeys, name):
		return ""
	}
	if m := withinRule.FindString(value); m != "" {
		return fmt.Sprintf("%q, which still has the placeholder %q", value, m)
	}
	if m := shellRule.FindString(value); m != "" {
		return fmt.Sprintf("%q, in which no shell has replaced %q", value, m)
	}
	return ""
}

// apply sets what is set. An empty value is one that is not set, as in ConfigMaps.
func (p *problems) apply(values map[string]setting, provider string) *Config {
	c := defaults()
	c.Provider = provider // keys after CLOUD_PROVIDER's depend on it
	for _, k := range keysOf(provider) {
		s, ok := values[k.name]
		if !ok || s.value == "" {
			continue
		}
		if why := unfilled(s.name, s.value); why != "" {
			p.add("%s is %s (%s): put a value in its place, or remove it", s.name, why, s.source)
			continue
		}
		if err := k.set(&c, s.value); err != nil {
			shown := fmt.Sprintf("%q", userRule.ReplaceAllString(s.value, "//"+redacted+"@"))
			if slices.Contains(secretKeys, s.name) {
				shown = "wrong"
			}
			p.add("%s is %s (%s): %v", s.name, shown, s.source, err)
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
	switch c.Provider {
	case ProviderAWS:
		p.validateCloud(c, values, DefaultAWSRootVolumeGiB)
		p.validateAWS(c, values)
	case ProviderAzure:
		p.validateCloud(c, values, 0)
		p.validateAzure(c, values)
	case ProviderLocal:
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
