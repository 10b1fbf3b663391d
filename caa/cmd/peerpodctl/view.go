// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/kata-remote/kata-remote/caa/adminpb"
)

// sandboxView is a sandbox in --output json. Its keys are a promise.
type sandboxView struct {
	ID           string       `json:"id"`
	State        string       `json:"state"`
	Reason       string       `json:"reason,omitempty"`
	PodNamespace string       `json:"podNamespace"`
	PodName      string       `json:"podName"`
	NetNS        string       `json:"netns"`
	AgentSocket  string       `json:"agentSocket"`
	Connections  int32        `json:"connections"`
	Provider     string       `json:"provider"`
	InstanceName string       `json:"instanceName"`
	InstanceID   string       `json:"instanceID"`
	InstanceType string       `json:"instanceType,omitempty"`
	VCPUs        uint32       `json:"vcpus"`
	MemoryMiB    uint32       `json:"memoryMiB"`
	Address      string       `json:"address"`
	VNI          uint32       `json:"vni"`
	VXLANPort    uint32       `json:"vxlanPort"`
	TunnelDevice string       `json:"tunnelDevice"`
	Tunnels      []tunnelView `json:"tunnels"`
	Created      time.Time    `json:"created"`
	Changed      time.Time    `json:"changed"`
	Lease        *time.Time   `json:"lease,omitempty"`
	Steps        []stepView   `json:"steps"`
}

// tunnelView is one of a sandbox's tunnels; sandboxView has the first one's too.
type tunnelView struct {
	Interface string `json:"interface"`
	Device    string `json:"device"`
	VNI       uint32 `json:"vni"`
}

type stepView struct {
	Name string  `json:"name"`
	MS   float64 `json:"ms"`
}

func asJSON(sandboxes []*adminpb.Sandbox) (string, error) {
	views := make([]sandboxView, 0, len(sandboxes))
	for _, s := range sandboxes {
		v := sandboxView{
			ID: s.Id, State: s.State, Reason: s.Reason, PodNamespace: s.PodNamespace, PodName: s.PodName,
			NetNS: s.Netns, AgentSocket: s.AgentSocket, Connections: s.Connections,
			Provider: s.Provider, InstanceName: s.InstanceName, InstanceID: s.InstanceId, InstanceType: s.InstanceType,
			VCPUs: s.Vcpus, MemoryMiB: s.MemoryMib, Address: s.Address,
			VNI: s.Vni, VXLANPort: s.VxlanPort, TunnelDevice: s.TunnelDevice,
			Created: time.Unix(0, s.CreatedUnixNano).UTC(), Changed: time.Unix(0, s.ChangedUnixNano).UTC(),
			Tunnels: []tunnelView{}, Steps: []stepView{},
		}
		for _, t := range s.Tunnels {
			v.Tunnels = append(v.Tunnels, tunnelView{t.Interface, t.Device, t.Vni})
		}
		if s.LeaseUnixNano != 0 {
			lease := time.Unix(0, s.LeaseUnixNano).UTC()
			v.Lease = &lease
		}
		for _, st := range s.Steps {
			v.Steps = append(v.Steps, stepView{st.Name, st.Milliseconds})
		}
		views = append(views, v)
	}
	b, err := json.MarshalIndent(views, "", "  ")
	return string(b) + "\n", err
}

func list(sandboxes []*adminpb.Sandbox, now time.Time) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "SANDBOX\tPOD\tSTATE\tINSTANCE\tADDRESS\tVNI\tAGE\tSTEPS (ms)")
	for _, s := range sandboxes {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\n",
			short(s.Id), pod(s), s.State, orDash(s.InstanceId), orDash(s.Address), s.Vni, age(s.CreatedUnixNano, now), steps(s))
	}
	w.Flush()
	return b.String()
}

func show(s *adminpb.Sandbox, now time.Time) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	line := func(key, format string, a ...any) { fmt.Fprintf(w, "%s\t%s\n", key, fmt.Sprintf(format, a...)) }
	line("sandbox", "%s", s.Id)
	line("pod", "%s", pod(s))
	line("state", "%s, since %s", s.State, age(s.ChangedUnixNano, now))
	if s.Reason != "" {
		line("reason", "%s", s.Reason)
	}
	if s.LeaseUnixNano != 0 {
		line("lease", "deleted at %s unless somebody asks for it", time.Unix(0, s.LeaseUnixNano).Format(time.RFC3339))
	}
	line("age", "%s", age(s.CreatedUnixNano, now))
	line("instance", "%s (%s, %s)", orDash(s.InstanceId), s.InstanceName, s.Provider)
	size := fmt.Sprintf("%d vCPUs, %d MiB", s.Vcpus, s.MemoryMib)
	if s.InstanceType != "" {
		size = s.InstanceType + ", " + size
	}
	line("size", "%s", size)
	line("address", "%s", orDash(s.Address))
	for _, t := range s.Tunnels {
		line("tunnel "+t.Interface, "%s in %s, VNI %d, UDP port %d", t.Device, s.Netns, t.Vni, s.VxlanPort)
	}
	line("agent socket", "%s, %d connections", s.AgentSocket, s.Connections)
	for _, st := range s.Steps {
		line("step "+st.Name, "%.1f ms", st.Milliseconds)
	}
	w.Flush()
	return b.String()
}

func pod(s *adminpb.Sandbox) string {
	if s.PodNamespace == "" {
		return s.PodName
	}
	return s.PodNamespace + "/" + s.PodName
}

// short is an id as crictl shows it.
func short(id string) string { return id[:min(13, len(id))] }

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func age(since int64, now time.Time) string {
	d := now.Sub(time.Unix(0, since))
	if d < 0 {
		d = 0
	}
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%dd", d/(24*time.Hour))
	case d >= time.Minute:
		return strings.TrimSuffix(d.Truncate(time.Minute).String(), "0s")
	}
	return d.Truncate(time.Second).String()
}

func steps(s *adminpb.Sandbox) string {
	parts := make([]string, 0, len(s.Steps))
	for _, st := range s.Steps {
		parts = append(parts, fmt.Sprintf("%s %.0f", st.Name, st.Milliseconds))
	}
	return orDash(strings.Join(parts, ", "))
}
