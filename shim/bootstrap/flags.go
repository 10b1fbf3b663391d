// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"strings"
)

// Flags are the command line of a shim (containerd, pkg/shim/shim.go).
type Flags struct {
	Namespace, Address, PublishBinary, ID, Bundle string
	Socket, DebugSocket                           string
	Debug, Info, Version                          bool
	// Action is start, delete or empty: serve on the socket that was passed on.
	Action string
}

// ParseFlags reads a command line as package flag would, but a flag that it does not
// know is passed over: a newer containerd may send more of them, and refusing them
// would refuse every pod. Of an unknown flag without "=" the next argument is taken
// as its value unless it looks like a flag or an action.
func ParseFlags(args []string) Flags {
	var f Flags
	values := map[string]*string{
		"namespace": &f.Namespace, "address": &f.Address, "publish-binary": &f.PublishBinary, "id": &f.ID,
		"bundle": &f.Bundle, "socket": &f.Socket, "debug-socket": &f.DebugSocket,
	}
	bools := map[string]*bool{"debug": &f.Debug, "info": &f.Info, "v": &f.Version, "version": &f.Version, "pprof": new(bool)}
	for i := 0; i < len(args); i++ {
		name, isFlag := strings.CutPrefix(args[i], "-")
		if !isFlag {
			f.Action = args[i]
			continue
		}
		name, value, hasValue := strings.Cut(strings.TrimPrefix(name, "-"), "=")
		next := i+1 < len(args)
		switch {
		case bools[name] != nil:
			*bools[name] = !hasValue || value != "false" && value != "0"
		case values[name] != nil:
			if !hasValue && next {
				i++
				value = args[i]
			}
			*values[name] = value
		case !hasValue && next && !strings.HasPrefix(args[i+1], "-") && args[i+1] != actionStart && args[i+1] != actionDelete:
			i++
		}
	}
	return f
}
