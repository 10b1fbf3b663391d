// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"github.com/containerd/errdefs"
)

// answered is an error as the SDK returns it for an answer of the service.
func answered(status int, code string) error {
	var err error = &smithy.GenericAPIError{Code: code, Message: "text of the service"}
	err = &awshttp.ResponseError{ResponseError: &smithyhttp.ResponseError{
		Response: &smithyhttp.Response{Response: &http.Response{StatusCode: status}}, Err: err}}
	return &smithy.OperationError{ServiceID: "EC2", OperationName: "RunInstances", Err: err}
}

func TestClassify(t *testing.T) {
	for code, r := range rules {
		err := classify(t.Context(), "RunInstances", answered(400, code))
		if r.class == nil || !errors.Is(err, r.class) || errdefs.Resolve(err) != r.class {
			t.Errorf("%s: %v has class %v, want %v", code, err, errdefs.Resolve(err), r.class)
		}
		if (r.scope != scopeNone) != (capacity(err) != scopeNone) || r.scope != scopeNone && r.class != errdefs.ErrResourceExhausted {
			t.Errorf("%s: scope %v", code, r.scope)
		}
		if throttled(code) && r.class != errdefs.ErrUnavailable {
			t.Errorf("%s is a throttle and %v", code, r.class)
		}
		// A capacity error is not repeated in place, an outage is.
		retry := newRetryer().IsErrorRetryable(answered(500, code))
		if want := r.class == errdefs.ErrUnavailable && !throttled(code); retry != want {
			t.Errorf("%s with status 500: repeated %v, want %v", code, retry, want)
		}
	}
	for name, c := range map[string]struct {
		err   error
		class error
	}{
		"unknown code":          {answered(400, "BrandNewError"), errdefs.ErrUnknown},
		"unknown code, 5xx":     {answered(500, "BrandNewError"), errdefs.ErrUnavailable},
		"own deadline":          {&smithy.OperationError{Err: context.DeadlineExceeded}, errdefs.ErrUnavailable},
		"unreadable":            {&smithy.DeserializationError{Err: errors.New("EOF")}, errdefs.ErrUnavailable},
		"credential":            {&smithy.OperationError{Err: &credentialError{"look", errors.New("no file")}}, errdefs.ErrPermissionDenied},
		"credential, no answer": {&credentialError{"look", context.DeadlineExceeded}, errdefs.ErrUnavailable},
		"anything":              {errors.New("what"), errdefs.ErrUnknown},
	} {
		err := classify(t.Context(), "RunInstances", c.err)
		if got := errdefs.Resolve(err); got != c.class {
			t.Errorf("%s: %v is %v, want %v", name, err, got, c.class)
		}
		if errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: the deadline of a call looks like the caller's: %v", name, err)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := classify(ended, "RunInstances", answered(503, "RequestLimitExceeded")); !errors.Is(err, context.Canceled) || errdefs.IsUnavailable(err) {
		t.Errorf("the caller has left: %v", err)
	}
}

func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimit(3, 2)
		begin := time.Now()
		var mu sync.Mutex
		var order []string
		var wg sync.WaitGroup
		ask := func(name string, urgent bool) {
			wg.Go(func() {
				if err := l.wait(t.Context(), urgent); err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				order = append(order, name)
			})
			synctest.Wait()
		}
		for range 3 {
			ask("burst", false)
		}
		if time.Since(begin) != 0 || len(order) != 3 {
			t.Fatalf("%v after %v", order, time.Since(begin))
		}
		ask("first", false)
		ask("second", false)
		ctx, cancel := context.WithCancel(t.Context())
		left := make(chan error, 1)
		go func() { left <- l.wait(ctx, true) }()
		synctest.Wait()
		ask("urgent", true)
		cancel()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("left: %v", err)
		}
		wg.Wait()
		if got := fmt.Sprint(order[3:]); got != "[urgent first second]" {
			t.Errorf("order %s", got)
		}
		if took := time.Since(begin).Round(time.Millisecond); took != 1500*time.Millisecond {
			t.Errorf("three tokens at two a second took %v", took)
		}
	})
}

// Refusals slow us down, once for each second of them, and successes speed us up.
func TestLimitRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimit(4, 2)
		for range 10 {
			l.refused()
		}
		if l.rate != 1 || l.level != 0 {
			t.Errorf("rate %v, level %v after a burst of refusals", l.rate, l.level)
		}
		for range 10 {
			time.Sleep(2 * time.Second)
			l.refused()
		}
		if l.rate != 2.0/minShare {
			t.Errorf("rate %v after many refusals", l.rate)
		}
		for range 100 {
			l.passed()
		}
		if l.rate != 2 {
			t.Errorf("rate %v after many successes", l.rate)
		}
	})
}

// Equal questions are one call, for as many as a call takes; who leaves ends nothing.
func TestBatcher(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var calls [][]int
		var wg sync.WaitGroup
		b := &batcher[int, string]{run: t.Context(), wg: &wg, do: func(_ context.Context, keys []int) (map[int]string, error) {
			mu.Lock()
			calls = append(calls, keys)
			mu.Unlock()
			out := map[int]string{}
			for _, k := range keys {
				out[k] = fmt.Sprint(k)
			}
			return out, nil
		}}
		var asked sync.WaitGroup
		for n := range 2*batchMost + 1 {
			asked.Go(func() {
				if v, err := b.ask(t.Context(), n/2); v != fmt.Sprint(n/2) || err != nil {
					t.Errorf("%q, %v", v, err)
				}
			})
		}
		asked.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		asked.Go(func() {
			if _, err := b.ask(ctx, 1); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
		synctest.Wait()
		cancel()
		asked.Wait()
		wg.Wait()
		total := 0
		for _, c := range calls {
			total += len(c)
		}
		if len(calls) != 3 || total < batchMost+2 {
			t.Errorf("%d calls for %d keys", len(calls), total)
		}
		begin := time.Now() // a stream of questions does not hold up the first
		stop := time.After(5 * time.Second)
		var first time.Duration
		asked.Go(func() { b.ask(t.Context(), -1); first = time.Since(begin) })
	stream:
		for n := 0; ; n++ {
			select {
			case <-stop:
				break stream
			case <-time.After(batchIdle / 2):
				asked.Go(func() { b.ask(t.Context(), n) })
			}
		}
		asked.Wait()
		wg.Wait()
		if first != batchLongest {
			t.Errorf("the first waited %v", first)
		}
	})
}
