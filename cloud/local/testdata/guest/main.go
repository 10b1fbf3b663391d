// SPDX-License-Identifier: Apache-2.0

// Command guest is PID 1 of the VMs in the tests: it loads the image's modules,
// takes its address from the seed, says READY on the console and answers on TCP
// 15150 with what it found in the seed.
package main

import (
	"fmt"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	for _, m := range [][2]string{{"dev", "devtmpfs"}, {"proc", "proc"}, {"sys", "sysfs"}} {
		_ = os.Mkdir("/"+m[0], 0o755)
		_ = unix.Mount(m[1], "/"+m[0], m[1], 0, "")
	}
	console, err := os.OpenFile("/dev/console", os.O_RDWR, 0)
	if err == nil {
		fmt.Fprintln(console, "USERSPACE")
	}
	cmdline, _ := os.ReadFile("/proc/cmdline")
	if strings.Contains(string(cmdline), "guest.panic") {
		os.Exit(1) // PID 1 that ends makes the kernel panic
	}
	answer, err := setUp()
	if err != nil {
		fmt.Fprintln(console, "ERROR", err)
		select {}
	}
	l, err := net.Listen("tcp", ":15150")
	fmt.Fprintln(console, "READY", err)
	for {
		c, err := l.Accept()
		if err != nil {
			continue
		}
		fmt.Fprint(c, answer)
		c.Close()
	}
}

func setUp() (string, error) {
	list, err := os.ReadFile("/lib/modules/list")
	if err != nil {
		return "", err
	}
	for line := range strings.SplitSeq(string(list), "\n") {
		if f := strings.Fields(line); len(f) > 1 && (strings.HasPrefix(f[0], "virtio") || strings.Contains(f[0], "failover")) {
			ko, err := os.Open("/lib/modules/" + f[1])
			if err == nil {
				_ = unix.FinitModule(int(ko.Fd()), "", 0) // those of another machine type do not load
				ko.Close()
			}
		}
	}
	var seed []byte
	for end := time.Now().Add(20 * time.Second); len(seed) == 0; {
		if seed, err = os.ReadFile("/dev/vda"); err != nil && time.Now().After(end) {
			return "", err
		}
		time.Sleep(5 * time.Millisecond)
	}
	find := func(re string) string {
		if m := regexp.MustCompile(re).FindSubmatch(seed); m != nil {
			return string(m[1])
		}
		return ""
	}
	ip, bits, _ := strings.Cut(find(`addresses:\n    - "([^"]*)"`), "/")
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := net.InterfaceByName("eth0"); err == nil || time.Now().After(end) {
			break
		}
	}
	if err := configure("eth0", ip, bits); err != nil {
		return "", err
	}
	ifi, err := net.InterfaceByName("eth0")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("id=%s secret=%s mac=%s mtu=%d", find(`instance-id: (\S+)`), find(`(sekret\S*)`), ifi.HardwareAddr, ifi.MTU), nil
}

// configure sets address and mask and takes the link up, netdevice(7).
func configure(name, ip, bits string) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	n, err := strconv.Atoi(bits)
	if err != nil {
		return fmt.Errorf("prefix %q of address %q: %w", bits, ip, err)
	}
	set := func(req uintptr, a net.IP) error {
		var ifr [40]byte
		copy(ifr[:16], name)
		*(*uint16)(unsafe.Pointer(&ifr[16])) = unix.AF_INET
		copy(ifr[20:24], a.To4())
		if req == unix.SIOCSIFFLAGS {
			*(*uint16)(unsafe.Pointer(&ifr[16])) = unix.IFF_UP | unix.IFF_RUNNING
		}
		if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, uintptr(s), req, uintptr(unsafe.Pointer(&ifr))); e != 0 {
			return fmt.Errorf("ioctl %#x on %s: %w", req, name, e)
		}
		return nil
	}
	if err := set(unix.SIOCSIFADDR, net.ParseIP(ip)); err != nil {
		return err
	}
	if err := set(unix.SIOCSIFNETMASK, net.IP(net.CIDRMask(n, 32))); err != nil {
		return err
	}
	return set(unix.SIOCSIFFLAGS, nil)
}
