// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/kube/cluster"
)

func (s *Scenario) containerChecks() []e2e.Check {
	running := func(p *cluster.Pod) error {
		if c := p.Container("main"); c.State.Running == nil {
			return fmt.Errorf("container main of pod %s does not run: %+v", p.Metadata.Name, c.State)
		}
		return nil
	}
	return []e2e.Check{
		{Name: "init containers run one after the other, a sidecar from its turn on; they share an emptyDir", Run: func(ctx context.Context) (string, error) {
			if _, err := s.await(ctx, "parts", running); err != nil {
				return "", err
			}
			out, err := s.exec(ctx, "parts", "cat", "/shared/order")
			if err == nil && strings.Join(strings.Fields(out), " ") != "first sidecar second main" {
				err = fmt.Errorf("their order was %q", out)
			}
			return strings.Join(strings.Fields(out), ", "), err
		}},
		{Name: "a post-start hook has run", Run: func(ctx context.Context) (string, error) {
			return s.exec(ctx, "parts", "ls", "/tmp/started")
		}},
		{Name: "readiness follows an exec probe", Run: func(ctx context.Context) (string, error) {
			pod, err := s.await(ctx, "parts", running)
			if err != nil {
				return "", err
			}
			if pod.Ready() {
				return "", fmt.Errorf("pod parts is ready before its probe can succeed")
			}
			if _, err := s.exec(ctx, "parts", "touch", "/tmp/ready"); err != nil {
				return "", err
			}
			_, err = s.await(ctx, "parts", ready)
			return "", err
		}},
		{Name: "an update of a ConfigMap arrives with the kubelet's sync", Run: s.checkUpdate},
		{Name: "a pre-stop hook runs; then the container, then the sidecar is asked to end", Run: s.checkEnd},
		{Name: "a termination message comes from its file, or from the log", Run: func(ctx context.Context) (string, error) {
			pod, err := s.await(ctx, "message", phase("Failed"))
			if err != nil {
				return "", err
			}
			file, log := pod.Container("file").State.Terminated, pod.Container("log").State.Terminated
			if file == nil || log == nil || file.ExitCode != 3 || log.ExitCode != 4 ||
				file.Message != "the reason" || strings.TrimSpace(log.Message) != "the last words" {
				return "", fmt.Errorf("ended with %+v and %+v", file, log)
			}
			return fmt.Sprintf("%q, %q", file.Message, strings.TrimSpace(log.Message)), nil
		}},
	}
}

func (s *Scenario) checkUpdate(ctx context.Context) (string, error) {
	if out, err := s.exec(ctx, "parts", "cat", "/settings/color"); err != nil || out != "blue" {
		return "", fmt.Errorf("before the update it is %q: %w", out, err)
	}
	start := time.Now()
	if _, err := s.kubectl(ctx, "patch", "configmap", "settings", "--type=merge", "-p", `{"data":{"color":"green"}}`); err != nil {
		return "", err
	}
	err := s.poll(ctx, func(ctx context.Context) error {
		out, err := s.exec(ctx, "parts", "cat", "/settings/color")
		if err == nil && out != "green" {
			err = fmt.Errorf("it still is %q", out)
		}
		return err
	})
	return fmt.Sprintf("after %v", time.Since(start).Round(time.Second)), err
}

// follower is a kubectl logs -f.
type follower struct {
	cmd *exec.Cmd

	mu  sync.Mutex
	out bytes.Buffer // guarded by mu
}

// Write takes what kubectl shows.
func (f *follower) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.out.Write(b)
}

func (f *follower) text() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.out.String()
}

// follow starts to follow a container's log and returns when its first words have
// arrived: what comes later will be seen.
func (s *Scenario) follow(ctx context.Context, container, words string) (*follower, error) {
	f := &follower{cmd: exec.CommandContext(ctx, s.Cluster.Program, s.Cluster.KubectlArgs("-n", namespace, "logs", "-f", "parts", "-c", container)...)}
	f.cmd.Stdout, f.cmd.Stderr = f, f
	if err := f.cmd.Start(); err != nil {
		return nil, err
	}
	return f, s.poll(ctx, func(context.Context) error {
		if t := f.text(); !strings.Contains(t, words) {
			return fmt.Errorf("the log of %s is %q", container, t)
		}
		return nil
	})
}

// checkEnd follows the log of the pod's containers while it is deleted: nobody can be
// asked afterwards.
func (s *Scenario) checkEnd(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	main, err := s.follow(ctx, "main", "post-start")
	if err != nil {
		return "", err
	}
	sidecar, err := s.follow(ctx, "sidecar", "sidecar runs")
	if err != nil {
		return "", err
	}
	if _, err := s.kubectl(ctx, "delete", "pod", "parts"); err != nil {
		return "", err
	}
	main.cmd.Wait() // their status is the connection's
	sidecar.cmd.Wait()
	for _, want := range []string{"pre-stop", "main ends"} {
		if !strings.Contains(main.text(), want) {
			return "", fmt.Errorf("the log of main lacks %q: %q", want, main.text())
		}
	}
	if !strings.Contains(sidecar.text(), "sidecar ends") {
		return "", fmt.Errorf("the log of the sidecar is %q", sidecar.text())
	}
	return strings.Join(strings.Split(strings.TrimSpace(main.text()+sidecar.text()), "\n"), ", "), nil
}

func (s *Scenario) endChecks() []e2e.Check {
	return []e2e.Check{
		{Name: "they are created", Run: func(ctx context.Context) (string, error) {
			_, err := s.Cluster.KubectlIn(ctx, expand(ends), "-n", namespace, "apply", "-f", "-")
			return "", err
		}},
		{Name: "a container that takes more memory than its limit is OOMKilled", Run: func(ctx context.Context) (string, error) {
			pod, err := s.await(ctx, "greedy", phase("Failed"))
			if err != nil {
				return "", err
			}
			t := pod.Container("main").State.Terminated
			if t == nil || t.Reason != "OOMKilled" || t.ExitCode != 137 {
				return "", fmt.Errorf("it ended with %+v", t)
			}
			return s.ranElsewhere(ctx, "greedy")
		}},
		{Name: "a container whose liveness probe fails is restarted", Run: func(ctx context.Context) (string, error) {
			running := func(least int) func(*cluster.Pod) error {
				return func(p *cluster.Pod) error {
					if c := p.Container("main"); c.RestartCount < least || c.State.Running == nil {
						return fmt.Errorf("%d restarts, state %+v", c.RestartCount, c.State)
					}
					return nil
				}
			}
			before, err := s.await(ctx, "sick", running(0))
			if err != nil {
				return "", err
			}
			if _, err := s.exec(ctx, "sick", "rm", "/tmp/healthy"); err != nil {
				return "", err
			}
			after, err := s.await(ctx, "sick", running(before.Container("main").RestartCount+1))
			if err != nil {
				return "", err
			}
			if before.Status.PodIP != after.Status.PodIP {
				return "", fmt.Errorf("the pod's address was %s and is %s", before.Status.PodIP, after.Status.PodIP)
			}
			// Its file system was made anew, or there would be no file.
			_, err = s.exec(ctx, "sick", "ls", "/tmp/healthy")
			return fmt.Sprintf("%d restart", after.Container("main").RestartCount), err
		}},
		{Name: "a Job completes", Run: func(ctx context.Context) (string, error) {
			if err := s.awaitJob(ctx, "done", "Complete", ""); err != nil {
				return "", err
			}
			return s.ranElsewhere(ctx, "job/done")
		}},
		{Name: "a Job with activeDeadlineSeconds is ended at its deadline", Run: func(ctx context.Context) (string, error) {
			if err := s.awaitJob(ctx, "late", "Failed", "DeadlineExceeded"); err != nil {
				return "", err
			}
			// It ran: a pod that waits for room is ended, too, and shows nothing.
			if out := s.allEvents(ctx, "Started"); !strings.Contains(out, "late-") {
				return "", fmt.Errorf("its container was never started: %s", out)
			}
			return "", s.poll(ctx, func(ctx context.Context) error {
				pods, err := s.pods(ctx, "late")
				if err == nil && len(pods) > 0 {
					err = fmt.Errorf("its pod is still there")
				}
				return err
			})
		}},
	}
}

// allEvents names the objects that the namespace's events of a reason are about.
func (s *Scenario) allEvents(ctx context.Context, reason string) string {
	var list cluster.EventList
	if err := s.get(ctx, "events?fieldSelector=reason%3D"+reason, &list); err != nil {
		return err.Error()
	}
	var names []string
	for _, e := range list.Items {
		names = append(names, e.InvolvedObject.Name)
	}
	return strings.Join(names, " ")
}

// awaitJob waits for a job's condition.
func (s *Scenario) awaitJob(ctx context.Context, name, condition, reason string) error {
	return s.poll(ctx, func(ctx context.Context) error {
		var job cluster.Job
		if err := s.Cluster.API.Get(ctx, "/apis/batch/v1/namespaces/"+namespace+"/jobs/"+name, &job); err != nil {
			return err
		}
		c := job.Status.Conditions.Get(condition)
		if c.Status != "True" || reason != "" && c.Reason != reason {
			return fmt.Errorf("job %s is not %s %s: %+v", name, condition, reason, job.Status.Conditions)
		}
		return nil
	})
}

// ranElsewhere reads the boot id that a container wrote into its log.
func (s *Scenario) ranElsewhere(ctx context.Context, of string) (string, error) {
	node, err := bootID()
	if err != nil {
		return "", err
	}
	out, err := s.kubectl(ctx, "logs", of)
	boot, ok := strings.CutPrefix(strings.TrimSpace(out), "boot ")
	if err == nil && (!ok || boot == node) {
		err = fmt.Errorf("its log %q does not begin with another boot id than the node's", out)
	}
	return "on a machine with boot id " + boot, err
}
