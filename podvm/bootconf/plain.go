// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"slices"
	"strconv"
	"strings"
)

// The documents of our own providers come in one plain form each, which is read here
// in 1 ms of an emulated start; the YAML library takes 30 ms for them (QEMU 7.2,
// 2026-11-21). What is in any other form is not refused here but left to the library.
// A document that both read means the same to both.

// plainLines walks a document line by line.
type plainLines struct {
	rest string
}

// next returns the line that is up, without taking it. There is none after the end,
// or when the document does not end in a newline.
func (p *plainLines) next() (string, bool) {
	line, _, ok := strings.Cut(p.rest, "\n")
	return line, ok
}

func (p *plainLines) take() { _, p.rest, _ = strings.Cut(p.rest, "\n") }

// exactly takes the line if it is this one.
func (p *plainLines) exactly(want string) bool {
	line, ok := p.next()
	if !ok || line != want {
		return false
	}
	p.take()
	return true
}

// value takes the line if it is before, one or more of the characters in set, and
// after.
func (p *plainLines) value(before, after, set string) (string, bool) {
	line, ok := p.next()
	if !ok {
		return "", false
	}
	line, found := strings.CutPrefix(line, before)
	line, closed := strings.CutSuffix(line, after)
	if !found || !closed || line == "" || strings.Trim(line, set) != "" {
		return "", false
	}
	p.take()
	return line, true
}

const (
	digits      = "0123456789"
	hexDigits   = digits + "abcdefABCDEF"
	letters     = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	blockIndent = "      "
)

// plainUserData reads write_files whose paths are some of Paths and whose contents
// are literal blocks of printable ASCII, indented by blockIndent.
func plainUserData(doc []byte) (c cloudConfig, ok bool) {
	p := &plainLines{rest: string(doc)}
	if !p.exactly(header) || !p.exactly("write_files:") {
		return c, false
	}
	for p.rest != "" {
		line, _ := p.next()
		path, found := strings.CutPrefix(line, "- path: ")
		if !found || !slices.Contains(Paths, path) {
			return c, false
		}
		p.take()
		f := writeFile{Path: path}
		switch {
		case p.exactly("  content: |"):
			f.Content, ok = p.block()
			f.Content += "\n"
		case p.exactly("  content: |-"):
			f.Content, ok = p.block()
		default:
			ok = true
		}
		if !ok {
			return c, false
		}
		c.WriteFiles = append(c.WriteFiles, f)
	}
	return c, len(c.WriteFiles) > 0
}

// block takes the lines of a literal block and returns them without the last newline.
// A block that begins with a space, or has a line that ends in one, or ends in an empty
// line, is for the library: YAML's rules for those are long.
func (p *plainLines) block() (string, bool) {
	var b strings.Builder
	last := ""
	for n := 0; ; n++ {
		line, ok := p.next()
		text, indented := strings.CutPrefix(line, blockIndent)
		switch {
		case ok && (indented || line == "" && n > 0):
		case n == 0 || last == "" || p.rest != "" && !ok:
			return "", false
		default:
			return b.String(), true
		}
		if n == 0 && (text == "" || text[0] == ' ') || strings.HasSuffix(line, " ") || !printable(text) {
			return "", false
		}
		if n > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(text)
		last = line
		p.take()
	}
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// plainNetwork reads interfaces with a MAC address, addresses in quotes and an MTU,
// one to a line.
func plainNetwork(doc []byte) (n netplan, ok bool) {
	p := &plainLines{rest: string(doc)}
	if !p.exactly("version: 2") || !p.exactly("ethernets:") {
		return n, false
	}
	version := 2
	n = netplan{Version: &version, Ethernets: make(map[string]netplanIf)}
	for p.rest != "" {
		id, ok := p.value("  id", ":", digits)
		if _, twice := n.Ethernets["id"+id]; !ok || twice || !p.exactly("    match:") {
			return n, false
		}
		var e netplanIf
		if e.Match.MACAddress, ok = p.value(`      macaddress: "`, `"`, hexDigits+":"); !ok || !p.exactly("    addresses:") {
			return n, false
		}
		for {
			a, ok := p.value(`    - "`, `"`, hexDigits+".:/")
			if !ok {
				break
			}
			e.Addresses = append(e.Addresses, a)
		}
		if s, ok := p.value("    mtu: ", "", digits); ok {
			mtu, err := strconv.Atoi(s)
			if err != nil || s[0] == '0' {
				return n, false
			}
			e.MTU = &mtu
		}
		if len(e.Addresses) == 0 {
			return n, false
		}
		n.Ethernets["id"+id] = e
	}
	return n, len(n.Ethernets) > 0
}

// plainHostname reads a document of instance-id and local-hostname.
func plainHostname(doc []byte) (name string, ok bool) {
	p := &plainLines{rest: string(doc)}
	id, ok := p.value("instance-id: ", "", letters+digits+"-")
	if !ok || !strings.ContainsAny(id[:1], letters) {
		return "", false
	}
	name, ok = p.value("local-hostname: ", "", letters+digits+"-")
	// Words that YAML takes for something else than text begin otherwise, or have
	// no dash.
	plain := ok && p.rest == "" && strings.Contains(name, "-") && strings.ContainsAny(name[:1], letters)
	return name, plain
}
