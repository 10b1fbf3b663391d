// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// counted is how many lines the talking container writes.
const counted = 20_000

func (s *Scenario) restartChecks() []Check {
	return []Check{
		{"killed while a container talks, it loses and repeats no byte of the output", func(ctx context.Context) (string, error) {
			return s.talkThrough(ctx, "talks-on", func(ctx context.Context) error {
				s.Bed.Adaptor.Kill()
				return s.Bed.StartAdaptor(ctx)
			})
		}},
		{"exec works after it", s.execWorks},
		{"containerd, killed the same way, neither", func(ctx context.Context) (string, error) {
			return s.talkThrough(ctx, "talks-still", func(ctx context.Context) error {
				s.Bed.Containerd.Kill()
				return s.Bed.RestartContainerd(ctx)
			})
		}},
		{"exec works after that, and the pod answers", func(ctx context.Context) (string, error) {
			if _, err := s.execWorks(ctx); err != nil {
				return "", err
			}
			return httpGet(ctx, s.pod.IP)
		}},
	}
}

// talkThrough starts a container that counts, disturbs it while it does, and
// compares what arrived with what was written.
func (s *Scenario) talkThrough(ctx context.Context, name string, disturb func(context.Context) error) (string, error) {
	c, err := s.pod.Run(ctx, name, "sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo $i; i=$((i+1)); done; exit 9", counted))
	if err != nil {
		return "", err
	}
	lines := func() (int, error) {
		log, err := c.Log("stdout")
		return strings.Count(log, "\n"), err
	}
	var at int
	if err := within(ctx, func(context.Context) (err error) {
		if at, err = lines(); err == nil && at < 100 {
			err = errors.New("the container says nothing")
		}
		return err
	}); err != nil {
		return "", err
	}
	if err := disturb(ctx); err != nil {
		return "", err
	}
	code, err := c.Wait(ctx)
	if err != nil {
		return "", err
	}
	log, err := c.Log("stdout")
	if err != nil {
		return "", err
	}
	var want strings.Builder
	for i := range counted {
		fmt.Fprintln(&want, i)
	}
	switch {
	case at >= counted:
		return "", fmt.Errorf("all %d lines were out before anything was disturbed: nothing was tested", at)
	case log != want.String():
		return "", fmt.Errorf("%d bytes in %d lines arrived, %d bytes in %d lines were written", len(log), strings.Count(log, "\n"), want.Len(), counted)
	case code != 9:
		return "", fmt.Errorf("exit code %d, want 9", code)
	}
	return fmt.Sprintf("disturbed after line %d of %d, all there, exit code %d", at, counted, code), nil
}

func (s *Scenario) execWorks(ctx context.Context) (string, error) {
	out, err := s.app.Exec(ctx, "echo", "still here")
	if err == nil && out != "still here" {
		err = fmt.Errorf("got %q", out)
	}
	return out, err
}
