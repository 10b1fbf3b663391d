// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"encoding/base64"
	"net/http"
	"strings"
	"testing"
)

// TestStrict: each of these would be refused by the real service, or might be.
// Long: it is a table.
func TestStrict(t *testing.T) {
	c := start(t, Config{Images: []Image{
		{ID: Config{}.ImageID("", "", "1.0.0"), SecurityType: "TrustedLaunchAndConfidentialVmSupported", SizeGB: 4},
		{ID: Config{}.ImageID("", "cvm", "1.0.0"), SecurityType: "ConfidentialVM"},
		{ID: Config{}.ImageID("", "plain", "1.0.0")},
		{ID: Config{}.ImageID("", "gen1", "1.0.0"), Generation: "V1"},
		{ID: Config{}.ImageID("", "arm", "1.0.0"), Arch: "Arm64"},
		{ID: Config{}.ImageID("", "special", "1.0.0"), State: "Specialized"},
		{ID: "/CommunityGalleries/g/Images/i/Versions/1.0.0"},
	}})
	image := func(name string) func(map[string]any) {
		return with("properties.storageProfile.imageReference.id", Config{}.ImageID("", name, "1.0.0"))
	}
	size := func(name string) func(map[string]any) { return with("properties.hardwareProfile.vmSize", name) }
	cvm := func(b map[string]any) {
		size("Standard_DC2as_v5")(b)
		put(b, "properties.securityProfile", map[string]any{"securityType": "ConfidentialVM", "uefiSettings": map[string]any{"vTpmEnabled": true, "secureBootEnabled": true}})
		put(b, "properties.storageProfile.osDisk.managedDisk.securityProfile", map[string]any{"securityEncryptionType": "VMGuestStateOnly"})
	}
	nic := func(path string, v any) func(map[string]any) {
		return func(b map[string]any) {
			put(list(b, "properties.networkProfile.networkInterfaceConfigurations")[0].(map[string]any), path, v)
		}
	}
	ephemeral := func(b map[string]any) {
		size("Standard_D2ds_v5")(b)
		put(b, "properties.storageProfile.osDisk.diffDiskSettings", map[string]any{"option": "Local"})
	}
	type edits = []func(map[string]any)
	for name, tc := range map[string]struct {
		change edits
		code   string // "": accepted
		target string
	}{
		"as it is":                   {nil, "", ""},
		"unknown property":           {edits{with("properties.storageProfile.osDisk.deleteoption", "Delete")}, "InvalidRequestContent", "properties.storageProfile.osDisk.deleteoption"},
		"unknown property in a list": {edits{nic("properties.deleteOptions", "Delete")}, "InvalidRequestContent", "properties.networkProfile.networkInterfaceConfigurations[0].properties.deleteOptions"},
		"wrong case of a value":      {edits{nic("properties.deleteOption", "delete")}, "InvalidRequestContent", "properties.networkProfile.networkInterfaceConfigurations[0].properties.deleteOption"},
		"a number for a text":        {edits{with("properties.osProfile.adminUsername", 7.0)}, "InvalidRequestContent", "properties.osProfile.adminUsername"},
		"a fraction for an integer":  {edits{with("properties.storageProfile.osDisk.diskSizeGB", 10.5)}, "InvalidRequestContent", "properties.storageProfile.osDisk.diskSizeGB"},
		"read-only is ignored":       {edits{with("properties.vmId", "mine")}, "", ""},
		"no location":                {edits{with("location", nil)}, "InvalidParameter", "location"},
		"another region":             {edits{with("location", "eastus")}, "LocationNotAvailableForResourceType", "location"},
		"a region as people write":   {edits{with("location", "West Europe")}, "", ""},
		"tag with a slash":           {edits{with("tags", map[string]any{"a/b": "c"})}, "InvalidTagNameCharacters", "tags"},
		"tags that differ by case":   {edits{with("tags", map[string]any{"a": "1", "A": "2"})}, "InvalidTagName", "tags"},
		"long tag value":             {edits{with("tags", map[string]any{"a": strings.Repeat("x", 257)})}, "InvalidTagValueLength", "tags"},
		"no size":                    {edits{with("properties.hardwareProfile", nil)}, "InvalidParameter", "vmSize"},
		"unknown size":               {edits{size("Standard_X1")}, "InvalidParameter", "vmSize"},
		"unknown zone":               {edits{with("zones", []any{"4"})}, "InvalidAvailabilityZone", "zones"},
		"two zones":                  {edits{with("zones", []any{"1", "2"})}, "InvalidRequestFormat", "zones"},
		"a zone without the size":    {edits{cvm, with("zones", []any{"3"})}, "SkuNotAvailable", "vmSize"},
		"a zone":                     {edits{with("zones", []any{"3"})}, "", ""},
		"unknown image":              {edits{image("nothing")}, "GalleryImageNotFound", "imageReference"},
		"image of a marketplace":     {edits{with("properties.storageProfile.imageReference", map[string]any{"publisher": "p", "offer": "o", "sku": "s", "version": "latest"})}, "PlatformImageNotFound", "imageReference"},
		"community image as an id":   {edits{with("properties.storageProfile.imageReference.id", "/CommunityGalleries/g/Images/i/Versions/1.0.0")}, "InvalidParameter", "imageReference.id"},
		"community image":            {edits{with("properties.storageProfile.imageReference", map[string]any{"communityGalleryImageId": "/CommunityGalleries/g/Images/i/Versions/1.0.0"})}, "", ""},
		"generation 1 on a CVM size": {edits{cvm, image("gen1")}, "BadRequest", ""},
		"arm image on x64":           {edits{image("arm")}, "BadRequest", ""},
		"arm image on arm":           {edits{image("arm"), size("Standard_D2ps_v5")}, "", ""},
		"disk smaller than image":    {edits{with("properties.storageProfile.osDisk.diskSizeGB", 3.0)}, "ResizeDiskError", "osDisk.diskSizeGB"},
		"empty OS disk":              {edits{with("properties.storageProfile.osDisk.createOption", "Empty")}, "InvalidParameter", "osDisk.createOption"},
		"no osProfile":               {edits{with("properties.osProfile", nil)}, "InvalidParameter", "osProfile"},
		"specialized":                {edits{image("special"), with("properties.osProfile", nil)}, "", ""},
		"specialized with osProfile": {edits{image("special")}, "InvalidParameter", "osProfile"},
		"no user":                    {edits{with("properties.osProfile.adminUsername", "")}, "InvalidParameter", "adminUsername"},
		"forbidden user":             {edits{with("properties.osProfile.adminUsername", "root")}, "InvalidParameter", "adminUsername"},
		"long host name":             {edits{with("properties.osProfile.computerName", strings.Repeat("x", 65))}, "InvalidParameter", "osProfile.computerName"},
		"no way to log in":           {edits{with("properties.osProfile.linuxConfiguration.ssh", nil)}, "InvalidParameter", "linuxConfiguration"},
		"password and no password":   {edits{with("properties.osProfile.adminPassword", "Abcdef123456")}, "InvalidParameter", "adminPassword"},
		"weak password":              {edits{with("properties.osProfile.linuxConfiguration", nil), with("properties.osProfile.adminPassword", "abcdef")}, "InvalidParameter", "adminPassword"},
		"password":                   {edits{with("properties.osProfile.linuxConfiguration", nil), with("properties.osProfile.adminPassword", "Abcdef123456")}, "", ""},
		"key elsewhere":              {edits{sshKey("/root/.ssh/authorized_keys", testKey)}, "InvalidParameter", "linuxConfiguration.ssh.publicKeys.path"},
		"no key":                     {edits{sshKey("/home/peerpod/.ssh/authorized_keys", "ssh-ed25519 AAAA")}, "InvalidParameter", "linuxConfiguration.ssh.publicKeys.keyData"},
		"user data that is too long": {edits{with("properties.userData", base64.StdEncoding.EncodeToString(make([]byte, 64<<10+1)))}, "InvalidParameter", "userData"},
		"user data as it may be":     {edits{with("properties.userData", base64.StdEncoding.EncodeToString(make([]byte, 64<<10)))}, "", ""},
		"user data in clear":         {edits{with("properties.userData", "#cloud-config")}, "InvalidParameter", "userData"},
		"long custom data":           {edits{with("properties.osProfile.customData", base64.StdEncoding.EncodeToString(make([]byte, 64<<10)))}, "InvalidParameter", "customData"},

		"CVM":                          {edits{cvm}, "", ""},
		"CVM size without":             {edits{size("Standard_DC2as_v5")}, "BadRequest", ""},
		"CVM on another size":          {edits{cvm, size("Standard_D2as_v5")}, "BadRequest", ""},
		"CVM image without":            {edits{image("cvm")}, "BadRequest", ""},
		"CVM of an image that is none": {edits{cvm, image("plain")}, "BadRequest", ""},
		"CVM without encryption type":  {edits{cvm, with("properties.storageProfile.osDisk.managedDisk.securityProfile", nil)}, "InvalidParameter", "osDisk.managedDisk.securityProfile"},
		"CVM without vTPM":             {edits{cvm, with("properties.securityProfile.uefiSettings.vTpmEnabled", false)}, "InvalidParameter", "securityProfile.uefiSettings.vTpmEnabled"},
		"encrypted disk, no secure boot": {edits{cvm, with("properties.securityProfile.uefiSettings.secureBootEnabled", false),
			with("properties.storageProfile.osDisk.managedDisk.securityProfile.securityEncryptionType", "DiskWithVMGuestState")}, "InvalidParameter", "securityProfile.uefiSettings.secureBootEnabled"},
		"encryption type without CVM": {edits{with("properties.storageProfile.osDisk.managedDisk.securityProfile", map[string]any{"securityEncryptionType": "VMGuestStateOnly"})}, "InvalidParameter", "osDisk.managedDisk.securityProfile"},
		"UEFI settings alone":         {edits{with("properties.securityProfile", map[string]any{"uefiSettings": map[string]any{"vTpmEnabled": true}})}, "InvalidParameter", "securityProfile.uefiSettings"},
		"trusted launch":              {edits{with("properties.securityProfile", map[string]any{"securityType": "TrustedLaunch", "uefiSettings": map[string]any{"vTpmEnabled": true}})}, "", ""},

		"ephemeral disk":                {edits{ephemeral, with("properties.storageProfile.osDisk.managedDisk.storageAccountType", "Standard_LRS")}, "", ""},
		"ephemeral disk, no cache":      {edits{ephemeral, with("properties.storageProfile.osDisk.caching", "ReadWrite")}, "InvalidParameter", "osDisk.caching"},
		"ephemeral disk that stays":     {edits{ephemeral, with("properties.storageProfile.osDisk.deleteOption", "Detach")}, "InvalidParameter", "osDisk.deleteOption"},
		"ephemeral disk on no disk":     {edits{ephemeral, size("Standard_D2as_v5")}, "OperationNotAllowed", "diffDiskSettings"},
		"ephemeral disk too large":      {edits{ephemeral, with("properties.storageProfile.osDisk.diskSizeGB", 51.0)}, "OperationNotAllowed", "diffDiskSettings"},
		"ephemeral spot is deallocated": {edits{ephemeral, with("properties.priority", "Spot"), with("properties.evictionPolicy", "Deallocate")}, "InvalidParameter", "evictionPolicy"},

		"spot":                        {edits{with("properties.priority", "Spot"), with("properties.evictionPolicy", "Delete"), with("properties.billingProfile", map[string]any{"maxPrice": -1.0})}, "", ""},
		"spot on a size without":      {edits{size("Standard_B2s"), with("properties.priority", "Spot")}, "BadRequest", "priority"},
		"eviction policy, not spot":   {edits{with("properties.evictionPolicy", "Delete")}, "InvalidParameter", "evictionPolicy"},
		"price, not spot":             {edits{with("properties.billingProfile", map[string]any{"maxPrice": 1.0})}, "InvalidParameter", "billingProfile"},
		"no interface":                {edits{with("properties.networkProfile.networkInterfaceConfigurations", nil)}, "InvalidParameter", "networkProfile"},
		"no network version":          {edits{with("properties.networkProfile.networkApiVersion", nil)}, "InvalidParameter", "networkProfile.networkApiVersion"},
		"unknown subnet":              {edits{nic("properties.ipConfigurations", []any{map[string]any{"name": "ip", "properties": map[string]any{"subnet": map[string]any{"id": "/x"}}}})}, "InvalidResourceReference", ""},
		"unknown security group":      {edits{nic("properties.networkSecurityGroup", map[string]any{"id": Config{}.SecurityGroupID("x")})}, "InvalidResourceReference", ""},
		"accelerated on a slow size":  {edits{size("Standard_B2s"), nic("properties.enableAcceleratedNetworking", true)}, "VMSizeIsNotPermittedToEnableAcceleratedNetworking", "networkInterfaceConfigurations[0]"},
		"basic public address":        {edits{publicAddress("Basic", "Static")}, "PublicIPBasicSkuIsRetired", "networkInterfaceConfigurations[0].publicIPAddressConfiguration.sku"},
		"public address that changes": {edits{publicAddress("Standard", "Dynamic")}, "StandardSkuPublicIPAddressesMustBeStatic", "networkInterfaceConfigurations[0].publicIPAddressConfiguration"},
		"public address":              {edits{publicAddress("Standard", "Static")}, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			c.t = t
			vm := vmID("m" + strings.Map(func(r rune) rune {
				if r >= 'a' && r <= 'z' {
					return r
				}
				return '-'
			}, strings.ToLower(name)) + "x")
			a := c.do(http.MethodPut, vm, vmBody("m", tc.change...))
			if tc.code == "" {
				if a.status != http.StatusCreated {
					t.Fatalf("%d %s", a.status, a.raw)
				}
				c.finish(a)
				c.finish(c.want(http.StatusAccepted, http.MethodDelete, vm, nil))
			} else if a.status < 400 || a.code() != tc.code || text(a.body, "error.target") != tc.target {
				t.Fatalf("%d %s, want %s of %s", a.status, a.raw, tc.code, tc.target)
			}
			if l := c.s.Leaks(nil); len(l) > 0 {
				t.Fatalf("left behind: %q", l)
			}
		})
	}
}

func sshKey(path, key string) func(map[string]any) {
	return with("properties.osProfile.linuxConfiguration.ssh.publicKeys", []any{map[string]any{"path": path, "keyData": key}})
}

func publicAddress(sku, method string) func(map[string]any) {
	return func(b map[string]any) {
		n := list(b, "properties.networkProfile.networkInterfaceConfigurations")[0]
		put(list(n, "properties.ipConfigurations")[0].(map[string]any), "properties.publicIPAddressConfiguration", map[string]any{"name": "pub",
			"sku": map[string]any{"name": sku}, "properties": map[string]any{"deleteOption": "Delete", "publicIPAllocationMethod": method}})
	}
}

// TestPaths: what is wrong with a request besides its body.
func TestPaths(t *testing.T) {
	c := start(t, Config{})
	for _, tc := range []struct {
		status             int
		code, method, path string
	}{
		{400, "NoRegisteredProviderFound", "GET", vmID("a") + "?api-version=2020-01-01"},
		{404, "ResourceNotFound", "GET", vmID("a")},
		{404, "ResourceGroupNotFound", "GET", strings.Replace(vmID("a"), "/pods/", "/other/", 1)},
		{404, "SubscriptionNotFound", "GET", strings.Replace(vmID("a"), DefaultSubscription, "22222222-2222-3333-4444-555555555555", 1)},
		{404, "InvalidResourceType", "GET", id("Microsoft.Compute/virtualMachine", "a")},
		{405, "MethodNotAllowed", "POST", vmID("a")},
		{400, "InvalidParameter", "PUT", vmID("-a")},
		{400, "InvalidParameter", "PUT", vmID(strings.Repeat("a", 81))},
	} {
		var body any
		if tc.method == "PUT" {
			body = vmBody("a")
		}
		c.refused(tc.status, tc.code, tc.method, tc.path, body)
	}
	c.refused(400, "InvalidRequestContent", "PUT", vmID("a"), `{"location":`)
	c.refused(400, "InvalidRequestContent", "PUT", vmID("a"), nil)
	r := c.request("GET", "https://management.test"+vmID("a"), nil)
	if a := c.send(r); a.code() != "MissingApiVersionParameter" {
		t.Errorf("without a version: %s", a.raw)
	}
	// Ids are compared without case.
	c.finish(c.want(201, "PUT", vmID("a"), vmBody("a")))
	c.want(200, "GET", strings.ToUpper(vmID("A")), nil)
}
