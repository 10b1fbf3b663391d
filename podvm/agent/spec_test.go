// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

var update = flag.Bool("update", false, "write golden files")

// fill gives every field of a message, and of those in it, a value of its own.
func fill(m protoreflect.Message, next *int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.IsMap():
			*next++
			m.Mutable(f).Map().Set(protoreflect.ValueOfString(fmt.Sprintf("key%d", *next)).MapKey(), protoreflect.ValueOfString(fmt.Sprintf("value%d", *next)))
		case f.IsList() && f.Kind() == protoreflect.MessageKind:
			fill(m.Mutable(f).List().AppendMutable().Message(), next)
		case f.IsList():
			m.Mutable(f).List().Append(scalar(f, next))
		case f.Kind() == protoreflect.MessageKind:
			fill(m.Mutable(f).Message(), next)
		default:
			m.Set(f, scalar(f, next))
		}
	}
}

func scalar(f protoreflect.FieldDescriptor, next *int) protoreflect.Value {
	*next++
	switch f.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(fmt.Sprintf("%s%d", f.Name(), *next))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(int64(*next))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(uint64(*next))
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(*next))
	}
	panic(fmt.Sprintf("%s is of the kind %s", f.FullName(), f.Kind()))
}

// Every field arrives in the place of the runtime specification that has its name.
// Each has a value of its own, so that none can pass for another.
func TestSpecGolden(t *testing.T) {
	spec, n := &agentpb.Spec{}, 0
	fill(spec.ProtoReflect(), &n)
	if n < 110 {
		t.Fatalf("only %d fields were filled", n)
	}
	got, err := json.MarshalIndent(toSpec(spec), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	const golden = "testdata/spec.golden.json"
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// Nothing is lost but what has no place: whatever is changed shows.
	clearEach(t, spec.ProtoReflect(), spec, string(got))
}

// notCarried have no place in a Linux container's specification.
var notCarried = map[string]bool{"grpc.Solaris.dummy": true, "grpc.Windows.dummy": true}

// clearEach clears one field after the other and checks that the result changes.
func clearEach(t *testing.T, m protoreflect.Message, whole proto.Message, before string) {
	t.Helper()
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.Kind() == protoreflect.MessageKind && !f.IsMap() {
			if f.IsList() {
				clearEach(t, v.List().Get(0).Message(), whole, before)
			} else {
				clearEach(t, v.Message(), whole, before)
			}
			return true
		}
		if f.IsMap() || f.IsList() {
			v = proto.Clone(m.Interface()).ProtoReflect().Mutable(f) // what Range gives cannot be put back
		}
		m.Clear(f)
		after, err := json.MarshalIndent(toSpec(whole.(*agentpb.Spec)), "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if same := string(after)+"\n" == before; same != notCarried[string(f.FullName())] {
			t.Errorf("%s: lost: %v", f.FullName(), same)
		}
		m.Set(f, v)
		return true
	})
}

// What a message does not say, the specification does not say either.
func TestEmptySpecSaysNothing(t *testing.T) {
	got, err := json.Marshal(toSpec(&agentpb.Spec{Linux: &agentpb.Linux{Resources: &agentpb.LinuxResources{
		CPU: &agentpb.LinuxCPU{}, Memory: &agentpb.LinuxMemory{}, BlockIO: &agentpb.LinuxBlockIO{}, Network: &agentpb.LinuxNetwork{},
	}}}))
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"ociVersion":"","linux":{"resources":{"memory":{},"cpu":{},"blockIO":{},"network":{}}}}`; string(got) != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}
