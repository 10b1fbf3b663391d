// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/caa/daemon"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/emulation"
	"github.com/kata-remote/kata-remote/test/cloudbed"
	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// instanceTime is what the emulated clouds take until a machine is switched on.
const instanceTime = time.Second

// bucketTime is how long a provider's token buckets keep n machines from being made,
// whoever asks for them one by one: EC2's RunInstances has 5 tokens and gains 2 a
// second, Azure's create 1500 and 500 a minute (cloud/aws/fakeec2, cloud/azure/fakearm).
var bucketTime = map[string]func(n int) time.Duration{
	"aws":   func(n int) time.Duration { return time.Duration(max(0, n-5)) * time.Second / 2 },
	"azure": func(n int) time.Duration { return time.Duration(max(0, n-1500)) * time.Minute / 500 },
}

// cloud measures a provider on an emulation of its cloud.
func (b *bench) cloud(ctx context.Context, provider string) error {
	if err := b.leave(); err != nil {
		return err
	}
	if err := b.cloudStarts(ctx, provider); err != nil {
		return err
	}
	return b.manyCreates(ctx, provider)
}

// cloudStarts measures how long a pod takes to be ready beyond what its instance and
// its machine's boot take.
func (b *bench) cloudStarts(ctx context.Context, provider string) (err error) {
	boots := make(chan time.Duration, 1)
	emulated, err := e2e.StartCloud(ctx, b.bed, cloudbed.Config{Provider: provider, InstanceTime: instanceTime, Started: func(m emulation.Machine) {
		go func() { boots <- untilOpen(ctx, m.Addr.Addr()) }()
	}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.leave(), emulated.Close()) }()
	b.bed.Simulated = false
	b.bed.AdaptorEnv = append([]string{"STATE_DIR=" + filepath.Join("/var/lib/peerpod", provider)}, emulated.Env...)
	if err := b.bed.StartAdaptor(ctx); err != nil {
		return err
	}
	fmt.Printf("%s, emulated, instances take %v: %d pods after one that is not counted\n", provider, instanceTime, b.runs)
	var ready, boot, rest []float64
	for i := range b.runs + 1 {
		p, err := e2e.RunPod(ctx, b.bed, fmt.Sprintf("%s-%d", provider, i), testbed.Handler, nil)
		if err != nil {
			return err
		}
		machine := <-boots
		if err := errors.Join(p.Remove(ctx), gone(ctx, emulated)); err != nil {
			return err
		}
		if i == 0 {
			continue // types and images are asked for once
		}
		own := p.Took - instanceTime - machine
		ready, boot, rest = append(ready, p.Took.Seconds()), append(boot, machine.Seconds()), append(rest, own.Seconds())
		fmt.Printf("  %d: pod ready %.2f s, of which instance %.2f s, machine on to port open %.2f s, all else %.2f s\n",
			i, p.Took.Seconds(), instanceTime.Seconds(), machine.Seconds(), own.Seconds())
	}
	for _, r := range []struct {
		name   string
		values []float64
	}{{"pod ready (crictl runp), s", ready}, {"machine on to port open, s", boot}, {"pod ready less instance and boot, s", rest}} {
		slices.Sort(r.values)
		fmt.Printf("%-44s median %.2f (%.2f to %.2f)\n", r.name, r.values[len(r.values)/2], r.values[0], r.values[len(r.values)-1])
	}
	return nil
}

// untilOpen is how long it takes from now until somebody listens at the forwarder's
// port of an address.
func untilOpen(ctx context.Context, addr netip.Addr) time.Duration {
	begin := time.Now()
	to := net.JoinHostPort(addr.String(), strconv.Itoa(podvmconfig.ForwarderPort))
	_ = testbed.Poll(ctx, func(ctx context.Context) error {
		// Short, for a machine that does not know its address yet says nothing.
		c, err := (&net.Dialer{Timeout: 20 * time.Millisecond}).DialContext(ctx, "tcp", to)
		if err == nil {
			err = c.Close()
		}
		return err
	})
	return time.Since(begin)
}

// gone waits until a cloud has nothing left.
func gone(ctx context.Context, emulated *cloudbed.Cloud) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	return testbed.Poll(ctx, func(context.Context) error { return emulated.Leaks() })
}

// many is how many machines are asked for at once.
const many = 200

// manyCreates asks a provider for many instances at once, on paper, under the cloud's
// own token buckets.
func (b *bench) manyCreates(ctx context.Context, name string) (err error) {
	emulated, err := cloudbed.Start(ctx, cloudbed.Config{Provider: name, Dir: filepath.Join(b.bed.Out, "logs", name+"-paper"), Paper: true, InstanceTime: instanceTime})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, emulated.Close()) }()
	p, err := providerOf(emulated.Env)
	if err != nil {
		return err
	}
	plan, err := p.Plan(ctx, cloud.Size{})
	if err != nil {
		return err
	}
	single, first, err := createAll(ctx, p, plan, 1)
	if err != nil {
		return err
	}
	// The single one's token is back by then, or it would be one of the many.
	select {
	case <-time.After(bucketTime[name](many) / many * 2):
	case <-ctx.Done():
		return ctx.Err()
	}
	took, ids, err := createAll(ctx, p, plan, many)
	if err != nil {
		return err
	}
	if held := bucketTime[name](many); held > 0 {
		fmt.Printf("%s: %d creates at once, none failed: %.1f s; the bucket allows %.1f s, and one create takes %.1f s: ratio %.2f\n",
			name, many, took.Seconds(), held.Seconds(), single.Seconds(), took.Seconds()/(held+single).Seconds())
	} else {
		fmt.Printf("%s: %d creates at once, none failed: %.1f s; the buckets hold none of them up, and one create takes %.1f s\n",
			name, many, took.Seconds(), single.Seconds())
	}
	begin := time.Now()
	if err := errors.Join(deleteAll(ctx, p, append(ids, first...)), gone(ctx, emulated)); err != nil {
		return err
	}
	fmt.Printf("%s: their deletion, until nothing is left: %.1f s\n", name, time.Since(begin).Seconds())
	return nil
}

// providerOf makes the provider that an adaptor would make of its configuration.
func providerOf(env []string) (cloud.Provider, error) {
	for _, v := range env {
		if path, ok := strings.CutPrefix(v, "SSL_CERT_FILE="); ok {
			if err := os.Setenv("SSL_CERT_FILE", path); err != nil {
				return nil, err
			}
		}
	}
	cfg, err := config.Load("", env, config.Flags{})
	if err != nil {
		return nil, err
	}
	d, err := daemon.New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	return d.Provider(), nil
}

// createAll makes n instances at the same time and returns how long the last one took.
func createAll(ctx context.Context, p cloud.Provider, plan cloud.Plan, n int) (time.Duration, []cloud.InstanceID, error) {
	var wg sync.WaitGroup
	ids, errs := make([]cloud.InstanceID, n), make([]error, n)
	begin := time.Now()
	for i := range n {
		wg.Go(func() {
			name := fmt.Sprintf("bench-%d-%d", n, i)
			var inst cloud.Instance
			inst, errs[i] = p.Create(ctx, cloud.CreateRequest{
				Token: name, Name: name, SandboxID: name, Plan: plan, Owner: cloud.Owner{Cluster: "bench", Node: "testbed"},
				UserData: []byte("#cloud-config\n"), Note: func(context.Context, string) error { return nil },
			})
			ids[i] = inst.ID
		})
	}
	wg.Wait()
	return time.Since(begin), ids, errors.Join(errs...)
}

// deleteEvery is how often the adaptor asks again for a deletion, about.
const deleteEvery = time.Second

func deleteAll(ctx context.Context, p cloud.Provider, ids []cloud.InstanceID) error {
	var wg sync.WaitGroup
	errs := make([]error, len(ids))
	for i, id := range ids {
		wg.Go(func() {
			for {
				err := p.Delete(ctx, id)
				if errdefs.IsNotFound(err) {
					return
				}
				if err != nil && !errdefs.IsUnavailable(err) {
					errs[i] = err
					return
				}
				select {
				case <-time.After(deleteEvery):
				case <-ctx.Done():
					errs[i] = ctx.Err()
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
