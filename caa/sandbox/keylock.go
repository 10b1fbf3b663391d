// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"sync"
)

// keylock is a lock for each key. Waiting for one ends with the context. A lock is
// held across remote calls, by design: it makes the operations on one sandbox
// follow each other, and nobody else's.
type keylock struct {
	mu    sync.Mutex
	locks map[string]*keyEntry // guarded by mu
}

type keyEntry struct {
	held  chan struct{} // holds one element while locked
	users int           // holders and waiters; guarded by keylock.mu
}

// lock takes the lock of key and returns what releases it.
func (k *keylock) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	if k.locks == nil {
		k.locks = map[string]*keyEntry{}
	}
	e := k.locks[key]
	if e == nil {
		e = &keyEntry{held: make(chan struct{}, 1)}
		k.locks[key] = e
	}
	e.users++
	k.mu.Unlock()
	leave := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if e.users--; e.users == 0 {
			delete(k.locks, key)
		}
	}
	if err := ctx.Err(); err != nil {
		leave()
		return nil, context.Cause(ctx)
	}
	select {
	case e.held <- struct{}{}:
		return func() { <-e.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}
