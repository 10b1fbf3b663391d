// SPDX-License-Identifier: Apache-2.0

package bootconf

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

// metadataURL is where both clouds' metadata services are.
const metadataURL = "http://169.254.169.254"

const (
	// requestLimit bounds one request to a service that has taken the connection: Azure's
	// answers within 2 s even while the instance is being made.
	requestLimit = 5 * time.Second
	// maxHeader bounds the header of an answer, bytes; real ones have a few hundred.
	maxHeader = 16 << 10
)

// metadataClient speaks to a metadata service and to nothing else: no proxy, no
// redirection, no compression, one connection. Answers are bounded in size and time.
//
// It is net/http's client: podvmd has that already, to pull images, so it costs a start
// nothing that does not use it, and it reads what a server may send more carefully than
// a client of a hundred lines would.
type metadataClient struct{ http.Client }

func newMetadataClient() *metadataClient {
	return &metadataClient{http.Client{
		Transport: &http.Transport{
			DialContext:            (&net.Dialer{Timeout: ProbeLimit}).DialContext,
			MaxResponseHeaderBytes: maxHeader,
			MaxConnsPerHost:        1,
			DisableCompression:     true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// do makes a request, whose content may be nil, and returns the body of an answer of status 200. NotFound: the
// service has no such thing. Unavailable: it is not there, or not now. InvalidArgument:
// it refuses, or its answer is too large.
func (c *metadataClient) do(ctx context.Context, method, url string, header http.Header, content io.Reader) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, content)
	if err != nil {
		return nil, err
	}
	req.Header = header
	req.Header.Set("User-Agent", "podvmd")
	resp, err := c.Do(req)
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

// isStatus tells whether an error is an answer of one of these statuses.
func isStatus(err error, statuses ...int) bool {
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
