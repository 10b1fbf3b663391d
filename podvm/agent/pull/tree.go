// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

func plainPath(path string) bool { return !strings.ContainsAny(path, `,:\`) }

// errAbandoned is the end of a pull that nobody waited for.
var errAbandoned = errors.New("nobody waits for the image any more")

// acquire returns a tree with the image and holds a reference to it.
func (s *Store) acquire(ctx context.Context, reference string) (*tree, error) {
	ref, err := s.parse(reference)
	if err != nil {
		return nil, err
	}
	for {
		t, err := s.find(ctx, ref)
		if err != nil {
			return nil, err
		}
		select {
		case <-t.done:
		case <-ctx.Done():
			s.release(t)
			return nil, context.Cause(ctx)
		}
		if t.err == nil {
			s.remember(ref, t)
			return t, nil
		}
		s.release(t)
		if !errors.Is(t.err, errAbandoned) || s.life.Err() != nil {
			return nil, t.err
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}

// find takes a reference to the tree of an image; it may still be pulled.
func (s *Store) find(ctx context.Context, ref parsed) (*tree, error) {
	have := s.here(ref)
	if have != nil && ref.exact {
		return have, nil
	}
	img, err := s.resolve(ctx, ref)
	if err != nil {
		// Where the registry cannot be asked, what it said before holds.
		if have != nil && errdefs.IsUnavailable(err) {
			return have, nil
		}
		if have != nil {
			s.release(have)
		}
		return nil, err
	}
	if have != nil {
		s.release(have)
	}
	return s.join(ref, img)
}

// here takes a reference to what this reference stood for, if it is still here.
func (s *Store) here(ref parsed) *tree {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.trees[s.pulled[ref.name.Name()]]
	if t != nil {
		s.holdLocked(t)
	}
	return t
}

func (s *Store) remember(ref parsed, t *tree) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pulled[ref.name.Name()] = t.digest
}

// join takes a reference to the image's tree. If there is none it begins to pull it,
// and takes img over.
func (s *Store) join(ref parsed, img *image) (*tree, error) {
	if err := s.evictExcept(img.digest); err != nil {
		img.close()
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.trees[img.digest]; t != nil {
		s.holdLocked(t)
		img.close()
		return t, nil
	}
	if s.life.Err() != nil {
		img.close()
		return nil, fmt.Errorf("the agent is ending: %w", errdefs.ErrUnavailable)
	}
	t := &tree{digest: img.digest, path: s.directoryLocked("tree"), cancel: img.cancel, done: make(chan struct{}), refs: 1}
	s.trees[t.digest] = t
	s.wg.Go(func() { s.pull(ref, img, t) })
	return t, nil
}

// pull fills a tree and ends its wait.
func (s *Store) pull(ref parsed, img *image, t *tree) {
	defer close(t.done)
	defer img.close()
	err := s.makeTree(t.path, s.cfg.RootSize)
	if err == nil {
		if err = img.unpack(t.path, s.cfg.RootSize); err == nil {
			t.used, err = seal(t.path)
		}
		if err != nil {
			err = s.explain(ref, img.ctx, err)
			err = errors.Join(err, s.removeTree(t.path))
		}
	}
	if err == nil {
		return
	}
	if img.ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", errAbandoned, errdefs.ErrAborted)
	}
	t.err = err
	s.mu.Lock()
	delete(s.trees, t.digest)
	s.mu.Unlock()
}

// seal makes a tree read-only and tells how large it is.
func seal(path string) (uint64, error) {
	if err := unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return 0, fmt.Errorf("make the image read-only: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, fmt.Errorf("measure the image: %w", err)
	}
	return (st.Blocks - st.Bfree) * uint64(st.Bsize), nil
}

func (s *Store) holdLocked(t *tree) {
	t.refs++
	if t.timer != nil {
		t.timer.Stop()
		t.timer = nil
	}
}

// release gives a reference back. A pull that is under way then has Config.Linger for
// somebody else to come.
func (s *Store) release(t *tree) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t.refs--
	if t.refs > 0 {
		return
	}
	select {
	case <-t.done:
		return
	default:
	}
	if s.cfg.Linger < 0 {
		t.cancel()
		return
	}
	t.timer = time.AfterFunc(s.cfg.Linger, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if t.refs == 0 {
			t.cancel()
		}
	})
}

// evict removes the images that nobody uses.
func (s *Store) evict() error { return s.evictExcept(v1.Hash{}) }

func (s *Store) evictExcept(digest v1.Hash) error {
	s.mu.Lock()
	var gone []*tree
	for d, t := range s.trees {
		select {
		case <-t.done:
		default:
			continue
		}
		if t.refs == 0 && d != digest {
			gone = append(gone, t)
			delete(s.trees, d)
		}
	}
	for ref, d := range s.pulled {
		if s.trees[d] == nil {
			delete(s.pulled, ref)
		}
	}
	s.mu.Unlock()
	var errs []error
	for _, t := range gone {
		errs = append(errs, s.removeTree(t.path))
	}
	return errors.Join(errs...)
}
