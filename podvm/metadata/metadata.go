// SPDX-License-Identifier: Apache-2.0

// Package metadata speaks to the metadata service of the cloud that the pod VM runs in:
// EC2's or Azure's, both on the host behind 169.254.169.254. Only the VM's own network
// leads there; the pod's does not.
package metadata

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/containerd/errdefs"
)

// URL is where both clouds' metadata services are.
const URL = "http://169.254.169.254"

const (
	// DialLimit bounds the wait for a connection: a service that is there takes it within a
	// few milliseconds, because it runs on the machine's own host.
	DialLimit = 200 * time.Millisecond
	// MaxDocument is the most bytes an answer may have. Clouds allow 16 to 64 KiB of user
	// data, which is the largest there is.
	MaxDocument = 1 << 20
	// requestLimit bounds one request to a service that has taken the connection: Azure's
	// answers within 2 s even while the instance is being made.
	requestLimit = 5 * time.Second
	// maxHeader bounds the header of an answer, bytes; real ones have a few hundred.
	maxHeader = 16 << 10
)

// Client speaks to a metadata service and to nothing else: no proxy, no
// redirection, no compression, one connection. Answers are bounded in size and time.
//
// It is net/http's client: podvmd has that already, to pull images, so it costs a start
// nothing that does not use it, and it reads what a server may send more carefully than
// a client of a hundred lines would. It is safe for concurrent use.
type Client struct{ http http.Client }

// New returns a client. Close ends its connection.
func New() *Client {
	return &Client{http.Client{
		Transport: &http.Transport{
			DialContext:            (&net.Dialer{Timeout: DialLimit}).DialContext,
			MaxResponseHeaderBytes: maxHeader,
			MaxConnsPerHost:        1,
			DisableCompression:     true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Close ends the connection that is kept between requests.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Do makes a request, whose content may be nil, and returns the body of an answer of status 200. NotFound: the
// service has no such thing. Unavailable: it is not there, or not now. InvalidArgument:
// it refuses, or its answer is too large.
func (c *Client) Do(ctx context.Context, method, url string, header http.Header, content io.Reader) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, content)
	if err != nil {
		return nil, err
	}
	req.Header = header
	req.Header.Set("User-Agent", "podvmd")
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	defer resp.Body.Close()
	// Of any status: the connection is used again only when the body was read.
	body, err := io.ReadAll(io.LimitReader(resp.Body, MaxDocument+1))
	switch {
	case resp.StatusCode == http.StatusOK && err != nil:
		return nil, fmt.Errorf("%s %s: the answer is cut short: %w: %w", method, req.URL.Path, err, errdefs.ErrUnavailable)
	case len(body) > MaxDocument:
		return nil, fmt.Errorf("%s %s: the answer has more than %d bytes: %w", method, req.URL.Path, MaxDocument, errdefs.ErrInvalidArgument)
	case resp.StatusCode == http.StatusOK:
		return body, nil
	}
	return nil, statusError{method, req.URL.Path, resp.StatusCode}
}

// statusError is an answer other than 200. Its body is not in the text: it is whatever
// the other end sent.
type statusError struct {
	method, path string
	status       int
}

func (e statusError) Error() string {
	return fmt.Sprintf("%s %s: the answer is %d %s", e.method, e.path, e.status, http.StatusText(e.status))
}

// Unwrap gives the class. 410 is Azure's for a service that is moving; 401 is EC2's for
// a token that it does not know any more.
func (e statusError) Unwrap() error {
	switch {
	case e.status == http.StatusNotFound:
		return errdefs.ErrNotFound
	case e.status >= 500, e.status == http.StatusTooManyRequests, e.status == http.StatusRequestTimeout,
		e.status == http.StatusGone, e.status == http.StatusUnauthorized:
		return errdefs.ErrUnavailable
	}
	return errdefs.ErrInvalidArgument
}

// IsStatus tells whether an error is an answer of one of these statuses.
func IsStatus(err error, statuses ...int) bool {
	var e statusError
	if !errors.As(err, &e) {
		return false
	}
	for _, s := range statuses {
		if e.status == s {
			return true
		}
	}
	return false
}
