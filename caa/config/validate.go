// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/kata-remote/kata-remote/cloud/prices"
)

// lookup answers what was set, and where.
type lookup map[string]setting

// set tells whether a key has a value, right or wrong.
func (l lookup) set(name string) bool { return l[name].value != "" }

// require reports keys that have no value.
func (p *problems) require(c *Config, l lookup, needed ...[2]string) {
	for _, n := range needed {
		if !l.set(n[0]) && !c.account {
			p.add("%s is not set: %s", n[0], n[1])
		}
	}
}

// together reports keys of which some are set and others not.
func (p *problems) together(l lookup, names ...string) {
	var set, missing []string
	for _, n := range names {
		if l.set(n) {
			set = append(set, n)
		} else {
			missing = append(missing, n)
		}
	}
	if len(set) > 0 && len(missing) > 0 {
		p.add("%s (%s) is set without %s: set both, or neither", strings.Join(set, ", "), l[set[0]].source, strings.Join(missing, " and "))
	}
}

// defaultType makes the type of a pod that asks for nothing one of those allowed. As
// with cloud-api-adaptor, the default alone is allowed where no list is given.
func (p *problems) defaultType(l lookup, typ *string, types *[]string, typKey, typesKey, def string) {
	in := func(t string) bool {
		return slices.ContainsFunc(*types, func(o string) bool { return strings.EqualFold(o, t) })
	}
	switch {
	case *typ == "" && len(*types) > 0 && !in(def):
		*typ = (*types)[0]
	case *typ == "":
		*typ = def
	case len(*types) > 0 && !in(*typ):
		p.add("%s is %q (%s), which is not in %s (%s): add it there, or choose one of %s",
			typKey, *typ, l[typKey].source, typesKey, l[typesKey].source, strings.Join(*types, ", "))
	}
	if len(*types) == 0 {
		*types = []string{*typ}
	}
}

// validateCloud completes and checks what the clouds have in common.
func (p *problems) validateCloud(c *Config, values map[string]setting, rootVolumeGiB int) {
	if !lookup(values).set("ROOT_VOLUME_SIZE") {
		c.Cloud.RootVolumeGiB = rootVolumeGiB
	}
	c.Cloud.Prices = prices.BuiltIn()
	if s := values["INSTANCE_PRICES_FILE"]; s.value != "" && unfilled(s.name, s.value) == "" {
		t, err := prices.Load(s.value)
		if err != nil {
			for line := range strings.SplitSeq(reason(err), "\n") {
				p.add("INSTANCE_PRICES_FILE is %q (%s): %s", s.value, s.source, line)
			}
			return
		}
		c.Cloud.Prices = t
	}
}

// reason is an error about a file without the file's name, which stands beside it.
func reason(err error) string {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err.Error()
	}
	return err.Error()
}

// validateAWS completes and checks what one value alone does not show.
func (p *problems) validateAWS(c *Config, values map[string]setting) {
	l, a := lookup(values), &c.AWS
	p.require(c, l, [2]string{"PODVM_AMI_ID", "give the id of the pod VM's image, which `peerpodctl image publish aws` prints"})
	p.together(l, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
	p.together(l, "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE")
	if l.set("AWS_SESSION_TOKEN") && !l.set("AWS_ACCESS_KEY_ID") {
		p.add("AWS_SESSION_TOKEN (%s) is set without AWS_ACCESS_KEY_ID: a token belongs to a temporary key; set both, or neither", l["AWS_SESSION_TOKEN"].source)
	}
	if l.set("AWS_ACCESS_KEY_ID") && l.set("AWS_ROLE_ARN") {
		c.Warnings = append(c.Warnings, "AWS_ROLE_ARN has no effect: AWS_ACCESS_KEY_ID comes first")
	}
	p.defaultType(l, &a.InstanceType, &a.InstanceTypes, "PODVM_INSTANCE_TYPE", "PODVM_INSTANCE_TYPES", DefaultAWSInstanceType)

	// cloud-api-adaptor's entrypoint takes the name alone for a wish to use it.
	var use, given = false, l.set("USE_PODVM_LAUNCHTEMPLATE")
	if given {
		_ = boolean(&use, l["USE_PODVM_LAUNCHTEMPLATE"].value) // reported by apply
	}
	switch {
	case given && !use:
		a.LaunchTemplate = ""
	case use && a.LaunchTemplate == "":
		a.LaunchTemplate = DefaultAWSLaunchTemplate
	}
	if a.Spot == "" {
		a.Spot = "false"
	}
	if a.Tenancy == "" {
		a.Tenancy = "default"
	}
}

// validateAzure is validateAWS for Azure.
func (p *problems) validateAzure(c *Config, values map[string]setting) {
	l, a := lookup(values), &c.Azure
	p.require(c, l,
		[2]string{"AZURE_SUBSCRIPTION_ID", "`az account show --query id` prints it"},
		[2]string{"AZURE_REGION", "name the region of the nodes, such as eastus"},
		[2]string{"AZURE_RESOURCE_GROUP", "name the resource group in which to make pod VMs"},
		[2]string{"AZURE_SUBNET_ID", "`az network vnet subnet show --query id` prints it; take the nodes' subnet, or one they reach"},
		[2]string{"AZURE_IMAGE_ID", "give the id of the pod VM's image, which `peerpodctl image publish azure` prints"},
	)
	for _, k := range []string{"AZURE_CLIENT_SECRET", "AZURE_FEDERATED_TOKEN_FILE"} {
		if l.set(k) {
			for _, need := range []string{"AZURE_TENANT_ID", "AZURE_CLIENT_ID"} {
				if !l.set(need) {
					p.add("%s is not set, and %s (%s) needs it: `az ad sp show --id <client id>` prints it", need, k, l[k].source)
				}
			}
			break // the one that counts; the same would be said of the other
		}
	}
	if guidRule.MatchString(string(a.ClientSecret)) {
		c.Warnings = append(c.Warnings, "AZURE_CLIENT_SECRET looks like the id of a secret; the adaptor needs its value, which Azure shows once")
	}
	p.security(c, l)
	standard := DefaultAzureInstanceSize
	if c.Cloud.DisableCVM {
		standard = DefaultAzureOrdinarySize // Azure makes no ordinary VM of a confidential size
	}
	p.defaultType(l, &a.InstanceSize, &a.InstanceSizes, "AZURE_INSTANCE_SIZE", "AZURE_INSTANCE_SIZES", standard)
	p.subscription(c, l)
	p.burstable(c, l)
	if a.Spot == "" {
		a.Spot = "false"
	}
	if a.SSHUsername == "" {
		a.SSHUsername = DefaultAzureSSHUsername
	}
	if a.SSHPublicKeyFile == "" {
		a.SSHPublicKeyFile = DefaultAzureSSHKeyFile
	} else if _, err := os.Stat(a.SSHPublicKeyFile); err != nil {
		p.add("AZURE_SSH_PUBLIC_KEY_FILE is %q (%s): %s; mount the Secret ssh-key-secret there, or remove the setting", a.SSHPublicKeyFile, l["AZURE_SSH_PUBLIC_KEY_FILE"].source, reason(err))
	}
}

// security settles the kind of VM. DISABLECVM is what people have; where both are set,
// they must agree, since the one who said "confidential" must get it.
func (p *problems) security(c *Config, l lookup) {
	a, disable := &c.Azure, l["DISABLECVM"]
	switch {
	case a.SecurityType == "" && c.Cloud.DisableCVM:
		a.SecurityType = azureStandard
	case a.SecurityType == "":
		a.SecurityType = azureConfidential
	case a.SecurityType == azureConfidential && c.Cloud.DisableCVM:
		p.add("AZURE_SECURITY_TYPE is %q (%s) and DISABLECVM is %q (%s): remove one of them", a.SecurityType, l["AZURE_SECURITY_TYPE"].source, disable.value, disable.source)
	case a.SecurityType != azureConfidential && disable.value != "" && !c.Cloud.DisableCVM:
		p.add("AZURE_SECURITY_TYPE is %q (%s), which is not confidential, and DISABLECVM is %q (%s): remove one of them", a.SecurityType, l["AZURE_SECURITY_TYPE"].source, disable.value, disable.source)
	}
	c.Cloud.DisableCVM = a.SecurityType != azureConfidential
	if a.SecureBoot && a.SecurityType == azureStandard {
		p.add("ENABLE_SECURE_BOOT is %q (%s), and VMs of security type Standard have none: set AZURE_SECURITY_TYPE to TrustedLaunch, or remove it", l["ENABLE_SECURE_BOOT"].value, l["ENABLE_SECURE_BOOT"].source)
	}
}

// burstable checks that there is something to buy on the spot market, which has no sizes
// of the B series (Azure, "Use Azure Spot Virtual Machines", limitations).
func (p *problems) burstable(c *Config, l lookup) {
	a := &c.Azure
	var b []string
	for _, s := range a.InstanceSizes {
		if azureBurstableRule.MatchString(s) {
			b = append(b, s)
		}
	}
	switch {
	case a.Spot == "" || a.Spot == "false" || len(b) == 0:
	case a.Spot == "only" && len(b) == len(a.InstanceSizes):
		p.add("AZURE_SPOT is %q (%s), and sizes of the B series, which are all that AZURE_INSTANCE_SIZES allows (%s), are not sold so: allow others, or set AZURE_SPOT to false", a.Spot, l["AZURE_SPOT"].source, strings.Join(b, ", "))
	default:
		c.Warnings = append(c.Warnings, "AZURE_SPOT has no effect on "+strings.Join(b, ", ")+": sizes of the B series are not sold on the spot market")
	}
}

// subscription checks that the network is in the subscription of the VMs: an interface
// cannot be in another than its network and its security group (Azure, "Network
// interfaces", constraints).
func (p *problems) subscription(c *Config, l lookup) {
	if c.Azure.SubscriptionID == "" {
		return
	}
	for _, r := range []struct{ key, id string }{{"AZURE_SUBNET_ID", c.Azure.SubnetID}, {"AZURE_NSG_ID", c.Azure.NSGID}} {
		if f := strings.Split(r.id, "/"); len(f) > 2 && !strings.EqualFold(f[2], c.Azure.SubscriptionID) {
			p.add("%s (%s) is in subscription %s and AZURE_SUBSCRIPTION_ID is %q (%s): they must be the same", r.key, l[r.key].source, f[2], c.Azure.SubscriptionID, l["AZURE_SUBSCRIPTION_ID"].source)
		}
	}
}
