// SPDX-License-Identifier: Apache-2.0

package forwarder

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// The frames of ttrpc (containerd/ttrpc 1.2, channel.go and PROTOCOL.md): a header
// of ten bytes, big endian, and a body of at most 4 MiB.
//
//	0       4       8      9       10
//	| length | stream | type | flags | body
const (
	headerSize = 10
	maxBody    = 4 << 20

	kindRequest  = 1
	kindResponse = 2

	// flagRemoteOpen on a request: more messages follow. A stock agent has no such
	// call.
	flagRemoteOpen = 2
)

type frame struct {
	stream      uint32
	kind, flags byte
	body        []byte
}

// errTooLong comes with the header of a frame whose body was too long and is gone.
var errTooLong = fmt.Errorf("message of more than %d bytes", maxBody)

func readFrame(r *bufio.Reader) (frame, error) {
	var h [headerSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return frame{}, err
	}
	f := frame{stream: binary.BigEndian.Uint32(h[4:]), kind: h[8], flags: h[9]}
	n := binary.BigEndian.Uint32(h[:])
	if n > maxBody {
		if _, err := r.Discard(int(n)); err != nil {
			return f, err
		}
		return f, errTooLong
	}
	f.body = make([]byte, n)
	_, err := io.ReadFull(r, f.body)
	return f, err
}

// bytes is the frame as it goes over the wire, for one Write.
func (f frame) bytes() []byte {
	b := make([]byte, headerSize, headerSize+len(f.body))
	binary.BigEndian.PutUint32(b, uint32(len(f.body)))
	binary.BigEndian.PutUint32(b[4:], f.stream)
	b[8], b[9] = f.kind, f.flags
	return append(b, f.body...)
}

// refusal is the body of a response that the forwarder gives itself.
func refusal(code codes.Code, format string, a ...any) []byte {
	b, err := proto.Marshal(&ttrpc.Response{Status: status.Newf(code, format, a...).Proto()})
	if err != nil {
		panic(err) // only text that is not UTF-8 cannot be marshalled
	}
	return b
}

// class is what a response says. One that cannot be read is Unknown.
func class(body []byte) codes.Code {
	r := new(ttrpc.Response)
	if proto.Unmarshal(body, r) != nil {
		return codes.Unknown
	}
	return codes.Code(r.GetStatus().GetCode())
}
