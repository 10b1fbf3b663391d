// SPDX-License-Identifier: Apache-2.0

package local

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"unicode"
)

// Serial logs are for a person who asks why a pod's VM did not come up. What they
// take is bounded: a guest can write without end.
const (
	maxSerialBytes  = 4 << 20 // of a running VM; beyond it the oldest part is dropped
	keepSerialBytes = 1 << 20 // what is kept when that happens, and of each ended VM
	keepLogs        = 20      // ended VMs whose logs are kept
	tailBytes       = 8 << 10 // in which lastLine looks
)

func (p *Provider) logsDir() string { return filepath.Join(p.cfg.StateDir, "logs") }

// boundLog shortens a log that QEMU writes. QEMU has it open for appending and
// goes on at the new end; what it writes between the two steps is lost.
func boundLog(path string, limit, keep int64) error {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() <= limit {
		return nil
	}
	if err != nil {
		return err
	}
	b, err := tail(path, keep)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.Write(b)
	}
	return errors.Join(err, f.Close())
}

// saveLog keeps the serial log of an instance that is going away, as
// <name>-<id>.log, and drops the oldest beyond keepLogs.
func (p *Provider) saveLog(r *record) error {
	b, err := tail(filepath.Join(p.dir(r.ID), serialName), keepSerialBytes)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(b) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll(p.logsDir(), 0o700); err != nil {
		return err
	}
	name := string(r.ID) + ".log"
	if r.Name != "" {
		name = r.Name + "-" + name
	}
	if err := os.WriteFile(filepath.Join(p.logsDir(), name), b, 0o600); err != nil {
		return err
	}
	return p.pruneLogs()
}

func (p *Provider) pruneLogs() error {
	entries, err := os.ReadDir(p.logsDir())
	if err != nil {
		return err
	}
	type log struct {
		name string
		at   int64
	}
	var logs []log
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() {
			logs = append(logs, log{e.Name(), info.ModTime().UnixNano()})
		}
	}
	sort.Slice(logs, func(a, b int) bool { return logs[a].at > logs[b].at })
	for _, l := range logs[min(keepLogs, len(logs)):] {
		if err := os.Remove(filepath.Join(p.logsDir(), l.name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// tail returns the last n bytes of a file.
func tail(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(0, info.Size()-n), n))
}

// lastWords tells why an instance ended: the guest kernel's panic, else what QEMU
// said, else the end of the console.
func lastWords(dir string) string {
	console := lastLine(filepath.Join(dir, serialName))
	if strings.Contains(console, panicMark) {
		return console
	}
	return orText(lastLine(filepath.Join(dir, stderrName)), orText(console, "QEMU ended without a word"))
}

// panicMark is how Linux begins the last thing it says.
const panicMark = "Kernel panic - not syncing"

// kernelLine is a message of the kernel, by its time stamp.
var kernelLine = regexp.MustCompile(`^\[ *[0-9]+\.[0-9]{6}\] `)

// lastLine is the line at the end of a log that says most: a kernel panic if there
// is one, else the last that a program wrote, else the last ("reboot: Power down").
// Empty when there is none. A guest's text is cleaned of control characters.
func lastLine(path string) string {
	b, err := tail(path, tailBytes)
	if err != nil {
		return ""
	}
	last, kernel := "", ""
	for line := range strings.SplitSeq(string(b), "\n") {
		line = strings.TrimSpace(strings.Map(func(r rune) rune {
			if !unicode.IsPrint(r) {
				return -1
			}
			return r
		}, line))
		switch {
		case strings.Contains(line, panicMark):
			return line
		case kernelLine.MatchString(line):
			kernel = line
		case line != "":
			last = line
		}
	}
	return orText(last, kernel)
}
