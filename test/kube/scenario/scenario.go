// SPDX-License-Identifier: Apache-2.0

// Package scenario does with pods in machines of their own what users do with pods,
// through kubectl, on a real cluster, and checks that it works as anywhere.
package scenario

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/kube/cluster"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// namespace of everything the checks create, but for the plain pod.
const namespace = "scenario"

// Timeouts of the checks: how long a user would wait. Under software emulation, with
// every pod of the scenario starting at once, a machine takes a minute to be ready.
const (
	checkTimeout = 5 * time.Minute
	// leftoverTimeout: the adaptor deletes machines after the pod is gone, the kubelet
	// removes folders and cgroups every few seconds.
	leftoverTimeout = 2 * time.Minute
)

// Scenario is one run of the checks on a running cluster.
type Scenario struct {
	Cluster *cluster.Cluster

	before e2e.Snapshot
	plain  cluster.Pod // a pod on runc, outside of namespace, that stays
}

// Chapters are the checks, in order.
func (s *Scenario) Chapters() []e2e.Chapter {
	return []e2e.Chapter{
		{Title: "Workloads with runtimeClassName " + cluster.RuntimeClass, Checks: s.setUp(), Needed: true},
		{Title: "A Deployment, and what kubectl does with its pods", Checks: s.deploymentChecks()},
		{Title: "Services, through kube-proxy", Checks: s.serviceChecks()},
		{Title: "Containers of a pod", Checks: s.containerChecks()},
		{Title: "Ends: restarts, kills, deadlines", Checks: s.endChecks()},
		{Title: "What the node sees, and what it refuses", Checks: s.nodeChecks()},
		{Title: "Removal: nothing is left", Checks: s.removalChecks()},
	}
}

func (s *Scenario) setUp() []e2e.Check {
	return []e2e.Check{
		{Name: "a pod on runc runs beside them", Run: func(ctx context.Context) (string, error) {
			if err := s.Cluster.Apply(ctx, plainPod); err != nil {
				return "", err
			}
			err := s.poll(ctx, func(ctx context.Context) error {
				if err := s.Cluster.API.Get(ctx, "/api/v1/namespaces/default/pods/plain", &s.plain); err != nil {
					return err
				}
				return ready(&s.plain)
			})
			if err != nil {
				return "", err
			}
			s.before, err = snapshot()
			return "address " + s.plain.Status.PodIP, err
		}},
		{Name: "all are created", Run: func(ctx context.Context) (string, error) {
			if err := s.Cluster.Apply(ctx, "apiVersion: v1\nkind: Namespace\nmetadata: {name: "+namespace+"}\n"); err != nil {
				return "", err
			}
			// A pod is refused until the controllers have given its namespace the account
			// it runs as.
			err := s.poll(ctx, func(ctx context.Context) error {
				return s.get(ctx, "serviceaccounts/default", new(struct{}))
			})
			if err != nil {
				return "", err
			}
			_, err = s.Cluster.KubectlIn(ctx, workloads(), "-n", namespace, "apply", "-f", "-")
			return "", err
		}},
	}
}

// poll is cluster.Poll for as long as a check may take.
func (s *Scenario) poll(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	return cluster.Poll(ctx, f)
}

// get reads an object of the namespace: "configmaps/x".
func (s *Scenario) get(ctx context.Context, resource string, v any) error {
	return s.Cluster.API.Get(ctx, "/api/v1/namespaces/"+namespace+"/"+resource, v)
}

// kubectl runs kubectl in the namespace.
func (s *Scenario) kubectl(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	return s.Cluster.Kubectl(ctx, append([]string{"-n", namespace}, args...)...)
}

// exec runs a command in the pod's first container.
func (s *Scenario) exec(ctx context.Context, pod string, command ...string) (string, error) {
	out, err := s.kubectl(ctx, append([]string{"exec", pod, "--"}, command...)...)
	return strings.TrimSpace(out), err
}

// pods lists the pods with a label "app"; "" is all of the namespace.
func (s *Scenario) pods(ctx context.Context, app string) ([]cluster.Pod, error) {
	path := "pods"
	if app != "" {
		path += "?labelSelector=app%3D" + app
	}
	var list cluster.PodList
	err := s.get(ctx, path, &list)
	return list.Items, err
}

// await polls a pod until what it should be.
func (s *Scenario) await(ctx context.Context, name string, should func(*cluster.Pod) error) (cluster.Pod, error) {
	var pod cluster.Pod
	err := s.poll(ctx, func(ctx context.Context) error {
		pod = cluster.Pod{}
		if err := s.get(ctx, "pods/"+name, &pod); err != nil {
			return err
		}
		return should(&pod)
	})
	if err != nil {
		err = fmt.Errorf("%w%s", err, s.events(ctx, name))
	}
	return pod, err
}

// events are what the cluster says of an object, for an error.
func (s *Scenario) events(ctx context.Context, name string) string {
	var list cluster.EventList
	if err := s.get(ctx, "events?fieldSelector=involvedObject.name%3D"+name, &list); err != nil {
		return ""
	}
	var b strings.Builder
	for _, e := range list.Items {
		if e.Type != "Normal" {
			fmt.Fprintf(&b, "\nevent %s: %s", e.Reason, e.Message)
		}
	}
	return b.String()
}

func ready(p *cluster.Pod) error {
	if p.Ready() {
		return nil
	}
	return fmt.Errorf("pod %s is %s and not ready: %s", p.Metadata.Name, p.Status.Phase, p.Status.Conditions.Get("Ready").Message)
}

// phase is a condition for await.
func phase(want string) func(*cluster.Pod) error {
	return func(p *cluster.Pod) error {
		if p.Status.Phase != want {
			return fmt.Errorf("pod %s is %s, want %s", p.Metadata.Name, p.Status.Phase, want)
		}
		return nil
	}
}

// exitCode is the status a kubectl ended with.
func exitCode(err error) (int, error) {
	var re *testbed.RunError
	if !errors.As(err, &re) {
		return 0, err
	}
	var exit interface{ ExitCode() int }
	if !errors.As(re.Err, &exit) {
		return 0, err
	}
	return exit.ExitCode(), nil
}

const bootIDFile = "/proc/sys/kernel/random/boot_id"

func bootID() (string, error) {
	b, err := os.ReadFile(bootIDFile)
	return strings.TrimSpace(string(b)), err
}
