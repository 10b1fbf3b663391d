// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kata-remote/kata-remote/test/kube/cluster"
)

// watcher looks at the cluster's pods, and at the node's processes, for one that is
// not where it should be.
type watcher struct {
	cancel context.CancelFunc
	done   chan struct{}
	// classes: by runtime class, the pods seen. wrong: what was not right. Both are
	// valid after done.
	classes map[string]map[string]bool
	wrong   []error
}

// watchEvery is shorter than the shortest test.
const watchEvery = time.Second

// runcShims are those of the one pod that stays on runc.
const runcShims = 1

func watch(ctx context.Context, c *cluster.Cluster) *watcher {
	ctx, cancel := context.WithCancel(ctx)
	w := &watcher{cancel: cancel, done: make(chan struct{}), classes: map[string]map[string]bool{}}
	go func() {
		defer close(w.done)
		t := time.NewTicker(watchEvery)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
				w.look(ctx, c)
			}
		}
	}()
	return w
}

func (w *watcher) look(ctx context.Context, c *cluster.Cluster) {
	var list cluster.PodList
	if err := c.API.Get(ctx, "/api/v1/pods", &list); err != nil {
		return // it is asked again in a second
	}
	for _, p := range list.Items {
		if p.Metadata.Namespace == "default" {
			continue // the pod on runc
		}
		class := p.Spec.RuntimeClassName
		if w.classes[class] == nil {
			w.classes[class] = map[string]bool{}
		}
		if class == "" && !w.classes[class][p.Metadata.UID] {
			w.wrong = append(w.wrong, fmt.Errorf("pod %s/%s has no runtime class", p.Metadata.Namespace, p.Metadata.Name))
		}
		w.classes[class][p.Metadata.UID] = true
	}
	if n := countProcesses("containerd-shim-runc-v2"); n > runcShims && len(w.wrong) < 10 {
		w.wrong = append(w.wrong, fmt.Errorf("%d runc shims run: a pod is not in a machine of its own", n))
	}
}

// end stops looking and tells what was seen.
func (w *watcher) end() (string, error) {
	w.cancel()
	<-w.done
	of, others := 0, 0
	for class, pods := range w.classes {
		if class == cluster.RuntimeClass {
			of += len(pods)
		} else {
			others += len(pods)
		}
	}
	seen := fmt.Sprintf("%d pods of class %s, %d of classes that tests made", of, cluster.RuntimeClass, others)
	if of == 0 {
		w.wrong = append(w.wrong, errors.New(seen))
	}
	return seen, errors.Join(w.wrong...)
}

// settleTimeout is how long namespaces of ended tests may take to be deleted.
const settleTimeout = 5 * time.Minute

// settle waits until the pods of earlier tests are gone: what is seen from here on is
// not theirs.
func settle(ctx context.Context, c *cluster.Cluster) error {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	return cluster.Poll(ctx, func(ctx context.Context) error {
		var list cluster.PodList
		if err := c.API.Get(ctx, "/api/v1/pods", &list); err != nil {
			return err
		}
		for _, p := range list.Items {
			if p.Metadata.Namespace != "default" {
				return fmt.Errorf("pod %s/%s of an earlier test is still there", p.Metadata.Namespace, p.Metadata.Name)
			}
		}
		if n := countProcesses("containerd-shim-runc-v2"); n > runcShims {
			return fmt.Errorf("%d runc shims of earlier tests still run", n-runcShims)
		}
		return nil
	})
}

func countProcesses(word string) (n int) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is well formed
	for _, f := range files {
		b, err := os.ReadFile(f)
		program, _, _ := strings.Cut(string(b), "\x00")
		if err == nil && strings.Contains(filepath.Base(program), word) {
			n++
		}
	}
	return n
}
