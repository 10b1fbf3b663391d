// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sys/unix"
)

// isTransport tells whether an error is about the way to the registry or is the
// registry's answer, and not about what it has.
func isTransport(err error) bool {
	var (
		refusal *transport.Error
		failed  *url.Error
		broken  *networkError
	)
	return errors.As(err, &refusal) || errors.As(err, &failed) || errors.As(err, &broken)
}

// explain gives an error a class and, where somebody can mend it, says how. It never
// has a request's header in it, and so no credential.
func (s *Store) explain(ref parsed, ctx context.Context, err error) error {
	var (
		registry = ref.name.Context().RegistryStr()
		refusal  *transport.Error
		plain    *plainError
		cert     *tls.CertificateVerificationError
		errno    syscall.Errno
		network  net.Error
	)
	classify := func(class error, format string, a ...any) error {
		return fmt.Errorf(format+": %w", append(a, class)...)
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, errEntries):
		return classify(errdefs.ErrResourceExhausted, "the image does not fit into the root file system's limit of %d bytes (%d MiB), which is half of the pod VM's memory; raise the pod's memory limit or its annotation io.katacontainers.config.hypervisor.default_memory: %w", s.cfg.RootSize, s.cfg.RootSize>>20, err)
	case errors.As(err, &cert): // before what plain HTTP was answered, where that was tried too
		return classify(errdefs.ErrFailedPrecondition, "the certificate of %s is not to be trusted (%w); give the authority that issued it in the adaptor's PULL_CA_FILE", registry, cert.Err)
	case errors.As(err, &refusal):
		return s.refused(ref, refusal)
	case errors.Is(err, http.ErrSchemeMismatch):
		return classify(errdefs.ErrFailedPrecondition, "%s speaks plain HTTP, which is not allowed; to allow it, list %s in the adaptor's PULL_INSECURE_REGISTRIES", registry, registry)
	case hasClass(err):
		return err
	case errors.As(err, &network) && !errors.As(err, &plain), isTransport(err) && !errors.As(err, &plain):
		return classify(errdefs.ErrUnavailable, "registry %s cannot be reached from the pod VM: %w", registry, innermost(err))
	case errors.As(err, &plain):
		return classify(errdefs.ErrFailedPrecondition, "%w; to allow it, list %s in the adaptor's PULL_INSECURE_REGISTRIES", plain, plain.host)
	case errors.As(err, &errno):
		return fmt.Errorf("unpack: %w", err)
	}
	return classify(errdefs.ErrDataLoss, "what %s sent is not what was asked for, or damaged: %w", registry, err)
}

// innermost takes the requests' addresses off an error, which may have words of a
// redirect in them that are as good as a password.
func innermost(err error) error {
	var failed *url.Error
	for errors.As(err, &failed) {
		err = failed.Err
	}
	return err
}

// hasClass tells whether an error was classified where it arose.
func hasClass(err error) bool {
	for _, class := range []error{errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrFailedPrecondition, errdefs.ErrResourceExhausted, errdefs.ErrDataLoss, errdefs.ErrNotImplemented} {
		if errors.Is(err, class) {
			return true
		}
	}
	return false
}

// refused explains a registry's answer.
func (s *Store) refused(ref parsed, e *transport.Error) error {
	registry := ref.name.Context().RegistryStr()
	reason := reasonOf(e)
	switch {
	case e.StatusCode == http.StatusUnauthorized || e.StatusCode == http.StatusForbidden:
		// Read again only for the sentence.
		if creds, err := readCredentials(s.cfg.AuthFile); err == nil && creds.has(ref.name.Context().Name()) {
			return fmt.Errorf("%s refuses the credentials it was given (%s); mend those for %s in the adaptor's PULL_AUTH_FILE: %w", registry, reason, registry, errdefs.ErrPermissionDenied)
		}
		return fmt.Errorf("%s asks for credentials and none were given (%s); add some for %s to the adaptor's PULL_AUTH_FILE, or check the image's name: %w", registry, reason, registry, errdefs.ErrPermissionDenied)
	case e.StatusCode == http.StatusNotFound:
		return fmt.Errorf("%s does not have it (%s): %w", registry, reason, errdefs.ErrNotFound)
	case e.StatusCode == http.StatusBadRequest:
		return fmt.Errorf("%s does not take the reference (%s): %w", registry, reason, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("%s does not serve it now (%s): %w", registry, reason, errdefs.ErrUnavailable)
}

// reasonMax bounds what of a registry's words is repeated, bytes.
const reasonMax = 200

// reasonOf is what the registry says, on one line.
func reasonOf(e *transport.Error) string {
	reason := fmt.Sprintf("%d %s", e.StatusCode, http.StatusText(e.StatusCode))
	for _, d := range e.Errors {
		reason += "; " + string(d.Code)
		if d.Message != "" {
			reason += ": " + d.Message
		}
	}
	reason = strings.Join(strings.FieldsFunc(reason, func(r rune) bool { return r < ' ' || r == 0x7f }), " ")
	if len(reason) > reasonMax {
		reason = strings.ToValidUTF8(reason[:reasonMax], "") + "..."
	}
	return reason
}
