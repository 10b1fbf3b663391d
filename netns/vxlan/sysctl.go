// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// sysctls are files below /proc/sys/net, which shows the namespace of the thread that
// opens it: the functions here are for use inside netns.Do.
const sysctls = "/proc/sys/net"

// readSysctl returns the value, "" when the kernel has no such file (IPv6 turned off
// at boot, or the interface gone).
func readSysctl(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(sysctls, name))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read sysctl: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// writeSysctl sets the value and reports whether it was another one. A file that the
// kernel does not have is left out.
func writeSysctl(name, value string) (bool, error) {
	have, err := readSysctl(name)
	if err != nil || have == "" || have == value {
		return false, err
	}
	// No O_CREATE and no O_TRUNC: procfs knows neither.
	f, err := os.OpenFile(filepath.Join(sysctls, name), os.O_WRONLY, 0)
	if err != nil {
		return false, fmt.Errorf("write sysctl: %w", err)
	}
	_, err = f.WriteString(value)
	if err := errors.Join(err, f.Close()); err != nil {
		return false, fmt.Errorf("write %q to sysctl: %w", value, err)
	}
	return true, nil
}

func sysctl4(dev, name string) string { return filepath.Join("ipv4/conf", dev, name) }
func sysctl6(dev, name string) string { return filepath.Join("ipv6/conf", dev, name) }
