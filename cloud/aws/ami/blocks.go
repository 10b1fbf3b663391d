// SPDX-License-Identifier: Apache-2.0

package ami

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"hash"
	"strings"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ebs"
	ebstypes "github.com/aws/aws-sdk-go-v2/service/ebs/types"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/diskimage"
)

const (
	// blockSize of the EBS direct API.
	blockSize = diskimage.ChunkSize
	// batch is how many blocks are under way at once, and after how many the tag is
	// written: what is sent again after a loss of power is less than 8 MiB.
	batch = 16
	// noteTimeout is for the tag after the caller has left.
	noteTimeout = 5 * time.Second
)

// codeNoSnapshot: there is none, or none yet.
const codeNoSnapshot = "InvalidSnapshot.NotFound"

// writer writes blocks into a snapshot, batch by batch.
type writer struct {
	*publication
	id       string
	uploaded int // blocks that are in it from the first on
	seen     int // blocks that are not empty, so far
	sums     hash.Hash
	next     []block
}

type block struct {
	index int
	data  []byte
	sum   [sha256.Size]byte
}

// fill writes the blocks that are missing and completes the snapshot. false: it takes
// them no more; look again what there is.
func (p *publication) fill(ctx context.Context, id string, uploaded int) (bool, error) {
	w := &writer{publication: p, id: id, uploaded: uploaded, sums: sha256.New()}
	err := p.Image.Chunks(ctx, func(c diskimage.Chunk) error { return w.add(ctx, c) })
	if err == nil {
		err = w.flush(ctx)
	}
	var ok bool
	if err == nil {
		p.Progress(diskimage.Progress{Step: "complete"})
		ok, err = p.complete(ctx, id, w.seen, w.sums.Sum(nil))
	}
	switch {
	case err == nil && ok:
		return true, nil
	case ctx.Err() != nil:
		w.lastNote(ctx)
		return false, ctx.Err()
	case err != nil && !ended(err):
		w.lastNote(ctx)
		return false, err
	}
	return false, nil
}

// lastNote writes the tag for the next process, and waits a little if the snapshot is
// so new that EC2 does not know it yet. Without it more is sent again; that is no error.
func (w *writer) lastNote(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), noteTimeout)
	defer cancel()
	for w.uploaded > 0 && aws.ErrorCode(w.note(ctx)) == codeNoSnapshot {
		if cloud.Pause(ctx, time.Second/2) != nil {
			return
		}
	}
}

// ended tells of errors that mean that the snapshot takes no blocks any more: it is
// gone, or in error after it was left alone for too long.
func ended(err error) bool {
	return errdefs.IsNotFound(err) || notPending(err)
}

// notPending: the snapshot is completed, or being so, or in error.
func notPending(err error) bool {
	var v *ebstypes.ValidationException
	return aws.As(err, &v) && strings.HasPrefix(string(v.Reason), "INVALID_SNAPSHOT")
}

func (w *writer) add(ctx context.Context, c diskimage.Chunk) error {
	if c.Zero {
		return nil
	}
	size := len(c.Data)
	if size < blockSize {
		c.Data = append(c.Data, make([]byte, blockSize-size)...)
	}
	b := block{c.Index, c.Data, sha256.Sum256(c.Data)}
	w.sums.Write(b.sum[:])
	w.seen++
	if w.seen <= w.uploaded {
		w.out.Skipped += int64(size)
		return nil
	}
	if w.next = append(w.next, b); len(w.next) < batch {
		return nil
	}
	return w.flush(ctx)
}

// flush writes a batch. Those before it are in the snapshot.
func (w *writer) flush(ctx context.Context) error {
	if len(w.next) == 0 {
		return nil
	}
	bounded, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make(chan error)
	for _, b := range w.next {
		go func() { errs <- w.put(bounded, b) }()
	}
	var first error
	for range w.next {
		err := <-errs
		if err == nil {
			w.out.Sent += blockSize
		} else if first == nil {
			first = err
			cancel()
		}
		if first == nil {
			w.Progress(diskimage.Progress{Step: "upload", Done: min(w.out.Sent+w.out.Skipped, w.Image.Content), Total: w.Image.Content, Skipped: w.out.Skipped})
		}
	}
	if first != nil {
		return first
	}
	w.uploaded += len(w.next)
	w.next = nil
	if err := w.note(ctx); errdefs.IsPermissionDenied(err) {
		return err // the others only cost the next process time
	}
	return ctx.Err()
}

func (w *writer) put(ctx context.Context, b block) error {
	_, err := aws.CallEBS(ctx, w.Account, "PutSnapshotBlock", (*ebs.Client).PutSnapshotBlock, func() *ebs.PutSnapshotBlockInput {
		return &ebs.PutSnapshotBlockInput{
			SnapshotId: &w.id, BlockIndex: awssdk.Int32(int32(b.index)), BlockData: bytes.NewReader(b.data), DataLength: awssdk.Int32(blockSize),
			Checksum: awssdk.String(base64.StdEncoding.EncodeToString(b.sum[:])), ChecksumAlgorithm: ebstypes.ChecksumAlgorithmChecksumAlgorithmSha256,
		}
	})
	if err != nil {
		return fmt.Errorf("block %d: %w", b.index, err)
	}
	return nil
}

// note writes the tag that the next process goes by.
func (w *writer) note(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, noteTimeout)
	defer cancel()
	_, err := aws.CallEC2(ctx, w.Account, "CreateTags", (*ec2.Client).CreateTags, &ec2.CreateTagsInput{Resources: []string{w.id},
		Tags: []types.Tag{{Key: awssdk.String(tagUploaded), Value: awssdk.String(fmt.Sprint(w.uploaded))}}})
	return err
}
