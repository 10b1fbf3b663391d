// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/netns/nstest"
	"github.com/vishvananda/netlink"
)

// askAgent calls the agent over an authenticated connection.
func askAgent(t *testing.T, raw net.Conn, cfg *tls.Config) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn := tls.Client(raw, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	defer c.Close()
	h, err := agentpb.NewHealthClient(c).Check(ctx, &agentpb.CheckRequest{})
	if err != nil || h.Status != agentpb.HealthCheckResponse_SERVING {
		t.Errorf("Health.Check: %v, %v", h, err)
	}
	d, err := agentpb.NewAgentServiceClient(c).GetGuestDetails(ctx, &agentpb.GuestDetailsRequest{})
	if err != nil || d.AgentDetails == nil || len(d.AgentDetails.ExtraFeatures) == 0 {
		t.Errorf("GetGuestDetails: %v, %v", d, err)
	}
}

// wantRefused tries to call the agent and wants the connection to end instead.
func wantRefused(t *testing.T, raw net.Conn, cfg *tls.Config) {
	t.Helper()
	if err := raw.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, cfg)
	err := conn.Handshake()
	if err == nil {
		// In TLS 1.3 the client learns of it at its first read.
		_, err = conn.Read(make([]byte, 1))
	}
	// crypto/tls reports an alert from the other end so; a reset or an end of file
	// would be something else.
	var alert *net.OpError
	if !errors.As(err, &alert) || alert.Op != "remote error" {
		t.Errorf("got %v, want a TLS alert", err)
	}
}

func TestBootedImage(t *testing.T) {
	c, other := newCredentials(t), newCredentials(t)
	v := startVM(t, podImage(t), seed(t, map[string]string{
		"user-data": userData(t, c.config()), "meta-data": "instance-id: i\nlocal-hostname: podvm-test\n", "network-config": networkConfig,
	}), 2)
	address := guestAddr + ":15150"
	askAgent(t, v.dial(address), c.tlsConfig(c.client))
	wantRefused(t, v.dial(address), c.tlsConfig())
	wantRefused(t, v.dial(address), c.tlsConfig(other.client))

	// The pod's address answers through the tunnel: nothing listens there, and it
	// is the guest that says so.
	a := netlink.NewLinkAttrs()
	a.Name = "vxlan0"
	if err := v.node.Handle.LinkAdd(&netlink.Vxlan{LinkAttrs: a, VxlanId: 555002, Port: 9000, Group: net.ParseIP(guestAddr), Learning: false}); err != nil {
		t.Fatal(err)
	}
	v.node.Addr("vxlan0", "10.244.1.1/24")
	v.node.Up("vxlan0")
	err := v.node.Try(func() error {
		d := net.Dialer{Timeout: patience}
		conn, err := d.Dial("tcp", podAddr+":15150")
		if err == nil {
			conn.Close()
		}
		return err
	})
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial the pod through the tunnel: %v, want that the pod refuses", err)
	}
	v.waitFor(`"step":"cpus"`)
	wantMarks(t, v.output(), "cpus", "root", "modules", "seed", "nic", "tunnel", "agent", "listening")
}

// wantMarks wants one record for each step, and a plausible time in it.
func wantMarks(t *testing.T, console string, steps ...string) {
	t.Helper()
	missing := make(map[string]bool)
	for _, s := range steps {
		missing[s] = true
	}
	for line := range strings.Lines(console) {
		var r map[string]any
		if json.Unmarshal([]byte(strings.TrimSpace(line)), &r) != nil || r["msg"] != "step done" {
			continue
		}
		step, ms, boot := r[logkey.Step], r[logkey.Duration], r[sinceBootKey]
		t.Logf("%v after %v ms, %v ms since the kernel started", step, ms, boot)
		if d, ok := ms.(float64); !ok || d < 0 || boot.(float64) < d {
			t.Errorf("step %v has duration %v and time %v", step, ms, boot)
		}
		if r[logkey.Sandbox] != "sandbox-of-the-test" {
			t.Errorf("step %v is of sandbox %v", step, r[logkey.Sandbox])
		}
		delete(missing, step.(string))
	}
	for s := range missing {
		t.Errorf("no record of step %s", s)
	}
}

// A guest that cannot be what it is told to be says why and turns itself off.
func TestBootFails(t *testing.T) {
	m, c := podImage(t), newCredentials(t)
	noKey := c.config()
	noKey.TLSServerKey = ""
	for name, s := range map[string]struct {
		files map[string]string
		want  string
	}{
		"network of version 1": {map[string]string{"user-data": userData(t, c.config()), "network-config": "version: 1\n"}, "podvmd: fatal: no valid user data: NoCloud disk: network-config: version is 1, want 2"},
		"no key":               {map[string]string{"user-data": userData(t, noKey), "network-config": networkConfig}, "podvmd: fatal: /run/peerpod/apf.json: tls-server-key is missing"},
	} {
		t.Run(name, func(t *testing.T) {
			v := startVM(t, m, seed(t, s.files), 2)
			select {
			case <-v.ended:
			case <-time.After(patience):
				t.Error("the guest did not turn itself off")
			}
			var fatal []string
			for line := range strings.Lines(v.output()) {
				if strings.Contains(line, "fatal") {
					fatal = append(fatal, strings.TrimSpace(line))
				}
			}
			if len(fatal) != 1 || !strings.HasPrefix(fatal[0], s.want) {
				t.Errorf("console says %q, want one line %q", fatal, s.want)
			}
		})
	}
}

// service starts podvmd as a service in the namespace.
func service(t *testing.T, ns *nstest.NS, args ...string) (cmd *exec.Cmd, log *bytes.Buffer) {
	t.Helper()
	log = new(bytes.Buffer)
	cmd = exec.Command(podvmdPath(t), args...)
	cmd.Stdout, cmd.Stderr = log, log
	ns.Do(cmd.Start) // the child has the thread's network namespace
	return cmd, log
}

func TestService(t *testing.T) {
	c := newCredentials(t)
	doc, err := json.Marshal(c.config())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "apf.json")
	if err := os.WriteFile(path, doc, 0o600); err != nil {
		t.Fatal(err)
	}
	pod, vm, node := nstest.New(t, "podns"), nstest.New(t, "vm"), nstest.New(t, "node")
	node.Veth("tap0", vm, "ens3")
	vm.Addr("ens3", guestAddr+"/24")
	cmd, log := service(t, vm, "--config", path, "--listen", "127.0.0.1:15150", "--pod-netns", pod.Path, "--state-dir", filepath.Join(dir, "state"))
	ended := make(chan struct{})
	go func() {
		err = cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Log(log.String())
		}
	})
	raw, dialErr := dialFrom(vm, "127.0.0.1:15150", ended)
	if dialErr != nil {
		t.Fatal(dialErr)
	}
	defer raw.Close()
	askAgent(t, raw, c.tlsConfig(c.client))
	pod.Link("eth0")
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-ended
	if err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
	wantMarks(t, log.String(), "tunnel", "agent", "listening")
}

// podvmd in the place of agent-protocol-forwarder: with its flags, under a service
// manager that waits for it, before a kata-agent that removes its own socket.
func TestServiceBeforeStockAgent(t *testing.T) {
	c := newCredentials(t)
	doc, err := json.Marshal(c.config())
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "boot") // a short name, for the sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path, notify := filepath.Join(dir, "apf.json"), filepath.Join(dir, "notify")
	if err := os.WriteFile(path, doc, 0o600); err != nil {
		t.Fatal(err)
	}
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", notify)

	ctx, cancel := context.WithTimeout(context.Background(), patience)
	agent := &agenttest.Stock{Dir: filepath.Join(dir, "kata"), Agent: new(agenttest.Agent)}
	served := make(chan error, 1)
	go func() { served <- agent.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})

	pod, vm, node := nstest.New(t, "podns"), nstest.New(t, "vm"), nstest.New(t, "node")
	node.Veth("tap0", vm, "ens3")
	vm.Addr("ens3", guestAddr+"/24")
	cmd, log := service(t, vm, "-config", path, "-listen", "127.0.0.1:15150", "-pod-namespace", pod.Path, "-kata-agent-socket", agent.Socket())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if err := manager.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if n, err := manager.Read(b); err != nil || string(b[:n]) != "READY=1" {
		t.Errorf("the service manager was told %q, %v", b[:n], err)
	}
	for i := range 2 { // the second connects when the agent's socket is no more
		raw, err := dialFrom(vm, "127.0.0.1:15150", nil)
		if err != nil {
			t.Fatal(err)
		}
		conn := tls.Client(raw, c.tlsConfig(c.client))
		rpc := ttrpc.NewClient(conn)
		d, err := agentpb.NewAgentServiceClient(rpc).GetGuestDetails(ctx, &agentpb.GuestDetailsRequest{})
		if err != nil || len(d.AgentDetails.ExtraFeatures) != 0 {
			t.Errorf("connection %d: GetGuestDetails: %v, %v, want no extra features", i, d, err)
		}
		if _, err := agentpb.NewAgentServiceClient(rpc).CreateSandbox(ctx, &agentpb.CreateSandboxRequest{SandboxId: "pod", Dns: []string{"x"}}); err != nil {
			t.Errorf("connection %d: CreateSandbox: %v", i, err)
		}
		rpc.Close()
	}
	if sb := agent.Sandbox(); sb.GetSandboxId() != "pod" || len(sb.GetDns()) != 0 {
		t.Errorf("the agent was asked for %v", sb)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, log)
	}
	wantMarks(t, log.String(), "tunnel", "agent", "listening")
}

func TestServiceRefuses(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.json")
	if err := os.WriteFile(bad, []byte(`{"pod-name": "x"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	vm := nstest.New(t, "vm")
	for name, s := range map[string]struct {
		args []string
		want string
	}{
		"no file":       {[]string{"--config", filepath.Join(dir, "none")}, "read the pod VM's configuration"},
		"no keys":       {[]string{"--config", bad}, "tls-server-key is missing"},
		"what argument": {[]string{"--config", bad, "extra"}, `unexpected argument "extra"`},
	} {
		t.Run(name, func(t *testing.T) {
			cmd, log := service(t, vm, s.args...)
			if err := cmd.Wait(); err == nil {
				t.Error("no error")
			}
			if !strings.HasPrefix(log.String(), "podvmd: ") || !strings.Contains(log.String(), s.want) {
				t.Errorf("got %q, want %q", log.String(), s.want)
			}
		})
	}
}

func TestOnlineCPUs(t *testing.T) {
	root := t.TempDir()
	for name, state := range map[string]string{"cpu1": "0\n", "cpu2": "1\n", "cpufreq": "0\n"} {
		if err := os.Mkdir(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name, "online"), []byte(state), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := onlineCPUs(root); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"cpu1": "1", "cpu2": "1\n", "cpufreq": "0\n"} {
		got, err := os.ReadFile(filepath.Join(root, name, "online"))
		if err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
}

func TestWriteFatal(t *testing.T) {
	var b bytes.Buffer
	writeFatal(&b, errors.Join(errors.New("one"), io.EOF))
	if got := b.String(); got != "\npodvmd: fatal: one; EOF\n" {
		t.Errorf("got %q", got)
	}
}
