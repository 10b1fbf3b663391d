// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"fmt"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// missing tells what of want is not in got: a field that want has must be in got with
// the same value, a message must hold as much, a list must have each of the elements.
// Empty: nothing.
func missing(path string, got, want protoreflect.Message) (diff string) {
	want.Range(func(f protoreflect.FieldDescriptor, w protoreflect.Value) bool {
		at := path + string(f.Name())
		g := got.Get(f)
		switch {
		case f.IsMap():
			w.Map().Range(func(k protoreflect.MapKey, w protoreflect.Value) bool {
				if !g.Map().Has(k) {
					diff = fmt.Sprintf("%s has no %v", at, k)
				} else {
					diff = missingValue(fmt.Sprintf("%s[%v]", at, k), f.MapValue(), g.Map().Get(k), w)
				}
				return diff == ""
			})
		case f.IsList():
			for i := range w.List().Len() {
				if diff = missingElement(at, f, g.List(), w.List().Get(i)); diff != "" {
					break
				}
			}
		case f.HasPresence() && !got.Has(f):
			diff = at + " is not set"
		default:
			diff = missingValue(at, f, g, w)
		}
		return diff == ""
	})
	return diff
}

func missingElement(at string, f protoreflect.FieldDescriptor, got protoreflect.List, want protoreflect.Value) string {
	for i := range got.Len() {
		if missingValue(at, f, got.Get(i), want) == "" {
			return ""
		}
	}
	return fmt.Sprintf("none of the %d of %s is %v", got.Len(), at, want)
}

func missingValue(at string, f protoreflect.FieldDescriptor, got, want protoreflect.Value) string {
	if f.Message() != nil {
		return missing(at+".", got.Message(), want.Message())
	}
	if !got.Equal(want) {
		return fmt.Sprintf("%s is %v, want %v", at, got, want)
	}
	return ""
}
