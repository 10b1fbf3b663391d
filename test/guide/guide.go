// SPDX-License-Identifier: Apache-2.0

// Package guide runs what the documentation tells a person to type.
package guide

import (
	"fmt"
	"os"
	"strings"
)

// Block is a fenced block of a page.
type Block struct {
	Page string
	Line int      // of its first line of text, from 1
	Info []string // the words behind the fence: "sh", or "sh node"
	Text string
}

// Is tells whether the block's info is these words.
func (b Block) Is(info string) bool { return strings.Join(b.Info, " ") == info }

func (b Block) String() string { return fmt.Sprintf("%s:%d", b.Page, b.Line) }

// Blocks returns the fenced blocks of a page, in order.
func Blocks(page string) ([]Block, error) {
	text, err := os.ReadFile(page)
	if err != nil {
		return nil, err
	}
	var (
		blocks []Block
		open   *Block
		lines  []string
	)
	for i, line := range strings.Split(string(text), "\n") {
		fence, ok := strings.CutPrefix(line, "```")
		switch {
		case ok && open == nil:
			open, lines = &Block{Page: page, Line: i + 2, Info: strings.Fields(fence)}, nil
		case ok:
			open.Text = strings.Join(lines, "\n") + "\n"
			blocks, open = append(blocks, *open), nil
		case open != nil:
			lines = append(lines, line)
		}
	}
	if open != nil {
		return nil, fmt.Errorf("%s: the block that begins at line %d has no end", page, open.Line)
	}
	return blocks, nil
}
