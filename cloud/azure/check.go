// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// Check implements cloud.Provider: it shows the credential, and looks at everything
// that the configuration names.
func (p *Provider) Check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := p.key.line(); err != nil {
		return err
	}
	// Without a credential, or with one that may not see the subscription, all else
	// would only say so again.
	var any struct{}
	if err := p.arm.get(ctx, "/subscriptions/"+p.cfg.SubscriptionID, apiResources, familyOther, &any); err != nil {
		return checked(ctx, "AZURE_SUBSCRIPTION_ID", p.cfg.SubscriptionID, err)
	}
	steps := []func(context.Context) error{p.checkGroup, p.checkSubnet, p.checkNSG, p.checkImage, p.checkSizes}
	errs := make([]error, len(steps))
	var wg sync.WaitGroup
	for i, step := range steps {
		wg.Go(func() { errs[i] = step(ctx) })
	}
	wg.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(errs...)
}

// checked says which key names what could not be looked at.
func checked(ctx context.Context, key, what string, err error) error {
	switch {
	case err == nil || ctx.Err() != nil:
		return err
	case missing(err):
		return badKey(key, "names %s, which does not exist", what)
	}
	return fmt.Errorf("look at %s (%s): %w", what, key, err)
}

func (p *Provider) checkGroup(ctx context.Context) error {
	var any struct{}
	return checked(ctx, "AZURE_RESOURCE_GROUP", p.cfg.ResourceGroup,
		p.arm.get(ctx, p.place.path(), apiResources, familyOther, &any))
}

// checkSubnet looks at the network for its region: Azure's own error for a network
// elsewhere names neither.
func (p *Provider) checkSubnet(ctx context.Context) error {
	network, _, _ := strings.Cut(p.cfg.SubnetID, subnetsPart(p.cfg.SubnetID))
	var any struct{}
	if err := p.arm.get(ctx, p.cfg.SubnetID, apiNetwork, familyNetRead, &any); err != nil {
		return checked(ctx, "AZURE_SUBNET_ID", p.cfg.SubnetID, err)
	}
	var n struct{ Location string }
	switch err := p.arm.get(ctx, network, apiNetwork, familyNetRead, &n); {
	case errdefs.IsPermissionDenied(err):
		return nil // to read the network is more than making VMs needs
	case err != nil:
		return checked(ctx, "AZURE_SUBNET_ID", network, err)
	}
	return p.inRegion("AZURE_SUBNET_ID", n.Location)
}

// subnetsPart is "/subnets/..." as the id writes it.
func subnetsPart(id string) string { return id[strings.Index(strings.ToLower(id), "/subnets/"):] }

func (p *Provider) checkNSG(ctx context.Context) error {
	if p.cfg.NSGID == "" {
		return nil
	}
	var n struct{ Location string }
	if err := p.arm.get(ctx, p.cfg.NSGID, apiNetwork, familyNetRead, &n); err != nil {
		return checked(ctx, "AZURE_NSG_ID", p.cfg.NSGID, err)
	}
	return p.inRegion("AZURE_NSG_ID", n.Location)
}

func (p *Provider) inRegion(key, location string) error {
	if l := strings.ToLower(strings.ReplaceAll(location, " ", "")); l != "" && l != p.cfg.Region {
		return badKey(key, "is in %s and AZURE_REGION is %s; they must be the same", l, p.cfg.Region)
	}
	return nil
}

// image is what is read of a gallery's image definition or of a managed image.
type image struct {
	Location   string
	Properties struct {
		OSType           string
		OSState          string
		HyperVGeneration string
		Features         []struct{ Name, Value string }
	}
}

var versionPart = regexp.MustCompile(`(?i)/versions/[^/]+$`)

// checkImage looks at the image, and in galleries at its definition, which must be of
// the VMs' security type.
func (p *Provider) checkImage(ctx context.Context) error {
	const key = "AZURE_IMAGE_ID"
	id, version := p.cfg.ImageID, apiGallery
	kind := kindOfImage(id)
	path := id
	switch kind {
	case imageManaged:
		version = apiVM
	case imageShared, imageCommunity: // their ids are no paths: the API has them by region
		path = "/subscriptions/" + p.cfg.SubscriptionID + "/providers/Microsoft.Compute/locations/" + p.cfg.Region + id
	}
	var im image
	if versionPart.MatchString(path) {
		var any struct{}
		if err := p.arm.get(ctx, path, version, familyOther, &any); err != nil {
			return checked(ctx, key, id, err)
		}
		path = versionPart.ReplaceAllString(path, "")
	}
	if err := p.arm.get(ctx, path, version, familyOther, &im); err != nil {
		return checked(ctx, key, id, err)
	}
	if t := im.Properties.OSType; t != "" && !strings.EqualFold(t, "Linux") {
		return badKey(key, "names an image of %s", t)
	}
	if s := im.Properties.OSState; s != "" && !strings.EqualFold(s, "Generalized") {
		return badKey(key, "names a %s image; pod VMs need a generalized one, which is given its user data", strings.ToLower(s))
	}
	if kind == imageManaged {
		if p.cfg.SecurityType == SecurityConfidential {
			return badKey(key, "is a managed image, which cannot make confidential VMs; use a gallery, or set DISABLECVM to true")
		}
		return p.inRegion(key, im.Location)
	}
	return im.suits(p.cfg.SecurityType)
}

// suits compares the definition's security type with the VMs'. Values:
// learn.microsoft.com, "Trusted Launch for Azure VMs" and "Create a custom image for
// confidential VMs".
func (im image) suits(security string) error {
	of := SecurityStandard
	for _, f := range im.Properties.Features {
		if strings.EqualFold(f.Name, "SecurityType") {
			of = f.Value
		}
	}
	// TrustedLaunchAndConfidentialVmSupported, ConfidentialVmSupported, ConfidentialVM, ...
	has := func(what string) bool { return strings.Contains(strings.ToLower(of), strings.ToLower(what)) }
	switch {
	case security == SecurityConfidential && !has("ConfidentialVM"):
		return badKey("AZURE_IMAGE_ID", "names an image definition of security type %s, which cannot make confidential VMs; publish the image again, or set DISABLECVM to true", of)
	case security == SecurityTrusted && !has("TrustedLaunch"):
		return badKey("AZURE_IMAGE_ID", "names an image definition of security type %s, which cannot make VMs with trusted launch; publish the image again, or set AZURE_SECURITY_TYPE to %s", of, SecurityStandard)
	case security == SecurityStandard && of != SecurityStandard && !has("Supported"):
		return badKey("AZURE_IMAGE_ID", "names an image definition that makes only %s VMs; set AZURE_SECURITY_TYPE to %s", of, of)
	}
	return nil
}

func (p *Provider) checkSizes(ctx context.Context) error {
	c, err := p.catalog(ctx)
	if err != nil {
		return err
	}
	return c.problem
}
