// SPDX-License-Identifier: Apache-2.0

package userdata

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

// TestForm holds the bytes to the form that existing images read.
func TestForm(t *testing.T) {
	got, err := Render([]File{
		{Path: "/run/peerpod/apf.json", Content: []byte("{\n  \"a\": 1\n}\n")},
		{Path: "/run/peerpod/scratch-space.marker"},
		{Path: "/run/peerpod/auth.json", Content: []byte("{}")},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := `#cloud-config
write_files:
- path: /run/peerpod/apf.json
  content: |
      {
        "a": 1
      }
- path: /run/peerpod/scratch-space.marker
- path: /run/peerpod/auth.json
  content: |-
      {}
`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Fatalf("-want +got\n%s", diff)
	}
}

var texts = []string{
	"", "a", "a\n", "a\n\n", "\n", "\n\n", "\na", " a", "  a\n b\n", "\ta", "a\n\nb", "a\n  \nb", "a\n  ", "a ", "a \n",
	"a\r\nb\r\n", "\r", "\x00", "\x1b[0m", "\u0085", "\u2028x", "\ufeffx", "x\ufeff", "é\n", "日本\n", "\U0001f600", "\"", "\\", "'", "- a\n", "#x\n", "a: b\n",
	"---\n", "...\n", "%YAML 1.2\n", "|", "{{ .X }}\n", "a\n#b\n", "\x7f", "\u0080", "\ufffe", "a\n\tb\n", "~", "null", "true", "1.0", "a\n\n\n",
	"-----BEGIN CERTIFICATE-----\nMIIB==\n-----END CERTIFICATE-----\n",
}

func TestRoundTrip(t *testing.T) {
	for _, text := range texts {
		roundTrip(t, text)
	}
	// Files before and after must not bleed into each other.
	var all []File
	for i, text := range texts {
		all = append(all, File{Path: "/f/" + strings.Repeat("x", i+1), Content: []byte(text)})
	}
	doc, err := Render(all)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(doc)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(all, got, cmp.Transformer("text", func(b []byte) string { return string(b) })); diff != "" {
		t.Fatalf("-want +got\n%s", diff)
	}
}

func FuzzRoundTrip(f *testing.F) {
	for _, text := range texts {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if utf8.ValidString(text) {
			roundTrip(t, text)
		}
	})
}

func roundTrip(t *testing.T, text string) {
	t.Helper()
	doc, err := Render([]File{{Path: "/a", Content: []byte(text)}, {Path: "/b", Content: []byte("end\n")}})
	if err != nil {
		t.Fatalf("render %q: %v", text, err)
	}
	got, err := Parse(doc)
	if err != nil {
		t.Fatalf("parse %q: %v\n%s", text, err, doc)
	}
	if len(got) != 2 || string(got[0].Content) != text || string(got[1].Content) != "end\n" {
		t.Fatalf("text %q came back as %q\n%s", text, got, doc)
	}
}

func TestRefused(t *testing.T) {
	for name, files := range map[string][]File{
		"none":         nil,
		"relative":     {{Path: "run/x"}},
		"not clean":    {{Path: "/run/../etc/x"}},
		"slash":        {{Path: "/run/"}},
		"strange path": {{Path: "/run/a b"}},
		"twice":        {{Path: "/a"}, {Path: "/a"}},
		"not utf-8":    {{Path: "/a", Content: []byte{0xff}}},
	} {
		if _, err := Render(files); !errdefs.IsInvalidArgument(err) {
			t.Errorf("render, %s: %v, want InvalidArgument", name, err)
		}
	}
	for name, doc := range map[string]string{
		"empty":          "",
		"no header":      "write_files:\n- path: /a\n",
		"other header":   "#!/bin/sh\n",
		"nothing":        "#cloud-config\n",
		"unknown key":    "#cloud-config\nruncmd: [a]\nwrite_files:\n- path: /a\n",
		"unknown field":  "#cloud-config\nwrite_files:\n- path: /a\n  owner: root\n",
		"encoding":       "#cloud-config\nwrite_files:\n- path: /a\n  encoding: b64\n  content: YQ==\n",
		"two documents":  "#cloud-config\nwrite_files:\n- path: /a\n---\na: b\n",
		"wrong type":     "#cloud-config\nwrite_files:\n- path: /a\n  content: [a]\n",
		"duplicate key":  "#cloud-config\nwrite_files:\n- path: /a\n  path: /b\n",
		"duplicate path": "#cloud-config\nwrite_files:\n- path: /a\n- path: /a\n",
	} {
		if _, err := Parse([]byte(doc)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("parse, %s: %v, want InvalidArgument", name, err)
		}
	}
}

func TestErrorsHoldNoContent(t *testing.T) {
	_, err := Parse([]byte("#cloud-config\nwrite_files:\n- path: /a\n  content: {sekret: sekret}\n"))
	if err == nil || strings.Contains(err.Error(), "sekret") {
		t.Fatalf("got %v; want an error without the value", err)
	}
}
