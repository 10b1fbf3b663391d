// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/containerd/errdefs"
)

// reach is how much of what may be tried is of no use after an error.
type reach int

const (
	reachAll   reach = iota // any other attempt would fail as well
	reachPlace              // this size in this zone on this market
	reachSize               // this size on this market, in all zones: quotas are regional
)

// code is what an error code of Resource Manager means. One table for all calls:
// codes mean the same wherever they come from, be it a reply or the end of an
// operation.
type code struct {
	class error
	reach reach
	hint  string // what to change; "" where Azure's own text says it
}

// codes: learn.microsoft.com, "Resolve common errors in Azure" (Resource Manager
// troubleshooting), "Troubleshoot Azure VM allocation failures", and the error codes
// that Karpenter's Azure provider knows. A code that is missing here has the class of
// its HTTP status, see classOfStatus.
var codes = map[string]code{
	"SkuNotAvailable":                          {errdefs.ErrResourceExhausted, reachPlace, ""},
	"AllocationFailed":                         {errdefs.ErrResourceExhausted, reachPlace, ""},
	"ZonalAllocationFailed":                    {errdefs.ErrResourceExhausted, reachPlace, ""},
	"OverconstrainedAllocationRequest":         {errdefs.ErrResourceExhausted, reachPlace, ""},
	"OverconstrainedZonalAllocationRequest":    {errdefs.ErrResourceExhausted, reachPlace, ""},
	"AllocationTimeout":                        {errdefs.ErrResourceExhausted, reachPlace, ""},
	"SpotPriceGreaterThanProvidedMaxPrice":     {errdefs.ErrResourceExhausted, reachPlace, ""},
	"QuotaExceeded":                            {errdefs.ErrResourceExhausted, reachSize, "ask for more quota for this family (`az quota`), or add sizes of another family to AZURE_INSTANCE_SIZES"},
	codeNotAllowed:                             {errdefs.ErrResourceExhausted, reachSize, "if it is a quota, ask for more (`az quota`), or add sizes of another family to AZURE_INSTANCE_SIZES"},
	"SubnetIsFull":                             {errdefs.ErrResourceExhausted, reachAll, "set AZURE_SUBNET_ID to a larger subnet"},
	"PublicIPCountLimitReached":                {errdefs.ErrResourceExhausted, reachAll, "set USE_PUBLIC_IP to false, or ask for more quota"},
	"ResourceQuotaExceeded":                    {errdefs.ErrResourceExhausted, reachAll, "the resource group is full; set AZURE_RESOURCE_GROUP to another"},
	"AuthorizationFailed":                      {errdefs.ErrPermissionDenied, reachAll, "give the identity a role with this action"},
	"LinkedAuthorizationFailed":                {errdefs.ErrPermissionDenied, reachAll, "give the identity a role with this action on the linked resource"},
	"LinkedAccessCheckFailed":                  {errdefs.ErrPermissionDenied, reachAll, "give the identity a role on the linked resource"},
	"AuthenticationFailed":                     {errdefs.ErrPermissionDenied, reachAll, credentialHint},
	"InvalidAuthenticationToken":               {errdefs.ErrPermissionDenied, reachAll, credentialHint},
	"InvalidAuthenticationTokenTenant":         {errdefs.ErrPermissionDenied, reachAll, "AZURE_TENANT_ID is not the subscription's tenant"},
	"ExpiredAuthenticationToken":               {errdefs.ErrPermissionDenied, reachAll, credentialHint},
	"RequestDisallowedByPolicy":                {errdefs.ErrPermissionDenied, reachAll, "a policy of the subscription forbids it"},
	"ScopeLocked":                              {errdefs.ErrPermissionDenied, reachAll, "remove the lock from AZURE_RESOURCE_GROUP"},
	"ReadOnlyDisabledSubscription":             {errdefs.ErrPermissionDenied, reachAll, "the subscription is disabled"},
	"SubscriptionNotFound":                     {errdefs.ErrInvalidArgument, reachAll, "set AZURE_SUBSCRIPTION_ID to a subscription that the identity may see"},
	"InvalidSubscriptionId":                    {errdefs.ErrInvalidArgument, reachAll, "correct AZURE_SUBSCRIPTION_ID"},
	"ResourceGroupNotFound":                    {errdefs.ErrInvalidArgument, reachAll, "correct AZURE_RESOURCE_GROUP or create the group"},
	"ResourceGroupBeingDeleted":                {errdefs.ErrFailedPrecondition, reachAll, "AZURE_RESOURCE_GROUP is being deleted"},
	"LocationNotAvailableForResourceType":      {errdefs.ErrInvalidArgument, reachAll, "correct AZURE_REGION"},
	"InvalidLocation":                          {errdefs.ErrInvalidArgument, reachAll, "correct AZURE_REGION"},
	"NoRegisteredProviderFound":                {errdefs.ErrInvalidArgument, reachAll, "correct AZURE_REGION"},
	"AvailabilityZoneNotSupported":             {errdefs.ErrInvalidArgument, reachAll, "correct AZURE_ZONES"},
	"MissingSubscriptionRegistration":          {errdefs.ErrFailedPrecondition, reachAll, "run `az provider register` for Microsoft.Compute and Microsoft.Network"},
	"ImageNotFound":                            {errdefs.ErrInvalidArgument, reachAll, "correct AZURE_IMAGE_ID"},
	"GalleryImageNotFound":                     {errdefs.ErrInvalidArgument, reachAll, "correct AZURE_IMAGE_ID, and see that the image is replicated to AZURE_REGION"},
	"PlatformImageNotFound":                    {errdefs.ErrInvalidArgument, reachAll, "correct AZURE_IMAGE_ID"},
	"InvalidResourceReference":                 {errdefs.ErrInvalidArgument, reachAll, "correct AZURE_SUBNET_ID or AZURE_NSG_ID, both must be in AZURE_REGION"},
	"ReferencedResourceNotProvisioned":         {errdefs.ErrUnavailable, reachAll, ""},
	"InvalidParameter":                         {errdefs.ErrInvalidArgument, reachAll, ""},
	"BadRequest":                               {errdefs.ErrInvalidArgument, reachAll, ""},
	"InvalidRequestFormat":                     {errdefs.ErrInvalidArgument, reachAll, ""},
	"VMSizeDoesntSupportAcceleratedNetworking": {errdefs.ErrInvalidArgument, reachAll, ""},
	"PropertyChangeNotAllowed":                 {errdefs.ErrAlreadyExists, reachAll, ""},
	"OSProvisioningTimedOut":                   {errdefs.ErrFailedPrecondition, reachAll, "the image never told Azure that it is up; set AZURE_IMAGE_ID to a pod VM image"},
	"OSProvisioningInternalError":              {errdefs.ErrUnavailable, reachAll, ""},
	"OSProvisioningClientError":                {errdefs.ErrFailedPrecondition, reachAll, "set AZURE_IMAGE_ID to a pod VM image"},
	"VMStartTimedOut":                          {errdefs.ErrUnavailable, reachAll, ""},
	"InternalExecutionError":                   {errdefs.ErrUnavailable, reachAll, ""},
	"InternalOperationError":                   {errdefs.ErrUnavailable, reachAll, ""},
	"NetworkingInternalOperationError":         {errdefs.ErrUnavailable, reachAll, ""},
	"AnotherOperationInProgress":               {errdefs.ErrUnavailable, reachAll, ""},
	"OperationPreempted":                       {errdefs.ErrUnavailable, reachAll, ""},
	"RetryableError":                           {errdefs.ErrUnavailable, reachAll, ""},
	"RetryableErrorDueToAnotherOperation":      {errdefs.ErrUnavailable, reachAll, ""},
	"TooManyRequests":                          {errdefs.ErrUnavailable, reachAll, ""},
	"SubscriptionRequestsThrottled":            {errdefs.ErrUnavailable, reachAll, ""},
	codeNicReserved:                            {errdefs.ErrUnavailable, reachAll, ""},
}

const (
	credentialHint = "correct AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET, or the identity's federation"
	// codeNicReserved: the interface of a VM that could not be made is kept for it
	// for 180 s and cannot be deleted before.
	codeNicReserved = "NicReservedForAnotherVm"
	codeNotAllowed  = "OperationNotAllowed" // a quota, or a state
)

// stillUsed are codes with which a deletion says: not yet. What holds the thing is
// going itself.
var stillUsed = map[string]bool{
	codeNicReserved:                        true,
	"NicInUse":                             true,
	"InUseNetworkInterfaceCannotBeDeleted": true,
	"NicInUseWithPrivateEndpoint":          true,
	"PublicIPAddressCannotBeDeleted":       true,
	"PublicIPAddressInUse":                 true,
	"OperationNotAllowed":                  true, // a disk that is attached
	"AttachDiskWhileBeingDetached":         true,
	"AnotherOperationInProgress":           true,
	"OperationPreempted":                   true,
	"RetryableError":                       true,
	"RetryableErrorDueToAnotherOperation":  true,
	"Conflict":                             true,
}

// notThere are the codes of a 404 that mean that the thing itself does not exist. A
// 404 with another code, or none, comes from something on the way.
var notThere = map[string]bool{
	"ResourceNotFound": true, "NotFound": true, "ResourceGroupNotFound": true, "ParentResourceNotFound": true,
}

// apiError is an answer of Resource Manager that is no success.
type apiError struct {
	status  int // 0: the end of an operation
	code    string
	message string
	// after is when the service wants to be asked again; zero: it did not say.
	after time.Time
}

func (e *apiError) Error() string {
	name := e.code
	if name == "" {
		name = fmt.Sprintf("HTTP %d %s", e.status, http.StatusText(e.status))
	}
	s := name
	if e.message != "" {
		s += ": " + e.message
	}
	if h := codes[e.code].hint; h != "" && e.status != http.StatusTooManyRequests {
		s += "; " + h
	}
	return s
}

// Unwrap gives the class.
func (e *apiError) Unwrap() error {
	if e.status == http.StatusTooManyRequests {
		return errdefs.ErrUnavailable
	}
	if e.code == codeNotAllowed && !strings.Contains(strings.ToLower(e.message), "quota") {
		// Also said of what the resource is not in the state for.
		return classOfStatus(http.StatusConflict)
	}
	if e.status == http.StatusNotFound && notThere[e.code] && e.code != "ResourceGroupNotFound" {
		return errdefs.ErrNotFound
	}
	if c, ok := codes[e.code]; ok {
		return c.class
	}
	return classOfStatus(e.status)
}

// classOfStatus is for codes that nobody has listed. nil: unknown.
func classOfStatus(status int) error {
	switch {
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	case status == http.StatusBadRequest:
		return errdefs.ErrInvalidArgument
	case status == http.StatusRequestTimeout, status == http.StatusConflict, status >= 500:
		return errdefs.ErrUnavailable
	}
	return nil
}

// missing tells whether an error says that the resource does not exist.
func missing(err error) bool {
	var e *apiError
	return errors.As(err, &e) && e.status == http.StatusNotFound && notThere[e.code]
}

// holding tells whether a deletion was refused because of something that passes.
func holding(err error) bool {
	var e *apiError
	return errors.As(err, &e) && stillUsed[e.code] && e.status != http.StatusTooManyRequests
}

func reachOf(err error) (reach, bool) {
	var e *apiError
	if !errors.As(err, &e) || !errdefs.IsResourceExhausted(err) {
		return reachAll, false
	}
	return codes[e.code].reach, true
}

// odata is how Resource Manager writes an error.
type odata struct {
	Code    string  `json:"code"`
	Message string  `json:"message"`
	Details []odata `json:"details"`
}

// best is the part of an error that says most: codes such as DeploymentFailed only
// wrap others.
func (o odata) best() odata {
	if _, ok := codes[o.Code]; ok {
		return o
	}
	for _, d := range o.Details {
		if b := d.best(); b.Code != "" {
			if _, ok := codes[b.Code]; ok {
				return b
			}
		}
	}
	return o
}

// maxMessage keeps an answer's text fit for an event.
const maxMessage = 1000

func newAPIError(status int, o odata, after time.Time) *apiError {
	o = o.best()
	msg := strings.TrimSpace(spaces.ReplaceAllString(o.Message, " "))
	if len(msg) > maxMessage {
		msg = strings.ToValidUTF8(msg[:maxMessage], "") + "..."
	}
	return &apiError{status: status, code: o.Code, message: strings.TrimSuffix(msg, "."), after: after}
}

var spaces = regexp.MustCompile(`\s+`)

// replyError reads an unsuccessful reply.
func replyError(resp *http.Response, body []byte, after time.Time) error {
	var doc struct {
		Error odata `json:"error"`
		odata       // some answers lack the outer object
	}
	if json.Unmarshal(body, &doc) != nil {
		return newAPIError(resp.StatusCode, odata{}, after) // HTML of a proxy, for one
	}
	if doc.Error.Code == "" {
		doc.Error = doc.odata
	}
	return newAPIError(resp.StatusCode, doc.Error, after)
}

// classed is an error of ours with a class.
type classed struct {
	error
	class error
}

func (e classed) Unwrap() []error { return []error{e.error, e.class} }

// sendError gives a class to an error that came instead of a reply: the service could
// not be reached, or no token was to be had.
func sendError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var authFailed *azidentity.AuthenticationFailedError
	if errors.As(err, &authFailed) {
		return tokenError(authFailed)
	}
	for _, class := range []error{errdefs.ErrPermissionDenied, errdefs.ErrInvalidArgument} {
		if errors.Is(err, class) {
			return err
		}
	}
	return classed{err, errdefs.ErrUnavailable}
}

var aadCode = regexp.MustCompile(`AADSTS\d+[^"\\\r\n]*`)

// tokenError says in one line why the authority gave no token. The SDK's own text
// holds the whole request and reply.
func tokenError(e *azidentity.AuthenticationFailedError) error {
	if r := e.RawResponse; r != nil && (r.StatusCode >= 500 || r.StatusCode == http.StatusTooManyRequests) {
		return fmt.Errorf("the authority gave no token: HTTP %d: %w", r.StatusCode, errdefs.ErrUnavailable)
	}
	why := aadCode.FindString(e.Error())
	if why == "" {
		if e.RawResponse == nil {
			return classed{fmt.Errorf("the authority gave no token: %w", e), errdefs.ErrUnavailable}
		}
		why = fmt.Sprintf("HTTP %d", e.RawResponse.StatusCode)
	}
	return fmt.Errorf("the authority gave no token: %s; %s: %w", strings.TrimSpace(why), credentialHint, errdefs.ErrPermissionDenied)
}
