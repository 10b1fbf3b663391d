// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"
)

// blockSize of the EBS direct API, in bytes.
const blockSize = 512 << 10

type snapshot struct {
	resource
	gib         int
	status      string // pending, completed, error
	done        time.Time
	description string
	encrypted   bool
	token, key  string // ClientToken, and the request it came with
	timeout     time.Duration
	touched     time.Time
	blocks      map[int][32]byte // digests of what was written
	data        map[int][]byte   // nil with a file
	file        string           // "": in memory
	given       bool             // it came with the Config
}

func (s *Server) newSnapshot(now time.Time, gib int, tags map[string]string) *snapshot {
	n := &snapshot{resource: s.newResource("snap-", now, tags), gib: gib, status: "pending", touched: now, timeout: time.Hour,
		blocks: map[int][32]byte{}}
	s.snapshots[n.id] = n
	return n
}

// state is pending, completed or error: a snapshot that nobody writes to any more
// before it is complete ends in error.
func (n *snapshot) state(now time.Time) string {
	switch {
	case n.status == "pending" && !n.done.IsZero():
		if now.Before(n.done) {
			return "pending"
		}
		return "completed"
	case n.status == "pending" && now.After(n.touched.Add(n.timeout)):
		return "error"
	}
	return n.status
}

func (n *snapshot) progress(now time.Time) string {
	if n.state(now) == "completed" {
		return "100%"
	}
	return "0%"
}

// ebsError is an error of the EBS direct API.
func ebsError(status int, kind, reason, format string, args ...any) *Error {
	return &Error{Status: status, Code: kind + "/" + reason, Message: fmt.Sprintf(format, args...)}
}

// ebsReply is what an action of the EBS direct API answers.
type ebsReply struct {
	status int
	header map[string]string
	json   any
	raw    []byte
}

// ebsCall is one request of the EBS direct API.
type ebsCall struct {
	s     *Server
	r     *http.Request
	body  []byte
	key   *Key
	now   time.Time
	id    string // of the snapshot, "" for StartSnapshot
	block int
}

// serveEBS serves the EBS direct API. Form: its API reference, November 2026.
func (s *Server) serveEBS(w http.ResponseWriter, r *http.Request, body []byte) {
	action, c := route(r)
	c.s, c.r, c.body = s, r, body
	reply, f, err := s.ebs(action, c)
	if f.Hang {
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
	if f.Lost {
		panic(http.ErrAbortHandler)
	}
	if err != nil {
		var e *Error
		if !errors.As(err, &e) {
			e = ebsError(500, "InternalServerException", "", "%v", err)
		}
		kind, reason, _ := strings.Cut(e.Code, "/")
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Amzn-Errortype", kind)
		w.WriteHeader(max(e.Status, 400))
		out := map[string]string{"Message": e.Message}
		if reason != "" {
			out["Reason"] = reason
		}
		json.NewEncoder(w).Encode(out)
		return
	}
	for k, v := range reply.header {
		w.Header().Set(k, v)
	}
	out := reply.raw
	if reply.json != nil {
		w.Header().Set("Content-Type", "application/json")
		out, _ = json.Marshal(reply.json)
	}
	w.WriteHeader(reply.status)
	write(w, r, out, f)
}

// route finds the action of a path.
func route(r *http.Request) (string, *ebsCall) {
	p := strings.Split(strings.Trim(r.URL.Path, "/"), "/") // snapshots, ...
	c := &ebsCall{}
	switch {
	case len(p) == 1 && r.Method == http.MethodPost:
		return "StartSnapshot", c
	case len(p) == 3 && p[1] == "completion" && r.Method == http.MethodPost:
		c.id = p[2]
		return "CompleteSnapshot", c
	case len(p) == 3 && p[2] == "blocks" && r.Method == http.MethodGet:
		c.id = p[1]
		return "ListSnapshotBlocks", c
	case len(p) == 4 && p[2] == "blocks":
		c.id = p[1]
		var err error
		if c.block, err = strconv.Atoi(p[3]); err != nil {
			c.block = -1
		}
		return map[string]string{http.MethodPut: "PutSnapshotBlock", http.MethodGet: "GetSnapshotBlock"}[r.Method], c
	}
	return "", c
}

func (s *Server) ebs(action string, c *ebsCall) (ebsReply, Fault, error) {
	do := map[string]func(*ebsCall) (ebsReply, error){"StartSnapshot": (*ebsCall).start, "PutSnapshotBlock": (*ebsCall).put,
		"CompleteSnapshot": (*ebsCall).complete, "ListSnapshotBlocks": (*ebsCall).list, "GetSnapshotBlock": (*ebsCall).get}[action]
	if do == nil {
		return ebsReply{}, Fault{}, ebsError(404, "UnknownOperationException", "", "%s %s", c.r.Method, c.r.URL.Path)
	}
	s.mu.Lock()
	s.calls[action]++
	s.mu.Unlock()
	key, err := s.authenticate(c.r, c.body)
	if err != nil {
		return ebsReply{}, Fault{}, ebsError(403, "UnrecognizedClientException", "", "The security token included in the request is invalid: %v", err)
	}
	if !key.may("ebs:" + action) {
		return ebsReply{}, Fault{}, ebsError(403, "AccessDeniedException", "UNAUTHORIZED_ACCOUNT",
			"User: %s is not authorized to perform: ebs:%s", s.arn(key), action)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.faultFor(action, nil)
	if f.Delay > 0 {
		s.mu.Unlock()
		select {
		case <-time.After(f.Delay):
		case <-c.r.Context().Done():
		}
		s.mu.Lock()
	}
	if f.Err != nil {
		return ebsReply{}, f, f.Err
	}
	c.now, c.key = s.cfg.Now(), key
	reply, err := do(c)
	return reply, f, err
}

func (c *ebsCall) start() (ebsReply, error) {
	var in struct {
		VolumeSize                                            int64
		ParentSnapshotId, Description, ClientToken, KmsKeyArn string
		Tags                                                  []struct{ Key, Value string }
		Encrypted                                             *bool
		Timeout                                               *int
	}
	d := json.NewDecoder(bytes.NewReader(c.body))
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil {
		return ebsReply{}, ebsError(400, "ValidationException", "INVALID_PARAMETER_VALUE", "%v", err)
	}
	if in.VolumeSize < 1 || in.VolumeSize > 65536 {
		return ebsReply{}, ebsError(400, "ValidationException", "INVALID_VOLUME_SIZE", "Value '%d' at 'volumeSize' failed to satisfy constraint: between 1 and 65536", in.VolumeSize)
	}
	if in.ParentSnapshotId != "" {
		return ebsReply{}, ebsError(400, "ValidationException", "INVALID_PARAMETER_VALUE", "This emulation makes no incremental snapshots: ParentSnapshotId")
	}
	if len(in.Tags) > 0 && !c.key.may("ec2:CreateTags") {
		return ebsReply{}, ebsError(403, "AccessDeniedException", "UNAUTHORIZED_ACCOUNT", "User: %s is not authorized to perform: ec2:CreateTags", c.s.arn(c.key))
	}
	tags := map[string]string{}
	for _, t := range in.Tags {
		tags[t.Key] = t.Value
	}
	for _, n := range c.s.snapshots {
		if in.ClientToken != "" && n.token == in.ClientToken && n.exists(c.now) {
			if n.key != string(c.body) {
				return ebsReply{}, ebsError(503, "ConflictException", "", "The ClientToken was used with another request")
			}
			return c.started(n), nil
		}
	}
	n := c.s.newSnapshot(c.now, int(in.VolumeSize), tags)
	n.token, n.key, n.description, n.encrypted = in.ClientToken, string(c.body), in.Description, in.Encrypted != nil && *in.Encrypted
	if in.Timeout != nil {
		n.timeout = time.Duration(*in.Timeout) * time.Minute
	}
	if c.s.cfg.ImageDir != "" {
		n.file = filepath.Join(c.s.cfg.ImageDir, n.id+".raw")
		f, err := os.Create(n.file)
		if err != nil {
			return ebsReply{}, err
		}
		defer f.Close()
		if err := f.Truncate(in.VolumeSize << 30); err != nil { // sparse
			return ebsReply{}, err
		}
	} else {
		n.data = map[int][]byte{}
	}
	return c.started(n), nil
}

func (c *ebsCall) started(n *snapshot) ebsReply {
	var tags []map[string]string
	for _, o := range tagSet(n.tags) {
		tags = append(tags, map[string]string{"Key": o["key"].(string), "Value": string(o["value"].(present))})
	}
	return ebsReply{status: 201, json: map[string]any{"SnapshotId": n.id, "OwnerId": c.s.cfg.Account, "Status": n.state(c.now),
		"StartTime": float64(n.created.UnixMilli()) / 1000, "VolumeSize": n.gib, "BlockSize": blockSize, "Description": n.description, "Tags": tags}}
}

// pending finds the snapshot of a call that writes.
func (c *ebsCall) pending() (*snapshot, error) {
	n := c.s.snapshots[c.id]
	if n == nil || !n.exists(c.now) {
		return nil, ebsError(404, "ResourceNotFoundException", "SNAPSHOT_NOT_FOUND", "The snapshot '%s' does not exist.", c.id)
	}
	if n.state(c.now) != "pending" || !n.done.IsZero() {
		return nil, ebsError(400, "ValidationException", "INVALID_SNAPSHOT", "The snapshot %s is not in the state pending", c.id)
	}
	n.touched = c.now
	return n, nil
}

func (c *ebsCall) put() (ebsReply, error) {
	n, err := c.pending()
	if err != nil {
		return ebsReply{}, err
	}
	if blocks := n.gib << 11; c.block < 0 || c.block >= blocks {
		return ebsReply{}, ebsError(400, "ValidationException", "INVALID_BLOCK", "The block index must be from 0 to %d", blocks-1)
	}
	h := c.r.Header
	if h.Get("X-Amz-Data-Length") != itoa(blockSize) || len(c.body) != blockSize {
		return ebsReply{}, ebsError(400, "ValidationException", "INVALID_PARAMETER_VALUE", "A block has %d bytes, not %d; x-amz-Data-Length %s",
			blockSize, len(c.body), h.Get("X-Amz-Data-Length"))
	}
	sum := sha256.Sum256(c.body)
	text := base64.StdEncoding.EncodeToString(sum[:])
	if h.Get("X-Amz-Checksum-Algorithm") != "SHA256" || h.Get("X-Amz-Checksum") != text {
		return ebsReply{}, ebsError(400, "ValidationException", "INVALID_PARAMETER_VALUE", "The checksum of the block is not its SHA256")
	}
	if n.file != "" {
		f, err := os.OpenFile(n.file, os.O_WRONLY, 0)
		if err != nil {
			return ebsReply{}, err
		}
		defer f.Close()
		if _, err := f.WriteAt(c.body, int64(c.block)*blockSize); err != nil {
			return ebsReply{}, err
		}
	} else {
		n.data[c.block] = c.body
	}
	n.blocks[c.block] = sum
	return ebsReply{status: 201, header: map[string]string{"x-amz-Checksum": text, "x-amz-Checksum-Algorithm": "SHA256"}}, nil
}

func (c *ebsCall) complete() (ebsReply, error) {
	n := c.s.snapshots[c.id]
	h := c.r.Header
	if n != nil && n.exists(c.now) && !n.done.IsZero() && h.Get("X-Amz-ChangedBlocksCount") == itoa(len(n.blocks)) {
		return ebsReply{status: 202, json: map[string]any{"Status": n.state(c.now)}}, nil // once more
	}
	n, err := c.pending()
	if err != nil {
		return ebsReply{}, err
	}
	if count := h.Get("X-Amz-ChangedBlocksCount"); count != itoa(len(n.blocks)) {
		return ebsReply{}, ebsError(400, "ValidationException", "INVALID_PARAMETER_VALUE", "%d blocks were written, x-amz-ChangedBlocksCount is %s", len(n.blocks), count)
	}
	if want := h.Get("X-Amz-Checksum"); want != "" {
		all := sha256.New()
		for _, i := range n.written() {
			sum := n.blocks[i]
			all.Write(sum[:])
		}
		if h.Get("X-Amz-Checksum-Aggregation-Method") != "LINEAR" || want != base64.StdEncoding.EncodeToString(all.Sum(nil)) {
			return ebsReply{}, ebsError(400, "ValidationException", "INVALID_PARAMETER_VALUE", "The checksum of the snapshot is not that of its blocks' checksums")
		}
	}
	n.done = c.now.Add(c.s.lag())
	return ebsReply{status: 202, json: map[string]any{"Status": n.state(c.now)}}, nil
}

// written are the indexes of the blocks that were written, in order.
func (n *snapshot) written() []int {
	out := make([]int, 0, len(n.blocks))
	for i := range n.blocks {
		out = append(out, i)
	}
	sort.Ints(out)
	return out
}

// completed finds the snapshot of a call that reads.
func (c *ebsCall) completed() (*snapshot, error) {
	n := c.s.snapshots[c.id]
	if n == nil || !n.exists(c.now) {
		return nil, ebsError(404, "ResourceNotFoundException", "SNAPSHOT_NOT_FOUND", "The snapshot '%s' does not exist.", c.id)
	}
	if n.state(c.now) != "completed" {
		return nil, ebsError(400, "ValidationException", "INVALID_SNAPSHOT", "The snapshot %s is not in the state completed", c.id)
	}
	return n, nil
}

func (n *snapshot) blockToken(i int) string {
	sum := n.blocks[i]
	return base64.StdEncoding.EncodeToString(slices.Concat([]byte(n.id), sum[:8]))
}

func (c *ebsCall) list() (ebsReply, error) {
	n, err := c.completed()
	if err != nil {
		return ebsReply{}, err
	}
	q := c.r.URL.Query()
	from, _ := strconv.Atoi(q.Get("startingBlock"))
	if t := q.Get("pageToken"); t != "" {
		if from, err = strconv.Atoi(t); err != nil {
			return ebsReply{}, ebsError(400, "ValidationException", "INVALID_PAGE_TOKEN", "The page token is invalid")
		}
	}
	limit := 10000
	if m := q.Get("maxResults"); m != "" {
		if limit, err = strconv.Atoi(m); err != nil || limit < 100 || limit > 10000 {
			return ebsReply{}, ebsError(400, "ValidationException", "INVALID_PARAMETER_VALUE", "maxResults must be from 100 to 10000")
		}
	}
	out := map[string]any{"VolumeSize": n.gib, "BlockSize": blockSize, "ExpiryTime": float64(c.now.Add(7 * 24 * time.Hour).Unix())}
	blocks := []map[string]any{}
	for _, i := range n.written() {
		if i < from {
			continue
		}
		if len(blocks) == limit {
			out["NextToken"] = itoa(i)
			break
		}
		blocks = append(blocks, map[string]any{"BlockIndex": i, "BlockToken": n.blockToken(i)})
	}
	out["Blocks"] = blocks
	return ebsReply{status: 200, json: out}, nil
}

func (c *ebsCall) get() (ebsReply, error) {
	n, err := c.completed()
	if err != nil {
		return ebsReply{}, err
	}
	sum, ok := n.blocks[c.block]
	if !ok || c.r.URL.Query().Get("blockToken") != n.blockToken(c.block) {
		return ebsReply{}, ebsError(400, "ValidationException", "INVALID_BLOCK_TOKEN", "The block %d was not written, or the token is another's", c.block)
	}
	data := n.data[c.block]
	if n.file != "" {
		f, err := os.Open(n.file)
		if err != nil {
			return ebsReply{}, err
		}
		defer f.Close()
		data = make([]byte, blockSize)
		if _, err := f.ReadAt(data, int64(c.block)*blockSize); err != nil {
			return ebsReply{}, err
		}
	}
	return ebsReply{status: 200, raw: data, header: map[string]string{"Content-Type": "application/octet-stream", "x-amz-Data-Length": itoa(blockSize),
		"x-amz-Checksum": base64.StdEncoding.EncodeToString(sum[:]), "x-amz-Checksum-Algorithm": "SHA256"}}, nil
}
