// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"strings"
)

// Error is an answer that is not a success, as the service gives it.
type Error struct {
	Status  int // HTTP status; 0: 400
	Code    string
	Message string
}

func (e *Error) Error() string { return e.Code + ": " + e.Message }

func errorf(status int, code, format string, args ...any) *Error {
	return &Error{Status: status, Code: code, Message: fmt.Sprintf(format, args...)}
}

// notFound is what the service says of an id it does not know; kind as in
// "InvalidVolume.NotFound: The volume 'vol-...' does not exist."
func notFound(code, noun string, ids ...string) *Error {
	if len(ids) > 1 {
		return errorf(400, code, "The %ss '%s' do not exist", noun, strings.Join(ids, ", "))
	}
	return errorf(400, code, "The %s '%s' does not exist", noun, ids[0])
}

// idWord is a prefix of ids, what the service calls such a thing, and its codes for
// an id that is unknown or no id. The texts are as seen in reports of users of the
// real service.
type idWord struct{ prefix, noun, unknown, malformed string }

var idWords = map[string]idWord{
	"i-":      {"i-", "instance ID", "InvalidInstanceID.NotFound", "InvalidInstanceID.Malformed"},
	"ami-":    {"ami-", "image id", "InvalidAMIID.NotFound", "InvalidAMIID.Malformed"},
	"subnet-": {"subnet-", "subnet ID", "InvalidSubnetID.NotFound", "InvalidSubnetID.Malformed"},
	"vpc-":    {"vpc-", "vpc ID", "InvalidVpcID.NotFound", "InvalidVpcID.Malformed"},
	"sg-":     {"sg-", "security group", "InvalidGroup.NotFound", "InvalidGroupId.Malformed"},
	"vol-":    {"vol-", "volume", "InvalidVolume.NotFound", "InvalidVolumeID.Malformed"},
	"eni-":    {"eni-", "networkInterface ID", "InvalidNetworkInterfaceID.NotFound", "InvalidNetworkInterfaceId.Malformed"},
	"snap-":   {"snap-", "snapshot", "InvalidSnapshot.NotFound", "InvalidSnapshotID.Malformed"},
	"sir-":    {"sir-", "spot instance request ID", "InvalidSpotInstanceRequestID.NotFound", "InvalidSpotInstanceRequestID.Malformed"},
	"lt-":     {"lt-", "launch template ID", "InvalidLaunchTemplateId.NotFound", "InvalidLaunchTemplateId.Malformed"},
}

// unknownID is the answer to ids of the kind that do not exist.
func unknownID(prefix string, ids ...string) *Error {
	w := idWords[prefix]
	switch prefix {
	case "ami-":
		return errorf(400, w.unknown, "The image id '[%s]' does not exist", strings.Join(ids, ", "))
	case "lt-":
		return errorf(400, w.unknown, "At least one of the launch templates specified in the request does not exist.")
	}
	return notFound(w.unknown, w.noun, ids...)
}

// wellFormed refuses an id that cannot be one of the kind: prefix and 8 or 17 hex digits.
func wellFormed(prefix string, ids ...string) error {
	for _, id := range ids {
		rest, ok := strings.CutPrefix(id, prefix)
		if !ok || (len(rest) != 8 && len(rest) != 17) || strings.Trim(rest, "0123456789abcdef") != "" {
			return errorf(400, idWords[prefix].malformed, "Invalid id: %q (expecting \"%s...\")", id, prefix)
		}
	}
	return nil
}

// writeError answers with err, which is an InternalError of the service unless it is
// an *Error.
func writeError(w http.ResponseWriter, version, requestID string, err error) {
	var e *Error
	if !errors.As(err, &e) {
		e = errorf(500, "InternalError", "An internal error has occurred: %v", err)
	}
	status := e.Status
	if status == 0 {
		status = http.StatusBadRequest
	}
	var msg, code strings.Builder
	xml.EscapeText(&code, []byte(e.Code))
	xml.EscapeText(&msg, []byte(e.Message))
	w.Header().Set("Content-Type", "text/xml;charset=UTF-8")
	w.WriteHeader(status)
	if version == stsVersion {
		fmt.Fprintf(w, `<ErrorResponse xmlns="https://sts.amazonaws.com/doc/%s/"><Error><Type>Sender</Type><Code>%s</Code>`+
			`<Message>%s</Message></Error><RequestId>%s</RequestId></ErrorResponse>`+"\n", version, code.String(), msg.String(), requestID)
		return
	}
	fmt.Fprintf(w, xml.Header+`<Response><Errors><Error><Code>%s</Code><Message>%s</Message></Error></Errors>`+
		`<RequestID>%s</RequestID></Response>`+"\n", code.String(), msg.String(), requestID)
}
