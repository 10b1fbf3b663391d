// SPDX-License-Identifier: Apache-2.0

// Package userdata writes and reads the user data of a pod VM: a cloud-config
// document with write_files only, in the form that cloud-api-adaptor has always
// written:
//
//	#cloud-config
//	write_files:
//	- path: /run/peerpod/apf.json
//	  content: |
//	      {
//	      }
//
// A file that does not end in a newline is written with "|-". Text that a YAML
// block cannot hold exactly (a carriage return, a control character, spaces at
// its very start or on lines of their own) is written in double quotes instead.
// Parse reads both.
//
// Clouds limit the size of the document: EC2 to 16 KiB, Azure to 64 KiB. The size
// is the length of what Render returns.
package userdata

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"go.yaml.in/yaml/v3"
)

// File is one file to be written in the VM before anything else reads it.
type File struct {
	Path    string // absolute and clean, of [A-Za-z0-9/._-]
	Content []byte // UTF-8 text; empty makes an empty file
}

const (
	header = "#cloud-config"
	indent = "      " // of a block's lines, as upstream's template writes them
)

var pathRule = regexp.MustCompile(`^/[A-Za-z0-9/._-]+$`)

// Render makes the document. Parse gives back the same files, byte for byte.
// InvalidArgument: no file, a path that is not clean or given twice, or content
// that is not UTF-8.
func Render(files []File) ([]byte, error) {
	if err := check(files); err != nil {
		return nil, fmt.Errorf("render user data: %w", err)
	}
	var b bytes.Buffer
	b.WriteString(header + "\nwrite_files:\n")
	for _, f := range files {
		fmt.Fprintf(&b, "- path: %s\n", f.Path)
		text := string(f.Content)
		switch {
		case text == "":
		case blockHolds(text):
			body, found := strings.CutSuffix(text, "\n")
			if found {
				b.WriteString("  content: |\n")
			} else {
				b.WriteString("  content: |-\n")
			}
			for line := range strings.SplitSeq(body, "\n") {
				if line != "" {
					b.WriteString(indent + line)
				}
				b.WriteByte('\n')
			}
		default:
			b.WriteString("  content: " + quote(text) + "\n")
		}
	}
	return b.Bytes(), nil
}

// Parse reads a document and returns its files in order. InvalidArgument: not a
// cloud-config, any key besides write_files, path and content, or files that
// Render would refuse.
func Parse(doc []byte) ([]File, error) {
	first, _, _ := bytes.Cut(doc, []byte("\n"))
	if strings.TrimRight(string(first), " \r") != header {
		return nil, fmt.Errorf("parse user data: first line is not %q: %w", header, errdefs.ErrInvalidArgument)
	}
	var d struct {
		WriteFiles []struct {
			Path    string `yaml:"path"`
			Content string `yaml:"content"`
		} `yaml:"write_files"`
	}
	dec := yaml.NewDecoder(bytes.NewReader(doc))
	dec.KnownFields(true)
	if err := dec.Decode(&d); err != nil {
		return nil, fmt.Errorf("parse user data: %s: %w", plain(err), errdefs.ErrInvalidArgument)
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("parse user data: more than one YAML document: %w", errdefs.ErrInvalidArgument)
	}
	files := make([]File, 0, len(d.WriteFiles))
	for _, f := range d.WriteFiles {
		files = append(files, File{Path: f.Path, Content: []byte(f.Content)})
	}
	if err := check(files); err != nil {
		return nil, fmt.Errorf("parse user data: %w", err)
	}
	return files, nil
}

// plain keeps what the YAML library says about structure and drops values: the
// document holds keys, and errors end in logs.
func plain(err error) string {
	var te *yaml.TypeError
	if errors.As(err, &te) {
		where := make([]string, 0, len(te.Errors))
		for _, e := range te.Errors {
			if field, _, found := strings.Cut(e, " not found in type"); found {
				where = append(where, field+" is not allowed")
			} else {
				line, _, _ := strings.Cut(e, ":")
				where = append(where, line+": wrong type of value")
			}
		}
		return strings.Join(where, ", ")
	}
	return err.Error()
}

func check(files []File) error {
	if len(files) == 0 {
		return fmt.Errorf("no file in write_files: %w", errdefs.ErrInvalidArgument)
	}
	seen := make(map[string]bool, len(files))
	for _, f := range files {
		switch {
		case !pathRule.MatchString(f.Path) || path.Clean(f.Path) != f.Path:
			return fmt.Errorf("path %q is not absolute and clean, of [A-Za-z0-9/._-]: %w", f.Path, errdefs.ErrInvalidArgument)
		case seen[f.Path]:
			return fmt.Errorf("path %s is given twice: %w", f.Path, errdefs.ErrInvalidArgument)
		case !utf8.Valid(f.Content):
			return fmt.Errorf("content of %s is not UTF-8 text: %w", f.Path, errdefs.ErrInvalidArgument)
		}
		seen[f.Path] = true
	}
	return nil
}

// blockHolds tells whether a literal block gives text back exactly, whichever
// YAML parser reads it.
func blockHolds(text string) bool {
	if strings.HasPrefix(text, "\n") || strings.HasSuffix(text, "\n\n") || text[0] == ' ' || text[0] == '\t' {
		return false // the first line sets the indentation, the end sets the chomping
	}
	for _, r := range text {
		switch {
		case r == '\n' || r == '\t' || r >= ' ' && r <= '~':
		case r >= 0xa0 && r <= 0xd7ff && r != 0x2028 && r != 0x2029: // these two break lines
		case r >= 0xe000 && r <= 0xfffd && r != 0xfeff: // the byte order mark
		case r >= 0x10000:
		default:
			return false // not printable in YAML 1.2, §5.1
		}
	}
	for line := range strings.SplitSeq(text, "\n") {
		if line != "" && strings.Trim(line, " \t") == "" {
			return false
		}
	}
	return true
}

// quote writes text as a double-quoted YAML scalar on one line, all but plain
// ASCII escaped.
func quote(text string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range text {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r >= ' ' && r <= '~':
			b.WriteRune(r)
		case r <= 0xff:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r <= 0xffff:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
	}
	b.WriteByte('"')
	return b.String()
}
