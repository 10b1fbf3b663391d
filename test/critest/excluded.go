// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
)

// class is one section of excluded.md: specs that have the same reason.
type class struct {
	Name  string
	Why   string   // why it cannot be had in another machine
	Error string   // what the user is told at create
	Specs []string // full names
	// NotRun: nothing is said of the runtime: the specs cannot be run here at all,
	// with any. Such a class has no error.
	NotRun bool
}

// exclusions are all of excluded.md.
type exclusions []class

// readExcluded reads excluded.md, whose form its first lines tell.
func readExcluded(path string) (exclusions, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	ex, err := parseExcluded(string(b))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return ex, nil
}

func parseExcluded(text string) (exclusions, error) {
	var ex exclusions
	var c *class
	var open *string // the paragraph that goes on
	for n, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		name, heading := strings.CutPrefix(line, "## ")
		switch {
		case heading:
			ex = append(ex, class{Name: name})
			c, open = &ex[len(ex)-1], nil
		case c == nil: // the introduction
		case line == "":
			open = nil
		case strings.HasPrefix(line, "Why: "):
			c.Why, open = strings.TrimPrefix(line, "Why: "), &c.Why
		case strings.HasPrefix(line, "Error: "):
			c.Error, open = strings.TrimPrefix(line, "Error: "), &c.Error
		case line == "Not run.":
			c.NotRun, open = true, nil
		case strings.HasPrefix(line, "- "):
			spec := strings.TrimPrefix(line, "- ")
			if other, ok := ex.find(spec); ok {
				return nil, fmt.Errorf("line %d: %q is in class %s already", n+1, spec, other.Name)
			}
			c.Specs, open = append(c.Specs, spec), nil
		case open != nil:
			*open += " " + line
		default:
			return nil, fmt.Errorf("line %d: %q is neither a reason (Why:), an error (Error:) nor a spec (- name)", n+1, line)
		}
	}
	for i := range ex {
		ex[i].Error = strings.Trim(ex[i].Error, "`")
		switch c := ex[i]; {
		case c.Why == "":
			return nil, fmt.Errorf("class %s does not say why", c.Name)
		case c.Error == "" && !c.NotRun:
			return nil, fmt.Errorf("class %s does not say what error the user gets", c.Name)
		case c.Error != "" && c.NotRun:
			return nil, fmt.Errorf("class %s is not run, and yet has an error", c.Name)
		}
	}
	return ex, nil
}

// find returns the class of a spec.
func (ex exclusions) find(spec string) (class, bool) {
	for _, c := range ex {
		if slices.Contains(c.Specs, spec) {
			return c, true
		}
	}
	return class{}, false
}

// notRun are the specs that no runtime can be asked.
func (ex exclusions) notRun() []string {
	var specs []string
	for _, c := range ex {
		if c.NotRun {
			specs = append(specs, c.Specs...)
		}
	}
	return specs
}
