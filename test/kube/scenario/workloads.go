// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/kube/cluster"
)

// webPods are the Deployment's pods that are ready and not on their way out.
func (s *Scenario) webPods(ctx context.Context) ([]cluster.Pod, error) {
	all, err := s.pods(ctx, "web")
	var out []cluster.Pod
	for _, p := range all {
		if p.Ready() && p.Metadata.DeletionTimestamp == nil {
			out = append(out, p)
		}
	}
	if err == nil && len(out) == 0 {
		err = errors.New("the Deployment web has no ready pod")
	}
	return out, err
}

func (s *Scenario) deploymentChecks() []e2e.Check {
	return []e2e.Check{
		{Name: "its two pods become ready: startup, readiness and liveness probes by TCP, HTTP and exec", Run: s.rollout},
		{Name: "the runtime class adds its overhead to them", Run: func(ctx context.Context) (string, error) {
			pods, err := s.webPods(ctx)
			if err != nil {
				return "", err
			}
			o := pods[0].Spec.Overhead
			if pods[0].Spec.RuntimeClassName != cluster.RuntimeClass || o["cpu"] == "" || o["memory"] == "" {
				return "", fmt.Errorf("runtime class %q, overhead %v", pods[0].Spec.RuntimeClassName, o)
			}
			return fmt.Sprintf("processor %s, memory %s", o["cpu"], o["memory"]), nil
		}},
		{Name: "each of them has a kernel of its own, which is not the node's", Run: s.checkMachines},
		{Name: "kubectl logs", Run: func(ctx context.Context) (string, error) {
			pods, err := s.webPods(ctx)
			if err != nil {
				return "", err
			}
			out, err := s.kubectl(ctx, "logs", pods[0].Metadata.Name)
			if err == nil && !strings.Contains(out, "Started HTTP server on port 8080") {
				err = fmt.Errorf("log is %q", out)
			}
			return strings.TrimSpace(out), err
		}},
		{Name: "kubectl exec carries standard input and returns the exit code", Run: s.checkExec},
		{Name: "kubectl attach carries standard input to process 1", Run: func(ctx context.Context) (string, error) {
			out, err := s.Cluster.KubectlIn(ctx, "spoken to\n", "-n", namespace, "run", "talk", "-i", "--quiet", "--rm", "--restart=Never", "--pod-running-timeout="+checkTimeout.String(),
				"--image="+expand("BUSYBOX"), "--overrides="+expand(`{"spec":{"runtimeClassName":"CLASS"}}`), "--", "sh", "-c", "read line; echo \"heard: $line\"; exit 0")
			if err == nil && !strings.Contains(out, "heard: spoken to") {
				err = fmt.Errorf("output is %q", out)
			}
			return strings.TrimSpace(out), err
		}},
		{Name: "kubectl cp, both ways", Run: s.checkCopy},
		{Name: "kubectl port-forward", Run: s.checkPortForward},
		{Name: "a deleted pod is replaced", Run: func(ctx context.Context) (string, error) {
			pods, err := s.webPods(ctx)
			if err != nil {
				return "", err
			}
			old := pods[0].Metadata.Name
			if _, err := s.kubectl(ctx, "delete", "pod", old); err != nil {
				return "", err
			}
			if _, err := s.rollout(ctx); err != nil {
				return "", err
			}
			if pods, err = s.webPods(ctx); err != nil {
				return "", err
			}
			for _, p := range pods {
				if p.Metadata.Name == old {
					return "", fmt.Errorf("pod %s is still there", old)
				}
			}
			return "", nil
		}},
	}
}

func (s *Scenario) rollout(ctx context.Context) (string, error) {
	out, err := s.kubectl(ctx, "rollout", "status", "deployment/web", "--timeout="+checkTimeout.String())
	if err != nil {
		pods, listErr := s.pods(ctx, "web")
		err = errors.Join(err, listErr)
		for _, p := range pods {
			err = errors.Join(err, fmt.Errorf("pod %s: %s%s", p.Metadata.Name, p.Status.Phase, s.events(ctx, p.Metadata.Name)))
		}
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	return lines[len(lines)-1], err
}

func (s *Scenario) checkMachines(ctx context.Context) (string, error) {
	pods, err := s.webPods(ctx)
	if err != nil {
		return "", err
	}
	node, err := bootID()
	if err != nil {
		return "", err
	}
	seen := map[string]string{node: "the node"}
	var kernels []string
	for _, p := range pods {
		out, err := s.exec(ctx, p.Metadata.Name, "sh", "-c", "cat "+bootIDFile+"; uname -r")
		if err != nil {
			return "", err
		}
		boot, kernel, _ := strings.Cut(out, "\n")
		if other, ok := seen[boot]; ok || boot == "" {
			return "", fmt.Errorf("pod %s has the boot id %q of %s", p.Metadata.Name, boot, other)
		}
		seen[boot] = p.Metadata.Name
		kernels = append(kernels, kernel)
	}
	return fmt.Sprintf("%d boot ids; kernels %s", len(seen), strings.Join(kernels, ", ")), nil
}

func (s *Scenario) checkExec(ctx context.Context) (string, error) {
	pods, err := s.webPods(ctx)
	if err != nil {
		return "", err
	}
	sent := strings.Repeat("input ", 50_000)
	out, err := s.Cluster.KubectlIn(ctx, sent, "-n", namespace, "exec", "-i", pods[0].Metadata.Name, "--", "sh", "-c", "sha256sum; exit 7")
	code, err := exitCode(err)
	if err != nil {
		return "", err
	}
	if want := fmt.Sprintf("%x", sha256.Sum256([]byte(sent))); code != 7 || !strings.HasPrefix(out, want) {
		return "", fmt.Errorf("exit code %d, and the sum of the %d bytes sent is %q", code, len(sent), out)
	}
	return fmt.Sprintf("%d bytes, exit code 7", len(sent)), nil
}

func (s *Scenario) checkCopy(ctx context.Context) (string, error) {
	pods, err := s.webPods(ctx)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(s.Cluster.Bed.Out, "cp")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	data := make([]byte, 1<<20)
	rand.Read(data)
	to, from := filepath.Join(dir, "to"), filepath.Join(dir, "from")
	if err := os.WriteFile(to, data, 0o644); err != nil {
		return "", err
	}
	inside := pods[0].Metadata.Name + ":/tmp/file"
	for _, args := range [][]string{{"cp", to, inside}, {"cp", inside, from}} {
		if _, err := s.kubectl(ctx, args...); err != nil {
			return "", err
		}
	}
	back, err := os.ReadFile(from)
	if err == nil && !bytes.Equal(back, data) {
		err = fmt.Errorf("%d bytes came back, not the %d sent", len(back), len(data))
	}
	return fmt.Sprintf("%d bytes", len(data)), err
}

func (s *Scenario) checkPortForward(ctx context.Context) (string, error) {
	pods, err := s.webPods(ctx)
	if err != nil {
		return "", err
	}
	pod := pods[0].Metadata.Name
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.Cluster.Program, s.Cluster.KubectlArgs("-n", namespace, "port-forward", "pod/"+pod, ":8080")...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return "", err
	}
	defer func() {
		cmd.Process.Signal(syscall.SIGTERM)
		io.Copy(io.Discard, out)
		cmd.Wait()
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("kubectl port-forward said nothing: %w: %s", err, stderr.String())
	}
	var port int
	if _, err := fmt.Sscanf(line, "Forwarding from 127.0.0.1:%d", &port); err != nil {
		return "", fmt.Errorf("kubectl port-forward said %q: %w", line, err)
	}
	host, err := hostname(ctx, fmt.Sprintf("127.0.0.1:%d", port))
	if err == nil && host != pod {
		err = fmt.Errorf("%q answered, not pod %s", host, pod)
	}
	return strings.TrimSpace(line), err
}

// hostname asks a netexec, from the node, what pod it is in.
func hostname(ctx context.Context, addr string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/hostname", nil)
	if err != nil {
		return "", err
	}
	// A connection of its own: a service chooses a pod for each.
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func (s *Scenario) serviceChecks() []e2e.Check {
	return []e2e.Check{
		{Name: "the node reaches both pods at the service's address", Run: func(ctx context.Context) (string, error) {
			addr, err := s.serviceIP(ctx)
			if err != nil {
				return "", err
			}
			return s.reachBoth(ctx, func(ctx context.Context) (string, error) { return hostname(ctx, addr+":80") })
		}},
		{Name: "a pod on runc reaches both", Run: func(ctx context.Context) (string, error) {
			addr, err := s.serviceIP(ctx)
			if err != nil {
				return "", err
			}
			return s.reachBoth(ctx, func(ctx context.Context) (string, error) {
				return s.Cluster.Kubectl(ctx, "exec", s.plain.Metadata.Name, "--", "curl", "http://"+addr+"/hostname")
			})
		}},
		{Name: "they reach each other, and themselves, at that address", Run: func(ctx context.Context) (string, error) {
			addr, err := s.serviceIP(ctx)
			if err != nil {
				return "", err
			}
			pods, err := s.webPods(ctx)
			if err != nil {
				return "", err
			}
			return s.reachBoth(ctx, func(ctx context.Context) (string, error) {
				return s.exec(ctx, pods[0].Metadata.Name, "curl", "http://"+addr+"/hostname")
			})
		}},
		{Name: "they reach the pod on runc", Run: func(ctx context.Context) (string, error) {
			pods, err := s.webPods(ctx)
			if err != nil {
				return "", err
			}
			out, err := s.exec(ctx, pods[0].Metadata.Name, "curl", "http://"+s.plain.Status.PodIP+":8080/hostname")
			if err == nil && out != s.plain.Metadata.Name {
				err = fmt.Errorf("%q answered", out)
			}
			return "", err
		}},
		{Name: "a service account's token opens the API server at its service's address", Run: s.checkAccount},
	}
}

func (s *Scenario) serviceIP(ctx context.Context) (string, error) {
	var service struct{ Spec struct{ ClusterIP string } }
	err := s.get(ctx, "services/web", &service)
	return service.Spec.ClusterIP, err
}

// reachBoth asks until both pods have answered: which one does is chance.
func (s *Scenario) reachBoth(ctx context.Context, ask func(context.Context) (string, error)) (string, error) {
	seen := map[string]int{}
	err := s.poll(ctx, func(ctx context.Context) error {
		pods, err := s.webPods(ctx)
		if err != nil {
			return err
		}
		host, err := ask(ctx)
		if err != nil {
			return err
		}
		seen[host]++
		for _, p := range pods {
			if seen[p.Metadata.Name] == 0 {
				return fmt.Errorf("pod %s has not answered; who did, and how often: %v", p.Metadata.Name, seen)
			}
		}
		return nil
	})
	return fmt.Sprint("answers by ", seen), err
}

// checkAccount looks on while a pod asks the API server once a second: two calls in a
// row with nothing of a failure between them.
func (s *Scenario) checkAccount(ctx context.Context) (string, error) {
	if _, err := s.await(ctx, "account", ready); err != nil {
		return "", err
	}
	err := s.poll(ctx, func(ctx context.Context) error {
		out, err := s.kubectl(ctx, "logs", "account")
		if err != nil {
			return err
		}
		calls := strings.Split(out, "calling /healthz")
		for i := 1; i+1 < len(calls); i++ { // the last one may not have its answer yet
			if strings.Contains(calls[i], "authz_header=") && !strings.Contains(calls[i], "status=failed") {
				return nil
			}
		}
		return fmt.Errorf("no call succeeded: %q", out)
	})
	return "", err
}
