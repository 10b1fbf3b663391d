// SPDX-License-Identifier: Apache-2.0

// Package e2e runs pods on a testbed and checks what a user of them would see. Its
// checks are the tests of this folder and what `make demo` narrates: one list, so
// that what is shown is what is tested.
package e2e

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"time"

	"github.com/kata-remote/kata-remote/test/cloudbed"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// Check is one thing that must hold. Checks run in order; a later one may need what
// an earlier one made.
type Check struct {
	// Name says what holds when the check passes.
	Name string
	// Run returns what was seen, for a person, or why the check failed.
	Run func(context.Context) (string, error)
}

// Chapter is a group of checks with a heading.
type Chapter struct {
	Title  string
	Checks []Check
	// Needed chapters end the scenario when a check of theirs fails: nothing that
	// follows could pass.
	Needed bool
}

// Scenario is the life of two pods on one node.
type Scenario struct {
	Bed *testbed.Bed
	// Provider is the cloud whose machines the pods get: "aws" or "azure", emulated on
	// this node (package cloudbed). "": the embedded provider's.
	Provider string
	// Keep leaves out the last chapter: the pods stay.
	Keep bool

	cloud    *cloudbed.Cloud // nil: there is none
	before   Snapshot
	pod      *Pod       // the pod that is looked at
	app      *Container // its main container: a web server
	other    *Pod       // another pod in a machine of its own
	plain    *Pod       // an ordinary runc pod beside it
	plainApp *Container
	capture  *Capture

	// ContainerStart is how long create and start of its first container took.
	ContainerStart time.Duration
}

// Chapters is the whole scenario.
func (s *Scenario) Chapters() []Chapter {
	chapters := []Chapter{
		{"A worker node: containerd, the adaptor, a bridge CNI", s.nodeChecks(), true},
		{"A pod with handler " + testbed.Handler, s.podChecks(), true},
		{"Where the time of its start went", []Check{{"every step was timed", s.timing}}, false},
		{"Inside: another kernel, the same interface", s.insideChecks(), false},
		{"The network: the CNI's address, through the tunnel", s.networkChecks(), false},
		{"The agent's port", s.securityChecks(), false},
		{"The adaptor is killed and comes back", s.restartChecks(), false},
	}
	if !s.Keep {
		chapters = append(chapters, Chapter{"Removal: nothing is left", s.removalChecks(), false})
	}
	return chapters
}

// Container is the id of the container that the checks look at, or "".
func (s *Scenario) Container() string {
	if s.app == nil {
		return ""
	}
	return s.app.ID
}

func (s *Scenario) nodeChecks() []Check {
	checks := []Check{
		{"containerd of its own is up, with images made on the spot", func(ctx context.Context) (string, error) {
			if err := s.Bed.StartContainerd(ctx); err != nil {
				return "", err
			}
			return s.Bed.Crictl(ctx, "version")
		}},
		{"the adaptor is up, with the " + cmp.Or(s.Provider, "embedded") + " provider", func(ctx context.Context) (string, error) {
			return "", s.Bed.StartAdaptor(ctx)
		}},
		{"an ordinary runc pod runs beside it", func(ctx context.Context) (string, error) {
			var err error
			if s.plain, err = RunPod(ctx, s.Bed, "plain", "", nil); err != nil {
				return "", err
			}
			if s.plainApp, err = s.plain.Run(ctx, "app", "sh", "-c", "httpd -f -p 80 -h /www"); err != nil {
				return "", err
			}
			// Until it serves, its process may yet change its name, and would look like
			// one that was left behind.
			serves, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			if err := testbed.Poll(serves, func(ctx context.Context) error { return dial(ctx, s.plain.IP) }); err != nil {
				return "", err
			}
			s.before, err = TakeSnapshot()
			return "address " + s.plain.IP, err
		}},
	}
	if s.Provider == "" {
		return checks
	}
	return append([]Check{{"an emulation of the cloud " + s.Provider + " is up, with machines behind it", func(ctx context.Context) (string, error) {
		var err error
		if s.cloud, err = StartCloud(ctx, s.Bed, cloudbed.Config{Provider: s.Provider}); err != nil {
			return "", err
		}
		return fmt.Sprintf("%s, its network is %s", s.cloud.Endpoint, s.cloud.Device), nil
	}}}, checks...)
}

// dial tells whether somebody serves HTTP at an address.
func dial(ctx context.Context, addr string) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(addr, "80"))
	if err != nil {
		return err
	}
	return c.Close()
}

func (s *Scenario) podChecks() []Check {
	return []Check{
		{"the pod is ready", func(ctx context.Context) (string, error) {
			var err error
			if s.pod, err = RunPod(ctx, s.Bed, "first", testbed.Handler, nil); err != nil {
				return "", err
			}
			return fmt.Sprintf("address %s, after %v", s.pod.IP, s.pod.Took.Round(time.Millisecond)), nil
		}},
		{"a container of it runs", func(ctx context.Context) (string, error) {
			start := time.Now()
			var err error
			s.app, err = s.pod.Run(ctx, "app", "sh", "-c", "echo hello from the pod; uname -r; exec httpd -f -p 80 -h /www")
			s.ContainerStart = time.Since(start)
			return fmt.Sprintf("after %v", s.ContainerStart.Round(time.Millisecond)), err
		}},
	}
}

func (s *Scenario) removalChecks() []Check {
	checks := []Check{
		{"the pods are removed", func(ctx context.Context) (string, error) {
			start := time.Now()
			for _, p := range []*Pod{s.other, s.pod} {
				if p == nil {
					continue
				}
				if err := p.Remove(ctx); err != nil {
					return "", err
				}
			}
			return fmt.Sprintf("after %v", time.Since(start).Round(time.Millisecond)), nil
		}},
		{"no process, namespace, link, mount, tap or file is left", func(ctx context.Context) (string, error) {
			// Deletion of the instance goes on in the adaptor after the pod is gone.
			ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
			defer cancel()
			err := testbed.Poll(ctx, func(context.Context) error { return leftBehind(s.before) })
			return fmt.Sprintf("%d processes, links, mounts and files, as before", len(s.before)), err
		}},
		{"the runc pod is removed, and containerd and the adaptor end when asked", func(ctx context.Context) (string, error) {
			if s.plain != nil {
				if err := s.plain.Remove(ctx); err != nil {
					return "", err
				}
			}
			return "", s.Bed.Stop()
		}},
	}
	if s.Provider == "" {
		return checks
	}
	// Before the adaptor ends: it is the one that takes away what is left.
	return slices.Insert(checks, 1, Check{"the cloud has nothing of them left: no machine, disk, network interface or address", func(ctx context.Context) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, cloudGone)
		defer cancel()
		return "", testbed.Poll(ctx, func(context.Context) error { return s.cloud.Leaks() })
	}})
}

// StartCloud starts an emulated cloud whose instances are the bed's pod VMs, unless the
// configuration names another image, and has the bed's next adaptor use it.
func StartCloud(ctx context.Context, bed *testbed.Bed, cfg cloudbed.Config) (*cloudbed.Cloud, error) {
	cfg.Image, cfg.Dir = cmp.Or(cfg.Image, filepath.Dir(bed.Image.Kernel.Path)), filepath.Join(bed.Out, "logs", cfg.Provider)
	var err error
	if cfg.Accel, err = accel(ctx, bed); err != nil {
		return nil, err
	}
	cloud, err := cloudbed.Start(ctx, cfg)
	if err == nil {
		bed.AdaptorEnv = append(bed.AdaptorEnv, cloud.Env...)
	}
	return cloud, err
}

// cloudGone bounds the wait for the last resources of an emulated cloud: its lists lag
// and its deletions take time, as the real one's.
const cloudGone = 5 * time.Minute

// Close ends the emulated cloud, if there is one, with all machines that are left. It
// is for the end of whoever ran the scenario.
func (s *Scenario) Close() error {
	if s.cloud == nil {
		return nil
	}
	return s.cloud.Close()
}

// Run runs every check of the scenario as Run does.
func (s *Scenario) Run(ctx context.Context, chapter func(string), begin func(Check), report func(Check, string, error, time.Duration)) (passed, failed int) {
	return Run(ctx, s.Chapters(), chapter, begin, report)
}

// Run runs every check. chapter is told each heading, begin each check before it
// runs, report its result: what was seen, or why it failed. It returns how many
// passed and failed.
func Run(ctx context.Context, chapters []Chapter, chapter func(string), begin func(Check), report func(Check, string, error, time.Duration)) (passed, failed int) {
	for _, ch := range chapters {
		chapter(ch.Title)
		ok := true
		for _, c := range ch.Checks {
			begin(c)
			start := time.Now()
			seen, err := c.Run(ctx)
			report(c, seen, err, time.Since(start))
			if err != nil {
				failed++
				ok = false
			} else {
				passed++
			}
			if !ok && ch.Needed {
				return passed, failed
			}
		}
	}
	return passed, failed
}
