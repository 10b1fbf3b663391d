// SPDX-License-Identifier: Apache-2.0

package compat

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func section(name, body string) Section {
	return Section{Name: name, Title: strings.ToUpper(name), Command: "make " + name, Body: body}
}

func text(name, body string) string {
	return "<!-- " + name + ": begin -->\n## " + strings.ToUpper(name) + "\n\nWritten by `make " + name + "`.\n\n" + body + "\n<!-- " + name + ": end -->\n"
}

func TestPut(t *testing.T) {
	for name, tc := range map[string]struct{ page, section, want, err string }{
		"first of a page":           {"# Page\n", "critest", "# Page\n\n" + text("critest", "new"), ""},
		"replaced, rest untouched":  {"a\n" + text("critest", "old") + "b\n", "critest", "a\n" + text("critest", "new") + "b\n", ""},
		"before a later one":        {"a\n\n" + text("nodeconformance", "x"), "critest", "a\n\n" + text("critest", "new") + "\n" + text("nodeconformance", "x"), ""},
		"after an earlier one":      {text("containerd", "x"), "critest", text("containerd", "x") + "\n" + text("critest", "new"), ""},
		"unknown ones come last":    {text("nodeconformance", "x"), "other", text("nodeconformance", "x") + "\n" + text("other", "new"), ""},
		"a marker without its pair": {begin("critest"), "critest", "", "the markers of section critest do not pair: repair them, or remove both"},
		"the wrong way round":       {end("critest") + begin("critest"), "critest", "", "the markers of section critest do not pair: repair them, or remove both"},
		"twice":                     {text("critest", "x") + text("critest", "x"), "critest", "", "the markers of section critest do not pair: repair them, or remove both"},
		"a bad name":                {"", "No", "", `section "No": a name has lower case letters and dashes`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := put(tc.page, section(tc.section, "\nnew\n\n"))
			if tc.err != "" {
				if err == nil || err.Error() != tc.err {
					t.Fatalf("error %v, want %s", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestUpdate: two targets at once lose nothing of each other's, and doing it again
// changes nothing.
func TestUpdate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "page.md")
	names := append([]string{"another"}, Sections...)
	for range 2 {
		var wg sync.WaitGroup
		for _, n := range names {
			wg.Go(func() {
				if err := Update(path, section(n, "body of "+n)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if strings.Count(string(page), text(n, "body of "+n)) != 1 {
			t.Errorf("section %s is not there once:\n%s", n, page)
		}
	}
	if !strings.HasPrefix(string(page), introduction) {
		t.Errorf("the introduction is not first:\n%s", page)
	}
	last := -1
	for _, n := range Sections {
		at := strings.Index(string(page), begin(n))
		if at < last {
			t.Errorf("section %s is not in its place:\n%s", n, page)
		}
		last = at
	}
	bad := strings.Replace(string(page), end("critest"), "", 1)
	if err := os.WriteFile(path, []byte(bad), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := Update(path, section("critest", "x")); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a broken page was accepted, or the error does not name it: %v", err)
	}
	if after, _ := os.ReadFile(path); string(after) != bad {
		t.Error("a refused page was changed")
	}
}

func TestTable(t *testing.T) {
	got := Table([]string{"a", "b"}, [][]string{{"1", "x|y"}, {"2", "two\nlines"}})
	want := "| a | b |\n|---|---|\n| 1 | x\\|y |\n| 2 | two lines |\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}
