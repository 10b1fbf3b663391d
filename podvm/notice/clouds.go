// SPDX-License-Identifier: Apache-2.0

package notice

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/podvm/metadata"
)

// ec2TokenTTL keeps the questions to one per interval, nearly always.
const ec2TokenTTL = 10 * time.Minute

// EC2 watches the notices of a spot instance on EC2. url is the metadata service's; "":
// the real one.
func EC2(url string) *Watch {
	c := metadata.New()
	return newWatch(&ec2{metadata.EC2{Client: c, URL: url, TTL: ec2TokenTTL}})
}

type ec2 struct{ metadata.EC2 }

func (e *ec2) close() { e.Client.Close() }

func (e *ec2) subject(ctx context.Context) (bool, error) {
	b, err := e.Get(ctx, "/latest/meta-data/instance-life-cycle")
	return string(b) == "spot", err
}

// poll reads both of EC2's announcements: 404 says that there is none.
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/rebalance-recommendations.html
func (e *ec2) poll(ctx context.Context) ([]Notice, error) {
	var out []Notice
	var action struct {
		Action string    `json:"action"` // terminate, stop or hibernate
		Time   time.Time `json:"time"`
	}
	switch there, err := e.document(ctx, "/latest/meta-data/spot/instance-action", &action); {
	case err != nil:
		return nil, err
	case there:
		out = append(out, Notice{
			ID:   "spot/" + action.Action + "/" + action.Time.Format(time.RFC3339),
			Kind: podvmpb.NoticeKind_NOTICE_KIND_TAKEN, Deadline: action.Time, Reason: "spot interruption",
		})
	}
	var advice struct {
		NoticeTime time.Time `json:"noticeTime"`
	}
	switch there, err := e.document(ctx, "/latest/meta-data/events/recommendations/rebalance", &advice); {
	case err != nil && len(out) == 0:
		return nil, err
	case there && len(out) == 0: // what is certain makes advice of no use
		out = append(out, Notice{
			ID:   "rebalance/" + advice.NoticeTime.Format(time.RFC3339),
			Kind: podvmpb.NoticeKind_NOTICE_KIND_AT_RISK, Reason: "rebalance recommendation",
		})
	}
	return out, nil
}

// document reads one of JSON; false: there is none.
func (e *ec2) document(ctx context.Context, path string, into any) (bool, error) {
	b, err := e.Get(ctx, path)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	return err == nil, err
}

// Azure watches the scheduled events of a spot instance on Azure. url is the metadata
// service's; "": the real one.
func Azure(url string) *Watch {
	if url == "" {
		url = metadata.URL
	}
	return newWatch(&azure{client: metadata.New(), url: url})
}

type azure struct {
	client *metadata.Client
	url    string
	name   string // the machine's
}

func (a *azure) close() { a.client.Close() }

func (a *azure) get(ctx context.Context, path string) ([]byte, error) {
	return a.client.Do(ctx, http.MethodGet, a.url+"/metadata/"+path, http.Header{"Metadata": {"true"}}, nil)
}

func (a *azure) subject(ctx context.Context) (bool, error) {
	text := func(name string) (string, error) {
		b, err := a.get(ctx, "instance/compute/"+name+"?api-version=2021-01-01&format=text")
		return strings.TrimSpace(string(b)), err
	}
	priority, err := text("priority")
	if err != nil || !strings.EqualFold(priority, "Spot") {
		return false, err
	}
	a.name, err = text("name")
	return true, err
}

// taken are the events after which nothing of the machine's memory is left, and with it
// nothing of the pod. The others only stop it for a moment.
// https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
var taken = map[string]string{
	"Preempt": "spot eviction", "Terminate": "deletion", "Reboot": "reboot", "Redeploy": "move to other hardware",
}

// poll reads the scheduled events. The first answer may take two minutes: it switches the
// service on for the machine. They are for all machines of a placement group.
func (a *azure) poll(ctx context.Context) ([]Notice, error) {
	b, err := a.get(ctx, "scheduledevents?api-version=2020-07-01")
	if err != nil {
		return nil, err
	}
	var doc struct {
		Events []struct {
			EventID     string   `json:"EventId"`
			EventType   string   `json:"EventType"`
			Resources   []string `json:"Resources"`
			EventStatus string   `json:"EventStatus"`
			NotBefore   string   `json:"NotBefore"` // empty once it has begun
		} `json:"Events"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return nil, fmt.Errorf("scheduled events: %w", err)
	}
	var out []Notice
	for _, e := range doc.Events {
		reason, ok := taken[e.EventType]
		if !ok || !slices.ContainsFunc(e.Resources, func(r string) bool { return strings.EqualFold(r, a.name) }) {
			continue
		}
		n := Notice{ID: e.EventID, Kind: podvmpb.NoticeKind_NOTICE_KIND_TAKEN, Reason: reason}
		if at, err := time.Parse(time.RFC1123, e.NotBefore); err == nil {
			n.Deadline = at
		} else if e.EventStatus == "Started" {
			n.Deadline = time.Now()
		}
		out = append(out, n)
	}
	return out, nil
}
