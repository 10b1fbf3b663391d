// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/kube/cluster"
)

func (s *Scenario) nodeChecks() []e2e.Check {
	checks := []e2e.Check{
		{Name: "the kubelet reports processor time and memory of a container", Run: s.checkStats},
	}
	for _, r := range refused {
		checks = append(checks, e2e.Check{Name: "a pod that " + strings.ReplaceAll(r.name, "-", " the node's ") + " is refused, and its event says why",
			Run: func(ctx context.Context) (string, error) { return s.checkRefused(ctx, r.name, r.spec, r.words) }})
	}
	return append(checks, e2e.Check{Name: "kubectl drain evicts them all, and after uncordon the Deployment is back", Run: s.checkDrain})
}

// checkRefused creates a pod and looks for what its events say.
func (s *Scenario) checkRefused(ctx context.Context, pod, spec, words string) (string, error) {
	if _, err := s.Cluster.KubectlIn(ctx, refusedPod(pod, spec), "-n", namespace, "apply", "-f", "-"); err != nil {
		return "", err
	}
	var said string
	err := s.poll(ctx, func(ctx context.Context) error {
		if said = s.events(ctx, pod); !strings.Contains(said, words) {
			return fmt.Errorf("no event of pod %s says %q:%s", pod, words, said)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(said) {
		if strings.Contains(line, words) {
			said = line
		}
	}
	_, err = s.kubectl(ctx, "delete", "pod", pod)
	return strings.TrimSpace(said), err
}

func (s *Scenario) checkStats(ctx context.Context) (string, error) {
	pods, err := s.webPods(ctx)
	if err != nil {
		return "", err
	}
	name := pods[0].Metadata.Name
	type usage struct{ UsageCoreNanoSeconds, WorkingSetBytes uint64 }
	var seen string
	err = s.poll(ctx, func(ctx context.Context) error {
		var summary struct {
			Pods []struct {
				PodRef     struct{ Name string }
				Containers []struct{ CPU, Memory usage }
			}
		}
		if err := s.Cluster.API.Get(ctx, "/api/v1/nodes/"+cluster.NodeName+"/proxy/stats/summary", &summary); err != nil {
			return err
		}
		for _, p := range summary.Pods {
			if p.PodRef.Name != name || len(p.Containers) == 0 {
				continue
			}
			c := p.Containers[0]
			seen = fmt.Sprintf("%d ms of processor time, %d KiB of memory", c.CPU.UsageCoreNanoSeconds/1e6, c.Memory.WorkingSetBytes>>10)
			if c.CPU.UsageCoreNanoSeconds == 0 || c.Memory.WorkingSetBytes == 0 {
				return errors.New("the summary has " + seen)
			}
			return nil
		}
		return fmt.Errorf("pod %s is not in the kubelet's summary", name)
	})
	return seen, err
}

func (s *Scenario) checkDrain(ctx context.Context) (_ string, err error) {
	defer func() {
		_, e := s.Cluster.Kubectl(context.WithoutCancel(ctx), "uncordon", cluster.NodeName)
		err = errors.Join(err, e)
	}()
	old, err := s.webPods(ctx)
	if err != nil {
		return "", err
	}
	// The pod on runc is of another namespace, and stays for the comparison at the end.
	out, err := s.Cluster.Kubectl(ctx, "drain", cluster.NodeName, "--force", "--delete-emptydir-data", "--ignore-daemonsets",
		"--pod-selector="+stays+"!=yes", "--timeout="+checkTimeout.String())
	if err != nil {
		return "", err
	}
	for _, p := range old {
		if !strings.Contains(out, "pod/"+p.Metadata.Name+" evicted") && !strings.Contains(out, "evicting pod "+namespace+"/"+p.Metadata.Name) {
			return "", fmt.Errorf("pod %s was not evicted: %q", p.Metadata.Name, out)
		}
	}
	if _, err := s.Cluster.Kubectl(ctx, "uncordon", cluster.NodeName); err != nil {
		return "", err
	}
	_, err = s.rollout(ctx)
	return fmt.Sprintf("%d pods evicted", strings.Count(out, " evicted")), err
}

func (s *Scenario) removalChecks() []e2e.Check {
	return []e2e.Check{
		{Name: "the namespace is deleted, with all that is in it", Run: func(ctx context.Context) (string, error) {
			_, err := s.kubectl(ctx, "delete", "namespace", namespace, "--timeout="+checkTimeout.String())
			return "", err
		}},
		{Name: "no VM, shim, namespace, tap, link, mount, cgroup or file of them is left", Run: s.CheckLeftovers},
	}
}

// CheckLeftovers compares the node with what it was when only the plain pod was there.
func (s *Scenario) CheckLeftovers(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, leftoverTimeout)
	defer cancel()
	var now e2e.Snapshot
	err := cluster.Poll(ctx, func(context.Context) (err error) {
		if now, err = snapshot(); err != nil {
			return err
		}
		if more := now.Beyond(s.before); len(more) > 0 {
			return fmt.Errorf("left behind: %q", more)
		}
		return nil
	})
	return fmt.Sprintf("%d processes, links, mounts, cgroups and files, as before", len(now)), err
}

// snapshot is the testbed's, with what the kubelet keeps of a pod.
func snapshot() (e2e.Snapshot, error) {
	s, err := e2e.TakeSnapshot()
	if err != nil {
		return nil, err
	}
	for _, pattern := range []string{"/var/lib/kubelet/pods/*", "/var/log/pods/*", "/sys/fs/cgroup/*/kubepods/pod*", "/sys/fs/cgroup/*/kubepods/*/pod*",
		"/sys/fs/cgroup/kubepods/pod*", "/sys/fs/cgroup/kubepods/*/pod*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		for _, f := range found {
			// A link to a controller's hierarchy is another name of the same groups.
			if dir, err := filepath.EvalSymlinks(f); err != nil || dir != f {
				if os.IsNotExist(err) || err == nil {
					continue
				}
				return nil, err
			}
			s = append(s, "folder "+f)
		}
	}
	slices.Sort(s)
	return s, nil
}
