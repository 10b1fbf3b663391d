// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strings"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"
	"github.com/containerd/errdefs"
)

// rule is what an error code means to us.
type rule struct {
	class error  // of errdefs
	scope scope  // for capacity: what there is none of
	fix   string // for a person: which key to change, or what to do; may be empty
}

// scope tells how much of the candidates a capacity error rules out.
type scope int

const (
	scopeNone   scope = iota // not a capacity error
	scopePool                // this type, zone and market
	scopeSubnet              // this subnet
	scopeMarket              // this type and market, in all zones
	scopeSpot                // the spot market, for all types
)

// Fixes that several codes share.
const (
	fixCredentials = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role that AWS_ROLE_ARN or the node gives"
	fixQuota       = "ask for a higher quota (Service Quotas, Amazon EC2), or add types of another family to PODVM_INSTANCE_TYPES"
	fixSubnet      = "correct AWS_SUBNET_ID, or AWS_REGION"
	fixGroups      = "correct AWS_SG_IDS, or AWS_REGION"
	fixImage       = "correct PODVM_AMI_ID, or AWS_REGION"
	fixTypes       = "correct PODVM_INSTANCE_TYPE and PODVM_INSTANCE_TYPES"
	fixTemplate    = "correct PODVM_LAUNCHTEMPLATE_NAME, or unset USE_PODVM_LAUNCHTEMPLATE"
	fixKMS         = "check AWS_ROOT_VOLUME_KMS_KEY and what its policy allows"
)

// rules is the table of EC2's and STS's error codes. Codes that are not here are
// unknown, and so are the errors: they may mean that it has happened. Capacity codes:
// those of Karpenter 1.15 and ParallelCluster, for RunInstances. The others: EC2 API
// Reference, "Error codes for the Amazon EC2 API".
var rules = map[string]rule{
	// No capacity.
	"InsufficientInstanceCapacity":         {errdefs.ErrResourceExhausted, scopePool, ""},
	"InsufficientCapacity":                 {errdefs.ErrResourceExhausted, scopePool, ""},
	"InsufficientHostCapacity":             {errdefs.ErrResourceExhausted, scopePool, ""},
	"InsufficientReservedInstanceCapacity": {errdefs.ErrResourceExhausted, scopePool, ""},
	"ReservationCapacityExceeded":          {errdefs.ErrResourceExhausted, scopePool, ""},
	"UnfulfillableCapacity":                {errdefs.ErrResourceExhausted, scopePool, ""},
	"Unsupported":                          {errdefs.ErrResourceExhausted, scopePool, "add a subnet of another zone to AWS_SUBNET_ID, or another type to PODVM_INSTANCE_TYPES"},
	"SpotMaxPriceTooLow":                   {errdefs.ErrResourceExhausted, scopePool, ""},
	"InsufficientFreeAddressesInSubnet":    {errdefs.ErrResourceExhausted, scopeSubnet, "add another subnet to AWS_SUBNET_ID"},
	// Quotas.
	"VcpuLimitExceeded":                          {errdefs.ErrResourceExhausted, scopeMarket, fixQuota},
	"InstanceLimitExceeded":                      {errdefs.ErrResourceExhausted, scopeMarket, fixQuota},
	"MaxSpotInstanceCountExceeded":               {errdefs.ErrResourceExhausted, scopeSpot, "ask for a higher spot quota (Service Quotas, Amazon EC2), or set AWS_SPOT to true so that on demand is tried next"},
	"MaxFleetCountExceeded":                      {errdefs.ErrResourceExhausted, scopeSpot, fixQuota},
	"VolumeLimitExceeded":                        {errdefs.ErrResourceExhausted, scopeNone, "ask for a higher quota of gp3 volumes (Service Quotas, Amazon EBS)"},
	"NetworkInterfaceLimitExceeded":              {errdefs.ErrResourceExhausted, scopeNone, "ask for a higher quota of network interfaces (Service Quotas, Amazon VPC)"},
	"ResourceLimitExceeded":                      {errdefs.ErrResourceExhausted, scopeNone, fixQuota},
	"AddressLimitExceeded":                       {errdefs.ErrResourceExhausted, scopeNone, "ask for a higher quota of public addresses, or unset USE_PUBLIC_IP"},
	"PrivateIpAddressLimitExceeded":              {errdefs.ErrResourceExhausted, scopeNone, ""},
	"MaxIOPSLimitExceeded":                       {errdefs.ErrResourceExhausted, scopeNone, fixQuota},
	"ConcurrentCreateImageNoRebootLimitExceeded": {errdefs.ErrResourceExhausted, scopeNone, ""},
	// Throttles and outages.
	"RequestLimitExceeded":        {errdefs.ErrUnavailable, scopeNone, ""},
	"Throttling":                  {errdefs.ErrUnavailable, scopeNone, ""},
	"ThrottlingException":         {errdefs.ErrUnavailable, scopeNone, ""},
	"EC2ThrottledException":       {errdefs.ErrUnavailable, scopeNone, ""},
	"Server.RequestLimitExceeded": {errdefs.ErrUnavailable, scopeNone, ""},
	"ResourceCountLimitExceeded":  {errdefs.ErrUnavailable, scopeNone, ""},
	"InternalError":               {errdefs.ErrUnavailable, scopeNone, ""},
	"InternalFailure":             {errdefs.ErrUnavailable, scopeNone, ""},
	"ServiceUnavailable":          {errdefs.ErrUnavailable, scopeNone, ""},
	"Unavailable":                 {errdefs.ErrUnavailable, scopeNone, ""},
	"RequestTimeout":              {errdefs.ErrUnavailable, scopeNone, ""},
	"IDPCommunicationError":       {errdefs.ErrUnavailable, scopeNone, ""},
	// Credentials and rights.
	"UnauthorizedOperation":       {errdefs.ErrPermissionDenied, scopeNone, "allow it in the policy of the key or role that the adaptor uses"},
	"AccessDenied":                {errdefs.ErrPermissionDenied, scopeNone, "allow it in the policy of the key or role that the adaptor uses, and that role's trust"},
	"AccessDeniedException":       {errdefs.ErrPermissionDenied, scopeNone, "allow it in the policy of the key or role that the adaptor uses"},
	"AuthFailure":                 {errdefs.ErrPermissionDenied, scopeNone, fixCredentials},
	"InvalidClientTokenId":        {errdefs.ErrPermissionDenied, scopeNone, fixCredentials},
	"UnrecognizedClientException": {errdefs.ErrPermissionDenied, scopeNone, fixCredentials},
	"SignatureDoesNotMatch":       {errdefs.ErrPermissionDenied, scopeNone, fixCredentials},
	"MissingAuthenticationToken":  {errdefs.ErrPermissionDenied, scopeNone, fixCredentials},
	"IncompleteSignature":         {errdefs.ErrPermissionDenied, scopeNone, fixCredentials},
	"ExpiredToken":                {errdefs.ErrPermissionDenied, scopeNone, "renew AWS_SESSION_TOKEN and the keys that belong to it"},
	"ExpiredTokenException":       {errdefs.ErrPermissionDenied, scopeNone, "renew the token in AWS_WEB_IDENTITY_TOKEN_FILE"},
	"InvalidIdentityToken":        {errdefs.ErrPermissionDenied, scopeNone, "see that AWS_WEB_IDENTITY_TOKEN_FILE holds a token that the provider of AWS_ROLE_ARN's trust has issued"},
	"IDPRejectedClaim":            {errdefs.ErrPermissionDenied, scopeNone, "see that AWS_WEB_IDENTITY_TOKEN_FILE holds a token that the trust of AWS_ROLE_ARN accepts"},
	"RequestExpired":              {errdefs.ErrPermissionDenied, scopeNone, "renew the credential, and set this node's clock"},
	"Blocked":                     {errdefs.ErrPermissionDenied, scopeNone, "the account is blocked; talk to AWS Support"},
	"OptInRequired":               {errdefs.ErrPermissionDenied, scopeNone, "the account may not use this yet; see its state in the console"},
	"PendingVerification":         {errdefs.ErrPermissionDenied, scopeNone, "the account is being verified; wait, or talk to AWS Support"},
	"OperationNotPermitted":       {errdefs.ErrPermissionDenied, scopeNone, "switch termination protection of the instance off"},
	// Wrong configuration.
	"InvalidAMIID.NotFound":                        {errdefs.ErrInvalidArgument, scopeNone, fixImage},
	"InvalidAMIID.Malformed":                       {errdefs.ErrInvalidArgument, scopeNone, fixImage},
	"InvalidAMIID.Unavailable":                     {errdefs.ErrInvalidArgument, scopeNone, "wait until the image of PODVM_AMI_ID is available, or name another"},
	"InvalidSubnetID.NotFound":                     {errdefs.ErrInvalidArgument, scopeNone, fixSubnet},
	"InvalidSubnetID.Malformed":                    {errdefs.ErrInvalidArgument, scopeNone, fixSubnet},
	"InvalidSubnet":                                {errdefs.ErrInvalidArgument, scopeNone, fixSubnet},
	"SubnetConflict":                               {errdefs.ErrInvalidArgument, scopeNone, fixSubnet},
	"InvalidGroup.NotFound":                        {errdefs.ErrInvalidArgument, scopeNone, fixGroups},
	"InvalidGroupId.Malformed":                     {errdefs.ErrInvalidArgument, scopeNone, fixGroups},
	"InvalidSecurityGroupID.NotFound":              {errdefs.ErrInvalidArgument, scopeNone, fixGroups},
	"InvalidSecurity.RequestHasExpired":            {errdefs.ErrPermissionDenied, scopeNone, "set this node's clock"},
	"SecurityGroupsPerInstanceLimitExceeded":       {errdefs.ErrInvalidArgument, scopeNone, "name fewer groups in AWS_SG_IDS"},
	"SecurityGroupsPerInterfaceLimitExceeded":      {errdefs.ErrInvalidArgument, scopeNone, "name fewer groups in AWS_SG_IDS"},
	"InvalidVpcID.NotFound":                        {errdefs.ErrInvalidArgument, scopeNone, "correct AWS_VPC_ID, or AWS_REGION"},
	"VPCIdNotSpecified":                            {errdefs.ErrInvalidArgument, scopeNone, "set AWS_SUBNET_ID"},
	"InvalidInstanceType":                          {errdefs.ErrInvalidArgument, scopeNone, fixTypes},
	"InvalidKeyPair.NotFound":                      {errdefs.ErrInvalidArgument, scopeNone, "correct SSH_KP_NAME, or unset it"},
	"InvalidLaunchTemplateName.NotFoundException":  {errdefs.ErrInvalidArgument, scopeNone, fixTemplate},
	"InvalidLaunchTemplateName.MalformedException": {errdefs.ErrInvalidArgument, scopeNone, fixTemplate},
	"InvalidLaunchTemplateId.NotFound":             {errdefs.ErrInvalidArgument, scopeNone, fixTemplate},
	"InvalidLaunchTemplateId.VersionNotFound":      {errdefs.ErrInvalidArgument, scopeNone, fixTemplate},
	"InvalidPlacementGroup.Unknown":                {errdefs.ErrInvalidArgument, scopeNone, "correct AWS_PLACEMENT_GROUP, or unset it"},
	"InvalidPlacementGroupId.NotFound":             {errdefs.ErrInvalidArgument, scopeNone, "correct AWS_PLACEMENT_GROUP, or unset it"},
	"InvalidTenancy":                               {errdefs.ErrInvalidArgument, scopeNone, "correct AWS_TENANCY, or the placement that goes with it"},
	"InvalidKmsKeyId":                              {errdefs.ErrInvalidArgument, scopeNone, fixKMS},
	"KmsKeyIdNotFound":                             {errdefs.ErrInvalidArgument, scopeNone, fixKMS},
	"InvalidBlockDeviceMapping":                    {errdefs.ErrInvalidArgument, scopeNone, "set ROOT_VOLUME_SIZE to at least the image's size"},
	"InvalidSnapshot.NotFound":                     {errdefs.ErrInvalidArgument, scopeNone, "publish the image of PODVM_AMI_ID anew: its snapshot is gone"},
	"UnsupportedOperation":                         {errdefs.ErrInvalidArgument, scopeNone, "the instance type, the image and what is asked of them do not go together: see PODVM_INSTANCE_TYPES, PODVM_AMI_ID and DISABLECVM"},
	"UnsupportedInstanceAttribute":                 {errdefs.ErrInvalidArgument, scopeNone, ""},
	"InvalidParameter":                             {errdefs.ErrInvalidArgument, scopeNone, ""},
	"InvalidParameterValue":                        {errdefs.ErrInvalidArgument, scopeNone, ""},
	"InvalidParameterCombination":                  {errdefs.ErrInvalidArgument, scopeNone, "where a launch template is used, see what it and AWS_SUBNET_ID, AWS_SG_IDS and USE_PUBLIC_IP say of the network"},
	"InvalidParameterDependency":                   {errdefs.ErrInvalidArgument, scopeNone, ""},
	"MissingParameter":                             {errdefs.ErrInvalidArgument, scopeNone, ""},
	"UnknownParameter":                             {errdefs.ErrInvalidArgument, scopeNone, ""},
	"InvalidRequest":                               {errdefs.ErrInvalidArgument, scopeNone, ""},
	"InvalidPermission.Malformed":                  {errdefs.ErrInvalidArgument, scopeNone, ""},
	"InvalidAMIName.Malformed":                     {errdefs.ErrInvalidArgument, scopeNone, ""},
	"RulesPerSecurityGroupLimitExceeded":           {errdefs.ErrResourceExhausted, scopeNone, "remove rules of the security group, or ask for a higher quota of them (Service Quotas, Amazon VPC)"},
	"SnapshotLimitExceeded":                        {errdefs.ErrResourceExhausted, scopeNone, "remove snapshots, or ask for a higher quota of them (Service Quotas, Amazon EBS)"},
	"InvalidUserData.Malformed":                    {errdefs.ErrInvalidArgument, scopeNone, ""},
	"InvalidInput":                                 {errdefs.ErrInvalidArgument, scopeNone, ""},
	"InvalidZone.NotFound":                         {errdefs.ErrInvalidArgument, scopeNone, fixSubnet},
	"TagLimitExceeded":                             {errdefs.ErrInvalidArgument, scopeNone, "name fewer tags in TAGS"},
	"InvalidTagKey.Malformed":                      {errdefs.ErrInvalidArgument, scopeNone, "correct TAGS"},
	"TagPolicyViolation":                           {errdefs.ErrInvalidArgument, scopeNone, "let TAGS follow the organization's tag policy"},
	"InvalidAction":                                {errdefs.ErrInvalidArgument, scopeNone, "see that AWS_ENDPOINT_URL is an EC2 endpoint"},
	// The EBS direct API's. (Its API Reference, "Common Errors" and each action's, 2026-11.)
	"RequestThrottledException":        {errdefs.ErrUnavailable, scopeNone, ""},
	"ConcurrentLimitExceededException": {errdefs.ErrResourceExhausted, scopeNone, "too many snapshots are being written; wait for them, or ask for a higher quota (Service Quotas, Amazon EBS)"},
	"ServiceQuotaExceededException":    {errdefs.ErrResourceExhausted, scopeNone, "ask for a higher quota (Service Quotas, Amazon EBS)"},
	"InternalServerException":          {errdefs.ErrUnavailable, scopeNone, ""},
	"ConflictException":                {errdefs.ErrAlreadyExists, scopeNone, ""},
	"ResourceNotFoundException":        {errdefs.ErrNotFound, scopeNone, ""},
	"ValidationException":              {errdefs.ErrInvalidArgument, scopeNone, ""},
	// State.
	"InvalidInstanceID.NotFound":         {errdefs.ErrNotFound, scopeNone, ""},
	"InvalidInstanceID.Malformed":        {errdefs.ErrNotFound, scopeNone, ""},
	"InvalidVolume.NotFound":             {errdefs.ErrNotFound, scopeNone, ""},
	"InvalidNetworkInterfaceID.NotFound": {errdefs.ErrNotFound, scopeNone, ""},
	"VolumeInUse":                        {errdefs.ErrFailedPrecondition, scopeNone, ""},
	"InvalidNetworkInterface.InUse":      {errdefs.ErrFailedPrecondition, scopeNone, ""},
	"InvalidParameterValue.InUse":        {errdefs.ErrFailedPrecondition, scopeNone, ""},
	"IncorrectState":                     {errdefs.ErrFailedPrecondition, scopeNone, ""},
	"IncorrectInstanceState":             {errdefs.ErrFailedPrecondition, scopeNone, ""},
	"InvalidSnapshot.InUse":              {errdefs.ErrFailedPrecondition, scopeNone, ""},
	"InvalidAMIName.Duplicate":           {errdefs.ErrAlreadyExists, scopeNone, ""},
	"InvalidPermission.Duplicate":        {errdefs.ErrAlreadyExists, scopeNone, ""},
	"IdempotentParameterMismatch":        {errdefs.ErrAlreadyExists, scopeNone, ""},
	"IdempotentInstanceTerminated":       {errdefs.ErrAlreadyExists, scopeNone, ""},
}

// Codes that callers ask about.
const (
	codeMismatch     = "IdempotentParameterMismatch"
	codeTerminated   = "IdempotentInstanceTerminated"
	codeUnauthorized = "UnauthorizedOperation"
	codeDenied       = "AccessDeniedException" // of the EBS direct API
	codeDryRun       = "DryRunOperation"       // a dry run that would have succeeded
)

// deniedAction is how services name what is not allowed.
var deniedAction = regexp.MustCompile(`not authorized to perform: ([a-z0-9]+:[A-Za-z]+)`)

// throttled tells whether a code is the service's word for "too many requests".
func throttled(code string) bool {
	return strings.HasSuffix(code, "RequestLimitExceeded") || strings.HasPrefix(code, "Throttling") || code == "RequestThrottledException" || code == "EC2ThrottledException"
}

// apiError is a refusal of the service, or a call that did not come through.
type apiError struct {
	action string
	code   string // "" where the service has not answered
	text   string
	rule   rule
	// cause is what the SDK says. It is not in the chain: its timeouts and
	// cancellations are those of one call and not the caller's.
	cause error
}

func (e *apiError) Error() string {
	var b strings.Builder
	b.WriteString(e.action + ": ")
	if e.code != "" {
		b.WriteString(e.code + ": ")
	}
	b.WriteString(e.text)
	if e.rule.fix != "" {
		b.WriteString("; " + e.rule.fix)
	}
	if e.rule.class != nil {
		b.WriteString(": " + e.rule.class.Error())
	}
	return b.String()
}

// Unwrap gives the class.
func (e *apiError) Unwrap() error { return e.rule.class }

// code is the service's code for an error; "" if it has none.
func code(err error) string {
	var e *apiError
	if errors.As(err, &e) {
		return e.code
	}
	return ""
}

// classify gives what the SDK returned for action its class. ctx is the caller's:
// once it has ended, its error is the one that counts.
func classify(ctx context.Context, action string, err error) error {
	if err == nil {
		return nil
	}
	if cerr := ctx.Err(); cerr != nil {
		return fmt.Errorf("%s: %w", action, cerr)
	}
	e := &apiError{action: action, cause: err}
	var api smithy.APIError
	var resp *awshttp.ResponseError
	var cred *credentialError
	if errors.As(err, &cred) {
		e.action, err = cred.action, cred.err
	}
	switch {
	case errors.As(err, &api) && rules[api.ErrorCode()] != rule{}:
		e.code, e.text, e.rule = api.ErrorCode(), api.ErrorMessage(), rules[api.ErrorCode()]
		switch {
		case e.code == codeUnauthorized:
			e.rule.fix = "the action is ec2:" + action + "; " + e.rule.fix
		case e.code == codeDenied && strings.HasPrefix(action, "ebs:"):
			if m := deniedAction.FindStringSubmatch(e.text); m != nil {
				action = m[1] // it may be one that the call implies
			}
			e.rule.fix = "the action is " + action + "; " + e.rule.fix
		}
	case errors.As(err, &resp) && resp.HTTPStatusCode() >= 500:
		// Something between us and the service, or the service on a bad day.
		e.text, e.rule.class = fmt.Sprintf("the service answered %d: %v", resp.HTTPStatusCode(), bare(err)), errdefs.ErrUnavailable
		if api != nil {
			e.code = api.ErrorCode()
		}
	case api != nil:
		e.code, e.text = api.ErrorCode(), api.ErrorMessage()
	case isConnectionError(err), malformed(err):
		e.text, e.rule.class = bare(err).Error(), errdefs.ErrUnavailable
	case cred != nil:
		e.text, e.rule = bare(err).Error(), rule{class: errdefs.ErrPermissionDenied, fix: fixCredentials}
	default:
		e.text = bare(err).Error()
	}
	return e
}

// bare drops the SDK's own wrapping, which repeats the action.
func bare(err error) error {
	var op *smithy.OperationError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// isConnectionError tells of errors on the way to the service, the deadline of the
// call included: the request may have arrived or not.
func isConnectionError(err error) bool {
	var netErr net.Error
	var urlErr *url.Error
	var sent interface{ ConnectionError() bool }
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &netErr) || errors.As(err, &urlErr) ||
		errors.As(err, &sent) && sent.ConnectionError()
}

// malformed tells of answers that cannot be read: cut short, or somebody else's. The
// request may have been carried out.
func malformed(err error) bool {
	var d *smithy.DeserializationError
	return errors.As(err, &d)
}

// capacity gives what a capacity error rules out; scopeNone for other errors.
func capacity(err error) scope {
	var e *apiError
	if errors.As(err, &e) {
		return e.rule.scope
	}
	return scopeNone
}
