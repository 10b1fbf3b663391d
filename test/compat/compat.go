// SPDX-License-Identifier: Apache-2.0

// Package compat writes docs/compatibility.md, which several targets share: each
// replaces its own sections and leaves the others' as they are.
//
//	<!-- critest: begin -->
//	## critest
//
//	Written by `make critest`.
//
//	| containerd | passed | ...
//	<!-- critest: end -->
//
// What a person writes between sections stays. A section that the file does not have
// yet is put in the order of Sections, or last.
package compat

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Section is one part of the page, owned by one command.
type Section struct {
	// Name stands in the markers: one word of lower case letters and dashes.
	Name string
	// Title is the heading, without the "## ".
	Title string
	// Command is what the reader types to make the section again: "make critest".
	Command string
	// Body is Markdown.
	Body string
}

// Sections are the names of the sections in the order they have on the page.
var Sections = []string{"containerd", "critest", "exclusions", "nodeconformance"}

// introduction begins a page that does not exist yet.
const introduction = `# Compatibility

What other people's test suites say of ` + "`kata-remote`" + `, measured against runc on the same node in the same run. Each section is
written by the command it names; what stands between the markers is replaced by it.
`

// Path is the page's place in a working copy of the repository.
func Path(root string) string { return filepath.Join(root, "docs", "compatibility.md") }

// Update puts the sections into the page at path, which is made where there is none.
// Others may do the same at the same time: each waits for the one before. A page
// whose markers do not pair is refused, and left as it is.
func Update(path string, sections ...Section) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil { // until dir is closed
		return fmt.Errorf("lock %s: %w", dir.Name(), err)
	}
	page, err := os.ReadFile(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		page = []byte(introduction)
	case err != nil:
		return err
	}
	text := string(page)
	for _, s := range sections {
		if text, err = put(text, s); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	if text == string(page) {
		return nil
	}
	// In one step: who reads the page meanwhile sees the old one or the new one.
	next := path + ".new"
	if err := os.WriteFile(next, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(next, path)
}

func begin(name string) string { return "<!-- " + name + ": begin -->\n" }
func end(name string) string   { return "<!-- " + name + ": end -->\n" }

// put replaces a section of the page, or adds it.
func put(page string, s Section) (string, error) {
	if s.Name == "" || strings.Trim(s.Name, "abcdefghijklmnopqrstuvwxyz-") != "" {
		return "", fmt.Errorf("section %q: a name has lower case letters and dashes", s.Name)
	}
	text := begin(s.Name) + "## " + s.Title + "\n\nWritten by `" + s.Command + "`.\n\n" + strings.TrimSpace(s.Body) + "\n" + end(s.Name)
	from, to, err := find(page, s.Name)
	if err != nil {
		return "", err
	}
	if from >= 0 {
		return page[:from] + text + page[to:], nil
	}
	// Before the first of those that follow it.
	if i := slices.Index(Sections, s.Name); i >= 0 {
		for _, later := range Sections[i+1:] {
			from, _, err := find(page, later)
			if err != nil {
				return "", err
			}
			if from >= 0 {
				return page[:from] + text + "\n" + page[from:], nil
			}
		}
	}
	return strings.TrimRight(page, "\n") + "\n\n" + text, nil
}

// find returns where a section begins and ends, markers included; -1 where the page
// has none.
func find(page, name string) (from, to int, err error) {
	from, to = strings.Index(page, begin(name)), strings.Index(page, end(name))
	switch {
	case from < 0 && to < 0:
		return -1, -1, nil
	case from < 0 || to < from,
		strings.Count(page, begin(name)) != 1, strings.Count(page, end(name)) != 1:
		return 0, 0, fmt.Errorf("the markers of section %s do not pair: repair them, or remove both", name)
	}
	return from, to + len(end(name)), nil
}

// Table makes a Markdown table. A bar in a cell is escaped, a line break becomes a
// space.
func Table(header []string, rows [][]string) string {
	var b strings.Builder
	line := func(cells []string) {
		for _, c := range cells {
			b.WriteString("| " + strings.NewReplacer("|", `\|`, "\n", " ").Replace(c) + " ")
		}
		b.WriteString("|\n")
	}
	line(header)
	b.WriteString(strings.Repeat("|---", len(header)) + "|\n")
	for _, r := range rows {
		line(r)
	}
	return b.String()
}
