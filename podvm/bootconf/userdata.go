// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"go.yaml.in/yaml/v3"
)

// header is the first line of every cloud-config document.
const header = "#cloud-config"

// Paths lists the files that user data may write: those of cloud-api-adaptor 0.22
// (cloud-api-adaptor 0.22, pkg/userdata/provision.go).
var Paths = []string{
	podvmconfig.Path,
	"/run/peerpod/aa.toml",
	podvmconfig.AuthPath,
	"/run/peerpod/cdh.toml",
	"/run/peerpod/initdata",
	"/run/peerpod/scratch-space.marker",
}

// File is one file of the user data.
type File struct {
	Path    string // one of Paths
	Content []byte // may be empty
}

// cloudConfig is the part of cloud-config that is understood.
type cloudConfig struct {
	WriteFiles []writeFile `yaml:"write_files"`
}

type writeFile struct {
	Path    string `yaml:"path"`
	Content string `yaml:"content"`
}

// ParseUserData reads a cloud-config document that consists of write_files with
// path and content. InvalidArgument: anything else, a path outside Paths, or one
// that comes twice; the message names the entry.
func ParseUserData(doc []byte) ([]File, error) {
	switch {
	case len(bytes.TrimSpace(doc)) == 0:
		return nil, invalid("the document is empty")
	case len(doc) > MaxDocument:
		return nil, invalid("the document has %d bytes, more than %d", len(doc), MaxDocument)
	}
	first, _, _ := strings.Cut(string(doc[:min(len(doc), 80)]), "\n")
	if strings.TrimSpace(first) != header {
		return nil, invalid("the first line is %q, want %q", first, header)
	}
	c, plain := plainUserData(doc)
	if !plain {
		c = cloudConfig{}
		if err := decodeStrict(doc, &c); err != nil {
			return nil, err
		}
	}
	if len(c.WriteFiles) == 0 {
		return nil, invalid("write_files is missing")
	}
	var files []File
	for i, f := range c.WriteFiles {
		if !slices.Contains(Paths, f.Path) {
			return nil, invalid("write_files[%d].path %q is not one of %s", i, f.Path, strings.Join(Paths, ", "))
		}
		if slices.ContainsFunc(files, func(o File) bool { return o.Path == f.Path }) {
			return nil, invalid("write_files[%d].path %s comes twice", i, f.Path)
		}
		files = append(files, File{Path: f.Path, Content: []byte(f.Content)})
	}
	return files, nil
}

// WriteFiles writes the files below root ("/" in the guest), readable for root only
// because they hold keys. A file that is there is replaced.
func WriteFiles(root string, files []File) error {
	for _, f := range files {
		path := filepath.Join(root, f.Path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return fmt.Errorf("write %s: %w", f.Path, err)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("write %s: %w", f.Path, err)
		}
		w, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return fmt.Errorf("write %s: %w", f.Path, err)
		}
		_, err = w.Write(f.Content)
		if err := errors.Join(err, w.Close()); err != nil {
			return fmt.Errorf("write %s: %w", f.Path, err)
		}
	}
	return nil
}

// decodeStrict decodes exactly one YAML document and takes no unknown key.
func decodeStrict(doc []byte, into any) error {
	d := yaml.NewDecoder(bytes.NewReader(doc))
	d.KnownFields(true)
	if err := d.Decode(into); err != nil {
		return invalid("%s", yamlReason(err))
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return invalid("more than one YAML document")
	}
	return nil
}

// yamlReason makes one line of a YAML error and takes out Go's type names and the
// values, which may be secret.
func yamlReason(err error) string {
	if errors.Is(err, io.EOF) {
		return "the document is empty"
	}
	var t *yaml.TypeError
	if !errors.As(err, &t) || len(t.Errors) == 0 {
		return strings.ReplaceAll(err.Error(), "\n", " ")
	}
	var out []string
	for _, e := range t.Errors {
		if where, what, found := strings.Cut(e, ": field "); found {
			key, _, _ := strings.Cut(what, " ")
			out = append(out, fmt.Sprintf("%s: key %s is not known here", where, key))
			continue
		}
		where, what, _ := strings.Cut(e, ": ")
		kind := "a value"
		if tag, _, found := strings.Cut(strings.TrimPrefix(what, "cannot unmarshal "), " "); found {
			kind = strings.TrimPrefix(tag, "!!")
		}
		_, want, _ := strings.Cut(what, " into ")
		if strings.HasPrefix(want, "struct") || strings.HasPrefix(want, "bootconf.") || strings.HasPrefix(want, "*") {
			want = "map"
		}
		if strings.HasPrefix(want, "[]") {
			want = "list"
		}
		out = append(out, fmt.Sprintf("%s: found %s, want %s", where, kind, want))
	}
	return strings.Join(out, "; ")
}

func invalid(format string, a ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
}
