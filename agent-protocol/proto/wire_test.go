// SPDX-License-Identifier: Apache-2.0

package proto

import (
	"bufio"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/hypervisorpb"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/agent-protocol/typespb"
)

// TestWireMatchesKata compares every message, field, enum value and call of our
// definitions with the table of facts, both ways: nothing missing, nothing added,
// no number or type changed.
func TestWireMatchesKata(t *testing.T) {
	want := readTable(t, "testdata/kata-agent-wire.tsv")
	got := map[string]string{}
	for _, f := range []protoreflect.FileDescriptor{
		agentpb.File_agent_protocol_proto_agent_proto,
		agentpb.File_agent_protocol_proto_oci_proto,
		agentpb.File_agent_protocol_proto_csi_proto,
		agentpb.File_agent_protocol_proto_health_proto,
		typespb.File_agent_protocol_proto_types_proto,
		hypervisorpb.File_agent_protocol_proto_hypervisor_proto,
	} {
		describeFile(f, got)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("our definitions differ from the kata-agent protocol (-table +ours):\n%s", diff)
	}
	if n := countPrefix(got, "rpc grpc."); n != 44 {
		t.Errorf("%d calls of grpc.AgentService and grpc.Health, want 44", n)
	}
}

// TestExtensionIsApart checks that our own additions stay out of kata's packages:
// a stock agent must be able to answer them with Unimplemented, by service name.
func TestExtensionIsApart(t *testing.T) {
	f := podvmpb.File_agent_protocol_proto_podvm_proto
	if got := f.Package(); got != "peerpod.podvm.v1" {
		t.Errorf("package of the extension service = %q", got)
	}
	for i := range f.Imports().Len() {
		t.Errorf("podvm.proto imports %s: messages of kata must not become part of it", f.Imports().Get(i).Path())
	}
}

func countPrefix(m map[string]string, prefix string) (n int) {
	for k := range maps.Keys(m) {
		if strings.HasPrefix(k, prefix) {
			n++
		}
	}
	return n
}

// readTable reads the table into the form describeFile makes: what it is and who
// owns it, to its number and type. Messages without fields stand in it by name.
func readTable(t *testing.T, name string) map[string]string {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m := map[string]string{}
	for s, line := bufio.NewScanner(f), 1; s.Scan(); line++ {
		c := strings.Split(s.Text(), "\t")
		if len(c) != 5 {
			t.Fatalf("%s:%d: %d columns, want 5", name, line, len(c))
		}
		kind, owner, number, id, typ := c[0], c[1], c[2], c[3], c[4]
		switch kind {
		case "kind": // heading
		case "enum":
			m["enum "+owner+"."+id] = number
		case "field":
			m["message "+owner] = ""
			m["field "+owner+"."+id] = number + " " + typ
		case "message":
			m["message "+owner] = ""
		case "rpc":
			m["rpc "+owner+"."+id] = typ
		default:
			t.Fatalf("%s:%d: unknown kind %q", name, line, kind)
		}
	}
	if len(m) < 400 {
		t.Fatalf("%s holds %d entries: it is not the whole table", name, len(m))
	}
	return m
}

func describeFile(f protoreflect.FileDescriptor, m map[string]string) {
	for i := range f.Enums().Len() {
		describeEnum(f.Enums().Get(i), m)
	}
	for i := range f.Messages().Len() {
		describeMessage(f.Messages().Get(i), m)
	}
	for i := range f.Services().Len() {
		s := f.Services().Get(i)
		for j := range s.Methods().Len() {
			c := s.Methods().Get(j)
			typ := fmt.Sprintf("%s -> %s", c.Input().FullName(), c.Output().FullName())
			if c.IsStreamingClient() || c.IsStreamingServer() {
				typ += " (stream)"
			}
			m["rpc "+string(c.FullName())] = typ
		}
	}
}

func describeEnum(e protoreflect.EnumDescriptor, m map[string]string) {
	for i := range e.Values().Len() {
		v := e.Values().Get(i)
		m["enum "+string(e.FullName())+"."+string(v.Name())] = strconv.Itoa(int(v.Number()))
	}
}

func describeMessage(d protoreflect.MessageDescriptor, m map[string]string) {
	m["message "+string(d.FullName())] = ""
	for i := range d.Enums().Len() {
		describeEnum(d.Enums().Get(i), m)
	}
	for i := range d.Messages().Len() {
		if sub := d.Messages().Get(i); !sub.IsMapEntry() {
			describeMessage(sub, m)
		}
	}
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		m["field "+string(f.FullName())] = fmt.Sprintf("%d %s", f.Number(), fieldType(f))
	}
}

func fieldType(f protoreflect.FieldDescriptor) string {
	if f.IsMap() {
		return fmt.Sprintf("map<%s,%s>", kindName(f.MapKey()), kindName(f.MapValue()))
	}
	name := kindName(f)
	switch o := f.ContainingOneof(); {
	case f.IsList():
		return "repeated " + name
	case f.HasOptionalKeyword():
		return "optional " + name
	case o != nil:
		return "oneof " + string(o.Name()) + " " + name
	}
	return name
}

func kindName(f protoreflect.FieldDescriptor) string {
	switch f.Kind() {
	case protoreflect.MessageKind:
		return string(f.Message().FullName())
	case protoreflect.EnumKind:
		return "enum " + string(f.Enum().FullName())
	}
	return f.Kind().String()
}

// TestServiceNames: ttrpc routes by service name, so these strings are the contract.
func TestServiceNames(t *testing.T) {
	var got []string
	for _, f := range []protoreflect.FileDescriptor{
		agentpb.File_agent_protocol_proto_agent_proto,
		agentpb.File_agent_protocol_proto_health_proto,
		hypervisorpb.File_agent_protocol_proto_hypervisor_proto,
		podvmpb.File_agent_protocol_proto_podvm_proto,
	} {
		for i := range f.Services().Len() {
			got = append(got, string(f.Services().Get(i).FullName()))
		}
	}
	slices.Sort(got)
	want := []string{"grpc.AgentService", "grpc.Health", "hypervisor.Hypervisor", "peerpod.podvm.v1.PodVM"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("service names (-want +got):\n%s", diff)
	}
}
