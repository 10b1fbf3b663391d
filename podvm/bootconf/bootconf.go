// SPDX-License-Identifier: Apache-2.0

// Package bootconf is what a pod VM is told when it starts: the user data with its
// files, its host name and its network, as the cloud hands them over.
//
// Where they come from is a Source:
//
//	NoCloud       a disk labelled cidata: the local provider, libvirt, vSphere
//	EC2           the instance metadata service, version 2
//	AzureCD       customData, on the provisioning CD
//	AzureService  userData, of the instance metadata service
//
// Read asks several at once. What the firmware calls the machine (Detect) decides which
// are worth asking.
//
// The user data is the only input from outside before the first authenticated
// connection, so it is read strictly: what is not known is an error that names it,
// and files are written to the few places that are agreed on.
package bootconf

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/podvm/metadata"
)

// MaxDocument is the most bytes any of a seed's documents may have, unpacked. Clouds
// allow 16 to 64 KiB; a corrupt length must not take the guest's memory.
const MaxDocument = metadata.MaxDocument

const (
	// ProbeLimit is the longest that a source nobody answers for holds up another one:
	// a more preferred one is waited for that long, and a connection to a metadata
	// service is tried that long. One that is there answers within a few milliseconds
	// (it runs on the machine's own host).
	ProbeLimit = metadata.DialLimit
	// Budget bounds the wait for a source to have something: for the metadata service to
	// come up, and for the network before it. Clouds have both before they start the
	// machine, nearly always; cloud-init waits 120 s for EC2. The adaptor gives a pod VM
	// five minutes by default (PROXY_TIMEOUT), so that its console can still say what was
	// missing.
	Budget = time.Minute
	// retryPause is between two questions to a source that is not up yet. Azure answers five
	// a second.
	retryPause = 200 * time.Millisecond
)

// Seed holds the documents of one source as they came. A nil one was not there.
type Seed struct {
	UserData      []byte // cloud-config, see ParseUserData; may be packed with gzip
	MetaData      []byte // see ParseMetaData
	NetworkConfig []byte // see ParseNetworkConfig
	Hostname      string // told otherwise than by MetaData; what is no host name is ignored
}

// Source is a channel through which a cloud hands over a seed.
type Source interface {
	// Name of the channel, for messages.
	Name() string
	// Seed reads the documents. NotFound: this machine has no such channel, or there is
	// nothing in it. Unavailable: it may be there later. Any other error: what is in it
	// is wrong.
	Seed(ctx context.Context) (*Seed, error)
}

// Config is all a pod VM is told.
type Config struct {
	Source   string // name of the source it is from
	Files    []File
	Hostname string     // empty: not told
	Links    []Ethernet // nil: no network configuration was given
}

// answer is what came of one source.
type answer struct {
	cfg *Config
	err error
}

// Read asks the sources at once and takes the first that has a valid answer. One that
// stands before it on the list is preferred when it answers no more than ProbeLimit
// later. NotFound: none has anything, InvalidArgument: one has something wrong,
// Unavailable: time was up before one of them answered; the text says of each source
// what it said.
func Read(ctx context.Context, sources ...Source) (*Config, error) {
	// Those that are not waited for any longer end before Read does.
	ctx, cancel := context.WithTimeout(ctx, Budget)
	answers := make([]chan answer, len(sources))
	some := make(chan struct{}, len(sources))
	for i, s := range sources {
		answers[i] = make(chan answer, 1)
		go func() {
			cfg, err := ask(ctx, s)
			answers[i] <- answer{cfg, err}
			some <- struct{}{}
		}()
	}
	left := len(sources)
	defer func() {
		cancel()
		for range left {
			<-some
		}
	}()
	got := make([]*answer, len(sources))
	var limit <-chan time.Time
	for {
		best, settled := preferred(got)
		if best != nil && settled || left == 0 {
			return verdict(sources, got, best)
		}
		if best != nil && limit == nil {
			t := time.NewTimer(ProbeLimit)
			defer t.Stop()
			limit = t.C
		}
		select {
		case <-some:
			left--
			for i, c := range answers {
				select {
				case a := <-c:
					got[i] = &a
				default:
				}
			}
		case <-limit:
			return best, nil
		}
	}
}

// preferred returns the first valid answer, and whether all before it are there.
func preferred(got []*answer) (best *Config, settled bool) {
	settled = true
	for _, a := range got {
		if a != nil && a.cfg != nil {
			return a.cfg, settled
		}
		settled = settled && a != nil
	}
	return nil, settled
}

// verdict is Read's result when all that count have answered.
func verdict(sources []Source, got []*answer, best *Config) (*Config, error) {
	if best != nil {
		return best, nil
	}
	what, class := "no user data", error(errdefs.ErrNotFound)
	var said []string
	for i, a := range got {
		said = append(said, fmt.Sprintf("%s: %v", sources[i].Name(), a.err))
		switch {
		case errdefs.IsNotFound(a.err):
		case errdefs.IsUnavailable(a.err):
			if errdefs.IsNotFound(class) {
				class = errdefs.ErrUnavailable
			}
		default:
			what, class = "no valid user data", errdefs.ErrInvalidArgument
		}
	}
	return nil, &readError{what + ": " + strings.Join(said, "; "), class}
}

// readError has a class without repeating its name, which each part's text ends with.
type readError struct {
	text  string
	class error
}

func (e *readError) Error() string { return e.text }
func (e *readError) Unwrap() error { return e.class }

// ask asks one source until it says something for good, or ctx ends.
func ask(ctx context.Context, s Source) (*Config, error) {
	var last error
	for {
		seed, err := s.Seed(ctx)
		if err == nil {
			cfg, err := seed.parse()
			if err != nil {
				return nil, err
			}
			cfg.Source = s.Name()
			return cfg, nil
		}
		if ctx.Err() == nil || last == nil {
			last = err // otherwise it is no news that time is up
		}
		if !errdefs.IsUnavailable(err) && ctx.Err() == nil {
			return nil, err
		}
		pause := time.NewTimer(retryPause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			if !errdefs.IsUnavailable(last) && !errdefs.IsNotFound(last) {
				last = fmt.Errorf("%w: %w", last, errdefs.ErrUnavailable)
			}
			return nil, last
		}
	}
}

// After returns a source that is not asked before ready returns. An error of ready's is
// the source's answer.
func After(ready func(context.Context) error, s Source) Source { return after{s, ready} }

type after struct {
	Source
	ready func(context.Context) error
}

func (a after) Seed(ctx context.Context) (*Seed, error) {
	if err := a.ready(ctx); err != nil {
		return nil, err
	}
	return a.Source.Seed(ctx)
}

func (s *Seed) parse() (*Config, error) {
	var cfg Config
	doc, err := unpack(s.UserData)
	if err == nil {
		cfg.Files, err = ParseUserData(doc)
	}
	if err != nil {
		return nil, fmt.Errorf("user-data: %w", err)
	}
	if isHostname(s.Hostname) {
		cfg.Hostname = s.Hostname
	}
	if s.MetaData != nil {
		if cfg.Hostname, err = ParseMetaData(s.MetaData); err != nil {
			return nil, fmt.Errorf("meta-data: %w", err)
		}
	}
	if s.NetworkConfig != nil {
		if cfg.Links, err = ParseNetworkConfig(s.NetworkConfig); err != nil {
			return nil, fmt.Errorf("network-config: %w", err)
		}
	}
	return &cfg, nil
}

// unpack unpacks a document that begins as a gzip file does (RFC 1952 2.3.1): cloud-init
// takes such user data too, and clouds' limits are for what is sent.
func unpack(doc []byte) ([]byte, error) {
	if !bytes.HasPrefix(doc, []byte{0x1f, 0x8b}) {
		return doc, nil
	}
	r, err := gzip.NewReader(bytes.NewReader(doc))
	if err != nil {
		return nil, invalid("gzip: %v", err)
	}
	out, err := io.ReadAll(io.LimitReader(r, MaxDocument+1))
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return nil, invalid("gzip: it is cut short")
	case err != nil:
		return nil, invalid("gzip: %v", err)
	case len(out) > MaxDocument:
		return nil, invalid("gzip: the document has more than %d bytes", MaxDocument)
	}
	return out, nil
}
