// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/podvm/metadata"
)

// wireServer is where Azure's hosts listen to their machines.
// https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
const wireServer = "http://168.63.129.16"

// readyRetry is between two attempts to tell Azure.
const readyRetry = time.Second

// goalState is the part of it that a report repeats.
type goalState struct {
	XMLName     xml.Name `xml:"GoalState"`
	Incarnation string   `xml:"Incarnation"`
	Container   string   `xml:"Container>ContainerId"`
	Instance    string   `xml:"Container>RoleInstanceList>RoleInstance>InstanceId"`
}

type health struct {
	XMLName     xml.Name `xml:"Health"`
	Incarnation string   `xml:"GoalStateIncarnation"`
	Container   string   `xml:"Container>ContainerId"`
	Instance    string   `xml:"Container>RoleInstanceList>Role>InstanceId"`
	State       string   `xml:"Container>RoleInstanceList>Role>Health>State"`
}

// ReportReady tells Azure that the machine is what it was to become, as its agent would:
// without it the making of a machine from a generalized image fails after some minutes
// (OSProvisioningTimedOut), while the machine runs. It tries until ctx ends.
// https://learn.microsoft.com/azure/virtual-machines/linux/no-agent
func ReportReady(ctx context.Context) error { return reportReady(ctx, wireServer) }

func reportReady(ctx context.Context, url string) error {
	c := metadata.New()
	defer c.Close()
	for {
		err := reportOnce(ctx, c, url)
		if err == nil || !errdefs.IsUnavailable(err) {
			return err
		}
		t := time.NewTimer(readyRetry)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
	}
}

func reportOnce(ctx context.Context, c *metadata.Client, url string) error {
	header := func() http.Header { return http.Header{"X-Ms-Version": {"2012-11-30"}} }
	doc, err := c.Do(ctx, http.MethodGet, url+"/machine/?comp=goalstate", header(), nil)
	if err != nil {
		return err
	}
	var g goalState
	if err := xml.Unmarshal(doc, &g); err != nil || g.Incarnation == "" || g.Container == "" || g.Instance == "" {
		return errors.Join(invalid("GET /machine/: the answer is no goal state"), err)
	}
	report, err := xml.Marshal(health{Incarnation: g.Incarnation, Container: g.Container, Instance: g.Instance, State: "Ready"})
	if err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	h := header()
	h.Set("Content-Type", "text/xml;charset=utf-8")
	_, err = c.Do(ctx, http.MethodPost, url+"/machine?comp=health", h, bytes.NewReader(report))
	return err
}
