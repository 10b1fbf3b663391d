// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/kata-remote/kata-remote/cloud/emulation"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// underlay is the bridge between node and pod VMs of the provider local.
const underlay = "ppbr0"

// device is the bridge between node and pod VMs.
func (s *Scenario) device() string {
	if s.cloud != nil {
		return s.cloud.Device
	}
	return underlay
}

// page is what the busybox image serves.
const page = "hello from a container\n"

func (s *Scenario) networkChecks() []Check {
	checks := []Check{
		{"the pod's address is the CNI's, inside and outside", func(ctx context.Context) (string, error) {
			addr, err := netip.ParseAddr(s.pod.IP)
			if err != nil {
				return "", err
			}
			out, err := s.app.Exec(ctx, "ip", "-o", "-4", "addr", "show", "eth0")
			if err == nil && (!netip.MustParsePrefix(testbed.CNISubnet).Contains(addr) || !strings.Contains(out, addr.String()+"/16")) {
				err = fmt.Errorf("CRI says %s, the container %q", s.pod.IP, out)
			}
			return s.pod.IP, err
		}},
		{"from here on, every packet between node and pod VM is counted", func(context.Context) (_ string, err error) {
			s.capture, err = NewCapture(s.device())
			return "", err
		}},
		{"HTTP from the node to the pod", func(ctx context.Context) (string, error) { return httpGet(ctx, s.pod.IP) }},
		{"HTTP from the runc pod to the pod", func(ctx context.Context) (string, error) { return get(ctx, s.plainApp, s.pod.IP, "80") }},
		{"HTTP from the pod to the runc pod", func(ctx context.Context) (string, error) { return get(ctx, s.app, s.plain.IP, "80") }},
		{"HTTP from the pod to a server on the node", s.checkNodeServer},
		{"port-forward to a server on the pod's own loopback", s.checkPortForward},
		{"all of it went through the tunnel, and nothing left the pod VM another way", s.checkCapture},
	}
	if s.Provider != "" {
		checks = append(checks, Check{"the cloud's metadata service answers the machine, and not the pod", s.checkMetadata})
	}
	return checks
}

func httpGet(ctx context.Context, host string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+"/", nil)
	if err != nil {
		return "", err
	}
	start := time.Now()
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && string(b) != page {
		err = fmt.Errorf("got %q", b)
	}
	return fmt.Sprintf("%q after %v", strings.TrimSpace(string(b)), time.Since(start).Round(100*time.Microsecond)), err
}

// get asks from within a container. busybox's wget needs a C library's name service,
// which the image lacks: nc speaks HTTP well enough.
func get(ctx context.Context, c *Container, host, port string) (string, error) {
	out, err := c.Exec(ctx, "sh", "-c", fmt.Sprintf(`printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 10 %s %s`, host, port))
	if err == nil && !strings.Contains(out, strings.TrimSpace(page)) {
		err = fmt.Errorf("got %q", out)
	}
	return fmt.Sprintf("%q", strings.TrimSpace(page)), err
}

func (s *Scenario) checkNodeServer(ctx context.Context) (string, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(testbed.NodeAddr, "0"))
	if err != nil {
		return "", err
	}
	peer := make(chan string, 1)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case peer <- r.RemoteAddr:
		default:
		}
		io.WriteString(w, page)
	})}
	go srv.Serve(l)
	defer srv.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	if _, err := get(ctx, s.app, testbed.NodeAddr, port); err != nil {
		return "", err
	}
	from := <-peer
	if host, _, _ := net.SplitHostPort(from); host != s.pod.IP {
		return "", fmt.Errorf("the request came from %s, not from the pod's address %s", from, s.pod.IP)
	}
	return "the server saw " + from, nil
}

func (s *Scenario) checkCapture(context.Context) (string, error) {
	if s.capture == nil {
		return "", fmt.Errorf("nothing was counted")
	}
	s.capture.Stop()
	n := s.capture.Counts()
	if s.cloud == nil {
		n.Others += n.Cloud // there is none to ask
	}
	seen := fmt.Sprintf("%d packets on UDP %d, %d on TCP %d, %d of address resolution, %d others", n.Tunnel, TunnelPort, n.Agent, ForwarderPort, n.Local, n.Others)
	if s.cloud != nil {
		seen += fmt.Sprintf(", %d between machine and metadata service", n.Cloud)
	}
	if n.Tunnel == 0 || n.Others > 0 {
		return "", fmt.Errorf("%s: %q", seen, n.Strange)
	}
	return seen, nil
}

// checkMetadata asks the metadata service from within the pod. The machine's secrets
// are in its user data.
func (s *Scenario) checkMetadata(ctx context.Context) (string, error) {
	// Azure's machines have their user data on a CD, and report to another service.
	asked, told := s.cloud.MetadataRequests(), s.cloud.WireServerRequests()
	if asked+told == 0 {
		return "", fmt.Errorf("no machine was ever answered")
	}
	out, err := s.app.Exec(ctx, "sh", "-c", fmt.Sprintf(
		`printf 'GET / HTTP/1.0\r\nMetadata: true\r\n\r\n' | nc -w 5 %s 80; echo "ended with $?"`, emulation.MetadataAddr))
	if err == nil && (!strings.Contains(out, "ended with ") || strings.Contains(out, "HTTP/")) {
		err = fmt.Errorf("the pod got %q", out)
	}
	return fmt.Sprintf("machines asked it %d times, and Azure's wire server %d times", asked, told), err
}
