// SPDX-License-Identifier: Apache-2.0

// Package account makes of a configuration the account that commands for people work in:
// who they are, and where.
package account

import (
	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/azure"
)

// AWS takes the keys of the provider aws. region, if not "", is instead of AWS_REGION.
func AWS(cfg *config.Config, region string) (*aws.Account, error) {
	a := cfg.AWS
	if region == "" {
		region = a.Region
	}
	return aws.NewAccount(aws.Config{
		Region: region, Endpoint: a.Endpoint, Profile: a.Profile, RoleARN: a.RoleARN, WebIdentityTokenFile: a.WebIdentityTokenFile,
		Keys: aws.Keys{AccessKeyID: a.AccessKeyID, SecretAccessKey: aws.Secret(a.SecretAccessKey), SessionToken: aws.Secret(a.SessionToken)},
	})
}

// Azure takes the keys of the provider azure.
func Azure(cfg *config.Config) (*azure.Account, error) {
	a := cfg.Azure
	return azure.NewAccount(azure.Config{
		SubscriptionID: a.SubscriptionID, Region: a.Region, ResourceGroup: a.ResourceGroup, Endpoint: a.Endpoint, AuthorityHost: a.AuthorityHost,
		Credentials: azure.Credentials{TenantID: a.TenantID, ClientID: a.ClientID, ClientSecret: string(a.ClientSecret), FederatedTokenFile: a.FederatedTokenFile},
	})
}
