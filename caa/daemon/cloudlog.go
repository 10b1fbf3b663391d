// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/cloud"
)

// cloudLog is the log of a provider that calls a cloud's API. The zero value keeps
// silent until announce.
type cloudLog struct{ log atomic.Pointer[slog.Logger] }

// preparer is a provider that can ask for what all pods need to know.
type preparer interface {
	Prepare(context.Context) error
	Explain(context.Context, cloud.Size) (cloud.Choice, error)
}

// prepareTimeout bounds what is asked before the first pod comes; a service that is
// down holds up the start of the adaptor no longer.
const prepareTimeout = 20 * time.Second

// announce has p ask its service, so that the first pod does not wait for it, and says
// what pod VMs are, in the service's words. API calls are logged from then on.
func (l *cloudLog) announce(ctx context.Context, log *slog.Logger, p preparer, provider, service, machines string) {
	l.log.Store(log)
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	begin := time.Now()
	if err := p.Prepare(ctx); err != nil {
		log.Error(service+" cannot be asked; pods cannot be started until it can", logkey.Provider, provider, logkey.Error, err)
		return
	}
	choice, err := p.Explain(ctx, cloud.Size{})
	if err != nil {
		log.Error("pods that ask for nothing cannot be started", logkey.Provider, provider, logkey.Error, err)
		return
	}
	log.Info("pod VMs are "+machines, logkey.Provider, provider, "choice", choice,
		logkey.Duration, float64(time.Since(begin).Microseconds())/1000)
}

// call logs an API call. err nil: it was a success; code is the error's.
func (l *cloudLog) call(took time.Duration, err error, code string, attrs ...any) {
	log := l.log.Load()
	if log == nil {
		return
	}
	attrs = append(attrs, logkey.Duration, float64(took.Microseconds())/1000)
	if err != nil {
		attrs = append(attrs, "code", code, logkey.Error, err)
	}
	log.Debug("cloud call", attrs...)
}
