// SPDX-License-Identifier: Apache-2.0

// Package interop plays conversations between our parts and other people's: what a
// stock kata shim says to our adaptor and our agent, and what is said to a stock
// kata-agent behind our forwarder. They are made from the documented behaviour of
// kata-containers 4.1 and cloud-api-adaptor 0.22 and stand in testdata, one step after
// the other, for a person to read:
//
//	# Text for the reader. A line that begins with "==" names a part.
//	== the sandbox
//	call agent.CreateSandbox timeout=60s
//	    hostname: "web"               the request, in protobuf's text format
//	-> OK                             the class of the answer, or several: OK|UNIMPLEMENTED
//	    field: "x"                    what the reply holds at least
//	start exit agent.WaitProcess      a call that goes on in the background, under a name
//	    container_id: "c"
//	pending exit                      it has not been answered
//	finish exit                       it is
//	-> OK
//	read agent.ReadStdout c "" until "text\n"       again and again, as kata reads
//	read agent.ReadStdout c "" eof "rest"
//
// Methods are agent.X (grpc.AgentService), health.X (grpc.Health) and hypervisor.X
// (hypervisor.Hypervisor); a call of the last is made on a connection of its own, as
// kata's shim does. The others go over one connection, opened by the first of them;
// "reconnect" replaces it. timeout is the caller's; kata's is 60s unless it is given.
// "call ... cancelled" has a context that ended before; "abandon name" ends that of a
// call under way. Further steps are the world's own (see World.Do).
//
// In requests and replies @fill(n,x) stands for n times the text x,
// /run/kata-containers for the agent's directory, wherever it is, and
// registry.example and sha256:one for a registry and the digest of an image in it (see
// Names). What an error says is wanted in quotes after its class.
package interop

import (
	"bufio"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Step is one line of a conversation with what is indented below it.
type Step struct {
	Line  int
	Words []string // the line's words; a quoted one without its quotes
	Text  string   // the request
	Want  *Want    // the answer; nil: the step has none
}

// Want is an answer.
type Want struct {
	Classes []string // names of gRPC codes; CLOSED is a connection that ended, CANCELLED a caller who left
	Says    string   // part of the error's text
	Text    string   // what the reply holds at least
}

// kataTimeout is what kata's runtime gives a call that has no deadline of its own
// (virtcontainers/kata_agent.go).
const kataTimeout = 60 * time.Second

// Load reads a conversation.
func Load(path string) ([]Step, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var steps []Step
	scan := bufio.NewScanner(f)
	for n := 1; scan.Scan(); n++ {
		line := scan.Text()
		bad := func(format string, a ...any) error {
			return fmt.Errorf("%s:%d: %s", path, n, fmt.Sprintf(format, a...))
		}
		trimmed := strings.TrimSpace(line)
		switch {
		case trimmed == "" || strings.HasPrefix(trimmed, "#"):
		case line != strings.TrimLeft(line, " \t"):
			if len(steps) == 0 {
				return nil, bad("text that belongs to no step")
			}
			text := &steps[len(steps)-1].Text
			if w := steps[len(steps)-1].Want; w != nil {
				text = &w.Text
			}
			*text += trimmed + "\n"
		case strings.HasPrefix(line, "-> "):
			if len(steps) == 0 || steps[len(steps)-1].Want != nil {
				return nil, bad("an answer to nothing")
			}
			w, err := words(line[3:])
			if err != nil || len(w) == 0 || len(w) > 2 {
				return nil, bad("want a class, and in quotes what the error says")
			}
			want := &Want{Classes: strings.Split(w[0], "|")}
			if len(w) == 2 {
				want.Says = w[1]
			}
			steps[len(steps)-1].Want = want
		default:
			w, err := words(line)
			if err != nil {
				return nil, bad("%v", err)
			}
			steps = append(steps, Step{Line: n, Words: w})
		}
	}
	return steps, scan.Err()
}

var wordRule = regexp.MustCompile(`"(?:[^"\\]|\\.)*"|\S+`)

// words splits a line; quotes keep one together.
func words(line string) ([]string, error) {
	w := wordRule.FindAllString(line, -1)
	for i := range w {
		if strings.HasPrefix(w[i], `"`) {
			var err error
			if w[i], err = strconv.Unquote(w[i]); err != nil {
				return nil, fmt.Errorf("%s: %w", w[i], err)
			}
		}
	}
	return w, nil
}

var fillRule = regexp.MustCompile(`@fill\((\d+),([^)]*)\)`)

// Names are what the names in conversations stand for.
type Names struct {
	StateDir string // for /run/kata-containers
	Registry string // for registry.example
	Digest   string // for sha256:one, of the image tools/busybox:1 in the registry
}

// expand replaces what stands for something else.
func (n Names) expand(text string) string {
	text = fillRule.ReplaceAllStringFunc(text, func(m string) string {
		p := fillRule.FindStringSubmatch(m)
		n, _ := strconv.Atoi(p[1]) // the rule has it that these are digits
		return strings.Repeat(p[2], n)
	})
	return strings.NewReplacer("/run/kata-containers", n.StateDir, "registry.example", n.Registry, "sha256:one", n.Digest).Replace(text)
}
