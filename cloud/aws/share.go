// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"context"
	"sync"
	"time"
)

// lazy is a value that is fetched when it is first asked for, and kept once that has
// worked. The zero lazy is empty.
type lazy[T any] struct {
	once sync.Once
	turn chan struct{} // held while fetching; made by once

	mu    sync.Mutex
	value T    // guarded by mu
	have  bool // guarded by mu
}

func (l *lazy[T]) get(ctx context.Context, fetch func() (T, error)) (T, error) {
	if v, ok := l.peek(); ok {
		return v, nil
	}
	l.once.Do(func() { l.turn = make(chan struct{}, 1) })
	var none T
	select {
	case l.turn <- struct{}{}:
	case <-ctx.Done():
		return none, ctx.Err()
	}
	defer func() { <-l.turn }()
	if v, ok := l.peek(); ok {
		return v, nil
	}
	v, err := fetch()
	if err != nil {
		return none, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.value, l.have = v, true
	return v, nil
}

func (l *lazy[T]) peek() (T, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.value, l.have
}

// keylock is a lock for each key. Waiting for it ends with the context.
type keylock struct {
	mu    sync.Mutex
	locks map[string]*keyed // guarded by mu
}

type keyed struct {
	held chan struct{} // capacity 1
	n    int           // holder and waiters; guarded by keylock.mu
}

func (k *keylock) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	if k.locks == nil {
		k.locks = map[string]*keyed{}
	}
	l := k.locks[key]
	if l == nil {
		l = &keyed{held: make(chan struct{}, 1)}
		k.locks[key] = l
	}
	l.n++
	k.mu.Unlock()
	done := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.n--; l.n == 0 {
			delete(k.locks, key)
		}
	}
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; done() }, nil
	case <-ctx.Done():
		done()
		return nil, ctx.Err()
	}
}

const (
	// Karpenter's numbers (1.15, pkg/batcher): a batch goes when nobody has joined it
	// for batchIdle, when its first member has waited for batchLongest, or when it
	// is full.
	batchIdle    = 35 * time.Millisecond
	batchLongest = time.Second
	// batchMost is below the 200 values that a filter takes (EC2 API Reference).
	batchMost = 100
	// batchTimeout bounds the calls of one batch, pages and waits for tokens included.
	batchTimeout = 2 * time.Minute
)

// batcher turns equal questions of many callers into one call.
type batcher[K comparable, V any] struct {
	// do answers for all keys at once; a key without an answer gets the zero V.
	do func(context.Context, []K) (map[K]V, error)
	// run is the owner's: batches end with it, and wg tells when they have.
	run context.Context
	wg  *sync.WaitGroup

	mu   sync.Mutex
	open *batch[K, V] // takes members; guarded by mu
}

type batch[K comparable, V any] struct {
	keys  []K // guarded by batcher.mu until the batch goes
	known map[K]bool
	more  chan struct{} // somebody has joined
	full  chan struct{} // closed: go now
	done  chan struct{} // closed: out and err are there
	out   map[K]V
	err   error
}

// ask returns the answer for key. The call outlives a caller that leaves: others may
// wait for it.
func (b *batcher[K, V]) ask(ctx context.Context, key K) (V, error) {
	var none V
	if err := ctx.Err(); err != nil {
		return none, err
	}
	b.mu.Lock()
	t := b.open
	if t == nil {
		t = &batch[K, V]{known: map[K]bool{}, more: make(chan struct{}, 1), full: make(chan struct{}), done: make(chan struct{})}
		b.open = t
		b.wg.Add(1)
		go b.serve(context.WithoutCancel(ctx), t)
	}
	if !t.known[key] {
		t.known[key] = true
		t.keys = append(t.keys, key)
	}
	if len(t.keys) == batchMost {
		b.open = nil
		close(t.full)
	} else {
		select {
		case t.more <- struct{}{}:
		default:
		}
	}
	b.mu.Unlock()
	select {
	case <-t.done:
		return t.out[key], t.err
	case <-ctx.Done():
		return none, ctx.Err()
	}
}

func (b *batcher[K, V]) serve(ctx context.Context, t *batch[K, V]) {
	defer b.wg.Done()
	defer close(t.done)
	latest := time.NewTimer(batchLongest)
	defer latest.Stop()
	idle := time.NewTimer(batchIdle)
	defer idle.Stop()
	for going := false; !going; {
		select {
		case <-t.more:
			idle.Reset(batchIdle)
		case <-idle.C:
			going = true
		case <-latest.C:
			going = true
		case <-t.full:
			going = true
		case <-b.run.Done():
			going = true // to its error
		}
	}
	b.mu.Lock()
	if b.open == t {
		b.open = nil
	}
	keys := t.keys
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	defer context.AfterFunc(b.run, cancel)()
	t.out, t.err = b.do(ctx, keys)
}

// held tells whether somebody holds or waits for the key.
func (k *keylock) held(key string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.locks[key] != nil
}
