// SPDX-License-Identifier: Apache-2.0

package config

import (
	"slices"
	"strings"
)

// keysOf are the settings that count when provider is chosen; those of others are
// known and mean nothing. "": those that always count.
func keysOf(provider string) []key {
	switch provider {
	case ProviderLocal:
		return slices.Concat(keys, localKeys)
	case ProviderAWS:
		return slices.Concat(keys, cloudKeys, awsKeys)
	case ProviderAzure:
		return slices.Concat(keys, cloudKeys, azureKeys)
	}
	return keys
}

// allKeys are the settings of all providers.
var allKeys = slices.Concat(keys, localKeys, cloudKeys, awsKeys, azureKeys)

func has(ks []key, name string) bool {
	return slices.ContainsFunc(ks, func(k key) bool { return k.name == name })
}

// ownPrefixes begin the names of a provider's settings: with that provider chosen,
// what begins so and is no setting is probably meant to be one.
var ownPrefixes = map[string][]string{
	ProviderAWS:   {"AWS_", "PODVM_"},
	ProviderAzure: {"AZURE_"},
}

// sdkNames are read by the clouds' own libraries and tools, from the environment
// (aws-sdk-go-v2 config/env_config.go and the AWS CLI's manual; azidentity and azcore,
// and the Azure CLI's), or set by what runs pods there. A "*" stands for any end.
var sdkNames = []string{
	"AWS_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_DEFAULT_REGION", "AWS_DEFAULT_PROFILE", "AWS_DEFAULT_OUTPUT", "AWS_DEFAULTS_MODE",
	"AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_SDK_*", "AWS_ROLE_SESSION_NAME", "AWS_CONTAINER_*", "AWS_CA_BUNDLE",
	"AWS_EC2_METADATA_*", "AWS_METADATA_*", "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE", "AWS_STS_REGIONAL_ENDPOINTS", "AWS_USE_*", "AWS_ENABLE_*",
	"AWS_ENDPOINT_URL_*", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "AWS_S3_*", "AWS_REQUEST_*", "AWS_RESPONSE_*", "AWS_DISABLE_*",
	"AWS_ACCOUNT_ID", "AWS_ACCOUNT_ID_ENDPOINT_MODE", "AWS_AUTH_SCHEME_PREFERENCE", "AWS_EXECUTION_ENV", "AWS_LAMBDA_*", "AWS_BEARER_TOKEN_*",
	"AWS_SIGV4A_*", "AWS_PAGER", "AWS_CLI_*", "AWS_SECURITY_TOKEN", "AWS_CREDENTIAL_*", "AWS_DATA_PATH", "AWS_VAULT*", "AWS_SSO_*",
	"AZURE_CLIENT_CERTIFICATE_*", "AZURE_CLIENT_SEND_CERTIFICATE_CHAIN", "AZURE_USERNAME", "AZURE_PASSWORD", "AZURE_ADDITIONALLY_ALLOWED_TENANTS",
	"AZURE_REGIONAL_AUTHORITY_NAME", "AZURE_TOKEN_CREDENTIALS", "AZURE_IDENTITY_*", "AZURE_POD_IDENTITY_*", "AZURE_SDK_*", "AZURE_KUBERNETES_*",
	"AZURE_CONFIG_DIR", "AZURE_DEFAULTS_*", "AZURE_CORE_*", "AZURE_EXTENSION_*", "AZURE_HTTP_*", "AZURE_CLOUD*", "AZURE_ENVIRONMENT*", "AZURE_ARM_*",
	"AZURE_LOG_LEVEL", "AZURE_CLI_*", "AZURE_STORAGE_*", "AZURE_TRACING_*", "AZURE_TELEMETRY_*", "AZURE_MSI_*",
}

func isSDK(name string) bool {
	return slices.ContainsFunc(sdkNames, func(s string) bool {
		start, any := strings.CutSuffix(s, "*")
		return name == s || any && strings.HasPrefix(name, start)
	})
}

// misnomers are names that people give to settings, too far from the right ones to be
// told by their letters.
var misnomers = map[string]string{
	"AWS_AMI_ID": "PODVM_AMI_ID", "AWS_IMAGE_ID": "PODVM_AMI_ID", "PODVM_IMAGE_ID": "PODVM_AMI_ID", "PODVM_AMI": "PODVM_AMI_ID",
	"AWS_INSTANCE_TYPE": "PODVM_INSTANCE_TYPE", "AWS_INSTANCE_TYPES": "PODVM_INSTANCE_TYPES",
	"PODVM_INSTANCE_SIZE": "PODVM_INSTANCE_TYPE", "PODVM_INSTANCE_SIZES": "PODVM_INSTANCE_TYPES",
	"AWS_SECURITY_GROUP_ID": "AWS_SG_IDS", "AWS_SECURITY_GROUP_IDS": "AWS_SG_IDS", "AWS_SECURITY_GROUPS": "AWS_SG_IDS", "AWS_SUBNET": "AWS_SUBNET_ID",
	"AWS_VPC": "AWS_VPC_ID", "AWS_KEY_NAME": "SSH_KP_NAME", "AWS_SSH_KEY_NAME": "SSH_KP_NAME", "AWS_LAUNCH_TEMPLATE": "PODVM_LAUNCHTEMPLATE_NAME",
	"PODVM_LAUNCHTEMPLATE": "PODVM_LAUNCHTEMPLATE_NAME", "AWS_KMS_KEY": "AWS_ROOT_VOLUME_KMS_KEY", "AWS_ROOT_VOLUME_SIZE": "ROOT_VOLUME_SIZE", "AWS_TAGS": "TAGS",
	"AZURE_INSTANCE_TYPE": "AZURE_INSTANCE_SIZE", "AZURE_INSTANCE_TYPES": "AZURE_INSTANCE_SIZES", "AZURE_VM_SIZE": "AZURE_INSTANCE_SIZE",
	"AZURE_LOCATION": "AZURE_REGION", "AZURE_RG": "AZURE_RESOURCE_GROUP", "AZURE_SUBNET": "AZURE_SUBNET_ID", "AZURE_NSG": "AZURE_NSG_ID",
	"AZURE_NETWORK_SECURITY_GROUP_ID": "AZURE_NSG_ID", "AZURE_IMAGE": "AZURE_IMAGE_ID", "AZURE_SUBSCRIPTION": "AZURE_SUBSCRIPTION_ID", "AZURE_TENANT": "AZURE_TENANT_ID",
	"AZURE_SSH_USERNAME": "SSH_USERNAME", "AZURE_ROOT_VOLUME_SIZE": "ROOT_VOLUME_SIZE", "AZURE_TAGS": "TAGS",
}

// standing is what a name means to an adaptor of a provider.
type standing int

const (
	unheard   standing = iota // nobody knows it
	harmless                  // known, and of no effect: another provider's
	aSetting                  // one of ours, of cloud-api-adaptor's, or of a library's
	ofLibrary                 // read from the environment by the cloud's library
)

func standingOf(name, provider string) standing {
	own := slices.ContainsFunc(ownPrefixes[provider], func(p string) bool { return strings.HasPrefix(name, p) })
	switch {
	case has(allKeys, name), reasonNotHere(name) != "":
		return aSetting
	case own && isSDK(name):
		return ofLibrary
	case own:
		return unheard
	case slices.ContainsFunc(otherPrefixes, func(p string) bool { return strings.HasPrefix(name, p) }), slices.Contains(otherNames, name):
		return harmless
	}
	return unheard
}

// sureBytes is how long a name must be for one wrong letter, not the first, to be a
// slip and not another word. (GLOG_LEVEL is not LOG_LEVEL.)
const sureBytes = 9

// slip tells which setting a variable of the environment, which is not ours alone, was
// meant to be. "": none, as far as anybody can tell.
func slip(name, provider string, isSet func(string) bool) string {
	if standingOf(name, provider) != unheard {
		return ""
	}
	own := slices.ContainsFunc(ownPrefixes[provider], func(p string) bool { return strings.HasPrefix(name, p) })
	if right := misnomers[name]; own && right != "" {
		if isSet(right) {
			return "" // who set it so knows; this one is for somebody else
		}
		return right
	}
	best, distance := closest(name, keysOf(provider))
	if own && distance <= 2 || distance <= 1 && len(name) >= sureBytes && strings.ToUpper(name)[0] == best[0] {
		return best
	}
	return ""
}

// closest is the setting whose name differs in the fewest letters.
func closest(name string, ks []key) (best string, distance int) {
	distance = len(name)
	for _, k := range ks {
		if d := edits(strings.ToUpper(name), k.name); d < distance {
			best, distance = k.name, d
		}
	}
	return best, distance
}

// suggestion is what to do with a name in the file that nobody knows.
func suggestion(name, provider string) string {
	best := misnomers[strings.ToUpper(name)]
	if best == "" || !has(keysOf(provider), best) {
		var distance int
		if best, distance = closest(name, keysOf(provider)); distance > 2 { // more edits than two are another word
			best = ""
		}
	}
	if best == "" {
		return "; remove it"
	}
	return "; did you mean " + best + "?"
}

// edits is the Levenshtein distance of two words.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		last := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := last
			if a[i] != b[j] {
				cost++
			}
			last = row[j+1]
			row[j+1] = min(cost, row[j]+1, last+1)
		}
	}
	return row[len(b)]
}
