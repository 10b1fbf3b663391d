// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"net/http"
	"strings"
	"testing"
)

func rule(change ...func(map[string]any)) map[string]any {
	b := map[string]any{"properties": map[string]any{"priority": 200.0, "direction": "Inbound", "access": "Allow", "protocol": "Udp", "sourcePortRange": "*",
		"destinationPortRange": "9000", "sourceAddressPrefix": "VirtualNetwork", "destinationAddressPrefix": "10.0.0.0/24"}}
	for _, f := range change {
		f(b)
	}
	return b
}

// TestRules: a security group and its rules.
func TestRules(t *testing.T) {
	c := start(t, Config{})
	group := Config{}.SecurityGroupID("")
	c.finish(c.want(http.StatusCreated, http.MethodPut, group+"/securityRules/vxlan", rule()))
	c.finish(c.want(http.StatusOK, http.MethodPut, group+"/securityRules/vxlan", rule()))
	c.refused(http.StatusBadRequest, "SecurityRuleConflict", http.MethodPut, group+"/securityRules/other", rule())
	c.finish(c.want(http.StatusCreated, http.MethodPut, group+"/securityRules/other", rule(with("properties.priority", 201.0))))
	for code, change := range map[string]func(map[string]any){
		"InvalidSecurityRule":              with("properties.priority", 99.0),
		"SecurityRuleInvalidPortRange":     with("properties.destinationPortRange", "9000-8000"),
		"SecurityRuleInvalidAddressPrefix": with("properties.sourceAddressPrefix", "10.0.0.0/33"),
		"InvalidRequestContent":            with("properties.protocol", "UDP"),
		"InvalidParameter":                 with("properties.access", nil),
	} {
		c.refused(http.StatusBadRequest, code, http.MethodPut, group+"/securityRules/x", rule(change))
	}
	c.refused(http.StatusNotFound, "ParentResourceNotFound", http.MethodPut, Config{}.SecurityGroupID("none")+"/securityRules/x", rule())
	got := c.want(http.StatusOK, http.MethodGet, group, nil)
	if n := len(list(got.body, "properties.securityRules")); n != 2 {
		t.Errorf("%d rules in %s", n, got.raw)
	}
	if got := names(c.want(http.StatusOK, http.MethodGet, group+"/securityRules", nil)); got != "[other vxlan]" {
		t.Errorf("the list has %s", got)
	}
	c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a")))
	c.refused(http.StatusBadRequest, "InUseNetworkSecurityGroupCannotBeDeleted", http.MethodDelete, group, nil)
	c.refused(http.StatusBadRequest, "InUseSubnetCannotBeDeleted", http.MethodDelete, Config{}.SubnetID(Subnet{}), nil)
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, group+"/securityRules/other", nil))
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, vmID("a"), nil))
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, group, nil))
	c.refused(http.StatusNotFound, "ResourceNotFound", http.MethodGet, group+"/securityRules/vxlan", nil)
}

// TestInterfaces: one that is made by itself, and a machine that has it.
func TestInterfaces(t *testing.T) {
	c := start(t, Config{})
	nic := id("Microsoft.Network/networkInterfaces", "n")
	sub := map[string]any{"id": Config{}.SubnetID(Subnet{})}
	body := map[string]any{"location": DefaultRegion, "properties": map[string]any{"ipConfigurations": []any{map[string]any{"name": "ip", "properties": map[string]any{
		"subnet": sub, "privateIPAllocationMethod": "Static", "privateIPAddress": "10.0.0.77"}}}}}
	a := c.want(http.StatusCreated, http.MethodPut, nic, body)
	if text(list(a.body, "properties.ipConfigurations")[0], "properties.privateIPAddress") != "10.0.0.77" || !strings.HasPrefix(text(a.body, "properties.macAddress"), "02-0D-3A-") {
		t.Errorf("interface: %s", a.raw)
	}
	c.finish(a)
	c.refused(http.StatusBadRequest, "PrivateIPAddressInUse", http.MethodPut, nic+"2", body)
	ref := func(b map[string]any) {
		put(b, "properties.networkProfile", map[string]any{"networkInterfaces": []any{map[string]any{"id": nic, "properties": map[string]any{"primary": true}}}})
	}
	c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a", ref)))
	c.refused(http.StatusBadRequest, "NicInUse", http.MethodPut, vmID("b"), vmBody("b", ref))
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, vmID("a"), nil))
	c.finish(c.want(http.StatusOK, http.MethodPatch, nic, map[string]any{"tags": map[string]any{"a": "b"}}))
	if l := c.s.Leaks(map[string]string{"A": "b"}); len(l) != 1 {
		t.Errorf("left: %q, want the interface", l)
	}
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, nic, nil))
	for code, b := range map[string]map[string]any{
		"PublicIPBasicSkuIsRetired":                {"location": DefaultRegion, "properties": map[string]any{"publicIPAllocationMethod": "Static"}},
		"StandardSkuPublicIPAddressesMustBeStatic": {"location": DefaultRegion, "sku": map[string]any{"name": "Standard"}},
	} {
		c.refused(http.StatusBadRequest, code, http.MethodPut, id("Microsoft.Network/publicIPAddresses", "p"), b)
	}
	c.refused(http.StatusBadRequest, "InvalidCIDRNotation", http.MethodPut, Config{}.SubnetID(Subnet{Name: "s2"}), map[string]any{"properties": map[string]any{"addressPrefix": "10.0.1.1/24"}})
	c.finish(c.want(http.StatusCreated, http.MethodPut, Config{}.SubnetID(Subnet{Name: "s2"}), map[string]any{"properties": map[string]any{"addressPrefix": "10.0.1.0/24"}}))
}
