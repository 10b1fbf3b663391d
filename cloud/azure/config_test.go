// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
)

func TestConfig(t *testing.T) {
	good := newWorld(t, fakearm.Config{}).cfg
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		change func(*Config)
		want   []string
	}{
		{func(c *Config) { *c = Config{Credentials: Credentials{ClientSecret: "hush"}} },
			[]string{"AZURE_SUBSCRIPTION_ID is not set", "AZURE_REGION is not set", "AZURE_RESOURCE_GROUP is not set", "AZURE_SUBNET_ID is not set", "AZURE_IMAGE_ID is not set", "AZURE_TENANT_ID is not set", "AZURE_CLIENT_ID is not set"}},
		{func(c *Config) { c.SubscriptionID = "mine" }, []string{`AZURE_SUBSCRIPTION_ID "mine"`}},
		{func(c *Config) { c.ResourceGroup = "a/b" }, []string{`AZURE_RESOURCE_GROUP "a/b"`}},
		{func(c *Config) { c.SubnetID = "default" }, []string{`AZURE_SUBNET_ID "default"`}},
		{func(c *Config) { c.NSGID = "open" }, []string{`AZURE_NSG_ID "open"`}},
		{func(c *Config) { c.ImageID = "ubuntu" }, []string{`AZURE_IMAGE_ID "ubuntu"`}},
		{func(c *Config) { c.SecurityType = "Secret" }, []string{`AZURE_SECURITY_TYPE "Secret"`}},
		{func(c *Config) { c.SecurityType, c.SecureBoot = SecurityStandard, true }, []string{"ENABLE_SECURE_BOOT"}},
		{func(c *Config) { c.Spot = "maybe" }, []string{`AZURE_SPOT "maybe"`}},
		{func(c *Config) { c.Zones = []string{"eastus-1"} }, []string{`AZURE_ZONES "eastus-1"`}},
		{func(c *Config) { c.RootVolumeGiB = 5000 }, []string{"ROOT_VOLUME_SIZE 5000"}},
		{func(c *Config) { c.SSHUser = "root" }, []string{`SSH_USERNAME "root"`}},
		{func(c *Config) { c.Endpoint = "http://management.azure.com" }, []string{`AZURE_ENDPOINT "http://management.azure.com" is plain HTTP`}},
		{func(c *Config) { c.AuthorityHost = "login" }, []string{`AZURE_AUTHORITY_HOST "login"`}},
		{func(c *Config) { c.Endpoint = "https://user:hush@host" }, []string{"AZURE_ENDPOINT"}},
		{func(c *Config) { c.Endpoint, c.AuthorityHost = "http://10.1.2.3:8080", "http://127.0.0.1:1/" }, nil},
		{func(c *Config) { c.Credentials = Credentials{} }, nil},
		{func(c *Config) { c.SubscriptionID, c.Region = strings.ToUpper(c.SubscriptionID), "West Europe" }, nil},
		{func(c *Config) { c.ImageID = "/CommunityGalleries/g-1/images/i/versions/1.0.0" }, nil},
	} {
		c := good
		tc.change(&c)
		_, err := New(c)
		if tc.want == nil && err != nil || tc.want != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("want %q, got %v", tc.want, err)
			continue
		}
		for _, want := range tc.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("want %q, got %v", want, err)
			}
		}
	}
}

func TestClouds(t *testing.T) {
	for _, tc := range []struct {
		c        Config
		endpoint string
		login    string
		known    bool
	}{
		{Config{}, "https://management.azure.com", "https://login.microsoftonline.com/", true},
		{Config{Endpoint: "https://management.usgovcloudapi.net/"}, "https://management.usgovcloudapi.net", "https://login.microsoftonline.us/", true},
		{Config{Endpoint: "https://management.chinacloudapi.cn"}, "https://management.chinacloudapi.cn", "https://login.chinacloudapi.cn/", true},
		{Config{Endpoint: "https://arm.local", AuthorityHost: "https://sts.local"}, "https://arm.local", "https://sts.local", false},
		{Config{AuthorityHost: "https://sts.local"}, "https://management.azure.com", "https://sts.local", false},
	} {
		conf, known, err := cloudOf(tc.c)
		if err != nil || conf.Services["resourceManager"].Endpoint != tc.endpoint || conf.ActiveDirectoryAuthorityHost != tc.login || known != tc.known {
			t.Errorf("%+v: %+v, %v, %v", tc.c, conf, known, err)
		}
	}
}

// TestCheck: everything that is wrong is said at once, with the key that names it.
func TestCheck(t *testing.T) {
	for name, tc := range map[string]struct {
		cfg    fakearm.Config
		change func(*Config)
		want   []string // nil: all is well
	}{
		"all is well":          {},
		"all is well in zones": {change: func(c *Config) { c.Zones = []string{"1", "2"} }},
		"subscription":         {change: func(c *Config) { c.SubscriptionID = strings.Repeat("0", 8) + c.SubscriptionID[8:] }, want: []string{"AZURE_SUBSCRIPTION_ID"}},
		"all that is named": {change: func(c *Config) {
			c.ResourceGroup, c.SubnetID, c.NSGID, c.ImageID = "nogroup", c.SubnetID+"x", c.NSGID+"x", c.ImageID+"9"
			c.InstanceSizes = append(c.InstanceSizes, "Standard_X99", "DC2as_v5", "Standard_D4as_v5")
		}, want: []string{"AZURE_RESOURCE_GROUP", "AZURE_SUBNET_ID", "AZURE_NSG_ID", "AZURE_IMAGE_ID", `"Standard_X99"`, "did you mean Standard_DC2as_v5?", "Standard_D4as_v5: it cannot carry confidential"}},
		"zones":  {change: func(c *Config) { c.Zones = []string{"3"} }, want: []string{"AZURE_ZONES (3) but in 1, 2"}},
		"region": {change: func(c *Config) { c.Region = "eastus" }, want: []string{"AZURE_SUBNET_ID is in westeurope and AZURE_REGION is eastus", "AZURE_NSG_ID is in"}},
		"image of another kind": {cfg: fakearm.Config{Images: []fakearm.Image{{ID: imageBeside("plain"), SecurityType: ""}}},
			change: func(c *Config) { c.ImageID = imageBeside("plain") }, want: []string{"AZURE_IMAGE_ID", "cannot make confidential VMs"}},
		"image of confidential VMs only": {cfg: fakearm.Config{Images: []fakearm.Image{{ID: imageBeside("cvm"), SecurityType: "ConfidentialVM"}}},
			change: func(c *Config) {
				c.ImageID, c.SecurityType, c.InstanceSizes, c.InstanceSize = imageBeside("cvm"), SecurityTrusted, nil, "Standard_D2as_v5"
			}, want: []string{"AZURE_IMAGE_ID", "cannot make VMs with trusted launch"}},
		"confidential sizes without it": {change: func(c *Config) { c.SecurityType = SecurityStandard }, want: []string{small, large, "carries confidential VMs only"}},
		"specialized": {cfg: fakearm.Config{Images: []fakearm.Image{{ID: imageBeside("s"), SecurityType: "ConfidentialVM", State: "Specialized"}}},
			change: func(c *Config) { c.ImageID = imageBeside("s") }, want: []string{"AZURE_IMAGE_ID", "specialized"}},
		"community gallery": {cfg: fakearm.Config{Images: []fakearm.Image{{ID: "/CommunityGalleries/pub/images/podvm/versions/1.0.0", SecurityType: "ConfidentialVmSupported"}}},
			change: func(c *Config) { c.ImageID = "/CommunityGalleries/pub/images/podvm/versions/1.0.0" }},
		"no such shared image": {change: func(c *Config) { c.ImageID = "/SharedGalleries/pub/images/podvm/versions/1.0.0" }, want: []string{"AZURE_IMAGE_ID"}},
		"forbidden": {cfg: fakearm.Config{Principals: []fakearm.Principal{{Client: fakearm.DefaultClient, Secret: fakearm.DefaultSecret,
			NotActions: []string{"Microsoft.Compute/skus/read", "Microsoft.Network/virtualNetworks/subnets/read"}}}},
			want: []string{"'Microsoft.Compute/skus/read'", "'Microsoft.Network/virtualNetworks/subnets/read'", "AZURE_SUBNET_ID"}},
		"SSH key": {change: func(c *Config) { c.SSHPublicKeyFile = "config_test.go" }, want: []string{"AZURE_SSH_PUBLIC_KEY_FILE names config_test.go"}},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, tc.cfg, func(w *world) {
				var change []func(*Config)
				if tc.change != nil {
					change = append(change, tc.change)
				}
				err := w.provider(change...).Check(w.Context())
				if tc.want == nil && err != nil || tc.want != nil && err == nil {
					t.Errorf("Check: %v, want %q", err, tc.want)
				}
				for _, want := range tc.want {
					if err != nil && !strings.Contains(err.Error(), want) {
						t.Errorf("Check lacks %q: %v", want, err)
					}
				}
			})
		})
	}
}

func imageBeside(name string) string { return strings.Replace(testImage, "/podvm/", "/"+name+"/", 1) }

// TestLeastPrivilege: what a whole life needs, which the documentation's role is made of.
func TestLeastPrivilege(t *testing.T) {
	inWorld(t, fakearm.Config{Principals: []fakearm.Principal{
		{Client: fakearm.DefaultClient, Secret: fakearm.DefaultSecret, Actions: Actions},
	}}, func(w *world) {
		p := w.provider(func(c *Config) { c.PublicIP = true })
		if err := p.Check(w.Context()); err != nil {
			t.Error(err)
		}
		inst := w.create(p, request(p))
		if _, err := p.Get(w.Context(), inst.ID); err != nil {
			t.Error(err)
		}
		w.gone(p, inst.ID)
		w.arm.Inject(fakearm.Fault{Method: http.MethodPut, Type: vms, Code: "AllocationFailed", Leave: true})
		inst = w.create(p, request(p))
		w.gone(p, inst.ID)
		if _, err := p.List(w.Context(), owner); err != nil {
			t.Error(err)
		}
		used := w.arm.Actions()
		for _, a := range Actions {
			// The emulation knows no join of an interface or address to what they are
			// made for; images of other kinds are not read here.
			known := !strings.Contains(a, "*") && a != "Microsoft.Compute/images/read" &&
				a != "Microsoft.Network/networkInterfaces/join/action" && a != "Microsoft.Network/publicIPAddresses/join/action"
			if known && used[a] == 0 {
				t.Errorf("%s is never needed", a)
			}
		}
	})
}

// body is the VM that a configuration asks for.
func (w *world) body(change func(*Config)) map[string]any {
	w.Helper()
	p := w.provider(change)
	w.create(p, request(p))
	vm := w.only()
	t := things{p.place, vm.Name}
	var doc map[string]any
	if err := p.arm.get(w.Context(), t.vm(), apiVM, familyGet, &doc); err != nil {
		w.Fatal(err)
	}
	return doc
}

// TestBodies: what configurations become, on a service that refuses what Azure refuses.
func TestBodies(t *testing.T) {
	shared, community := "/SharedGalleries/abc/images/podvm/versions/1.0.0", "/CommunityGalleries/abc-1/images/podvm/versions/1.0.0"
	managed := "/subscriptions/" + fakearm.DefaultSubscription + "/resourceGroups/pods/providers/Microsoft.Compute/images/old"
	both := "TrustedLaunchAndConfidentialVmSupported"
	cfg := fakearm.Config{Images: []fakearm.Image{{ID: shared, SecurityType: both}, {ID: community, SecurityType: both}, {ID: managed}}}
	ordinary := func(size string) func(*Config) {
		return func(c *Config) { c.SecurityType, c.InstanceSize, c.InstanceSizes = SecurityStandard, size, nil }
	}
	for name, tc := range map[string]struct {
		change func(*Config)
		want   map[string]any
	}{
		"confidential": {func(c *Config) { c.SecureBoot = true }, map[string]any{
			"properties.securityProfile.securityType": "ConfidentialVM", "properties.securityProfile.uefiSettings.vTpmEnabled": true,
			"properties.securityProfile.uefiSettings.secureBootEnabled":                           true,
			"properties.storageProfile.osDisk.managedDisk.securityProfile.securityEncryptionType": "VMGuestStateOnly",
			"properties.storageProfile.osDisk.deleteOption":                                       "Delete",
			"properties.storageProfile.osDisk.managedDisk.storageAccountType":                     "Premium_LRS",
			"properties.diagnosticsProfile.bootDiagnostics.enabled":                               true,
			"properties.osProfile.adminUsername":                                                  "peerpod",
			"properties.osProfile.computerName":                                                   "podvm-web-1",
			"properties.osProfile.linuxConfiguration.provisionVMAgent":                            false,
			"properties.priority":                         nil,
			"properties.storageProfile.imageReference.id": testImage,
			"tags.team": "blue", "tags.Name": "podvm-web-1", "tags.peerpod-cluster": "c1",
		}},
		"trusted": {func(c *Config) {
			ordinary("Standard_D2as_v5")(c)
			c.SecurityType = SecurityTrusted
		}, map[string]any{"properties.securityProfile.securityType": "TrustedLaunch", "properties.storageProfile.osDisk.managedDisk.securityProfile": nil}},
		"standard":        {ordinary("Standard_D2as_v5"), map[string]any{"properties.securityProfile": nil, "properties.hardwareProfile.vmSize": "Standard_D2as_v5"}},
		"spot":            {func(c *Config) { c.Spot = MarketOnly }, map[string]any{"properties.priority": "Spot", "properties.evictionPolicy": "Delete", "properties.billingProfile.maxPrice": -1.0}},
		"shared image":    {func(c *Config) { c.ImageID = shared }, map[string]any{"properties.storageProfile.imageReference.sharedGalleryImageId": shared, "properties.storageProfile.imageReference.id": nil}},
		"community image": {func(c *Config) { c.ImageID = community }, map[string]any{"properties.storageProfile.imageReference.communityGalleryImageId": community}},
		"managed image":   {func(c *Config) { ordinary("Standard_D2as_v5")(c); c.ImageID = managed }, map[string]any{"properties.storageProfile.imageReference.id": managed}},
		"disk of a size":  {func(c *Config) { c.RootVolumeGiB = 40 }, map[string]any{"properties.storageProfile.osDisk.diskSizeGB": 40.0}},
		"ephemeral, cache": {func(c *Config) { ordinary("Standard_D2ds_v5")(c); c.EphemeralOSDisk = true }, map[string]any{
			"properties.storageProfile.osDisk.diffDiskSettings.placement": "CacheDisk", "properties.storageProfile.osDisk.caching": "ReadOnly"}},
		"ephemeral, too large for the cache": {func(c *Config) { ordinary("Standard_D2ds_v5")(c); c.EphemeralOSDisk, c.RootVolumeGiB = true, 60 }, map[string]any{
			"properties.storageProfile.osDisk.diffDiskSettings.placement": "ResourceDisk"}},
		"ephemeral, too large": {func(c *Config) { ordinary("Standard_D2ds_v5")(c); c.EphemeralOSDisk, c.RootVolumeGiB = true, 500 }, map[string]any{
			"properties.storageProfile.osDisk.diffDiskSettings": nil}},
		"ephemeral, not to be had": {func(c *Config) { c.EphemeralOSDisk = true }, map[string]any{"properties.storageProfile.osDisk.diffDiskSettings": nil}},
		"ephemeral, SNP": {func(c *Config) { c.EphemeralOSDisk, c.InstanceSize, c.InstanceSizes = true, "Standard_DC2ads_v5", nil }, map[string]any{
			"properties.storageProfile.osDisk.managedDisk.securityProfile.securityEncryptionType": "VMGuestStateOnly", "properties.storageProfile.osDisk.diffDiskSettings.option": "Local"}},
		"ephemeral, TDX": {func(c *Config) { c.EphemeralOSDisk, c.InstanceSize, c.InstanceSizes = true, "Standard_DC2eds_v5", nil }, map[string]any{
			"properties.storageProfile.osDisk.managedDisk.securityProfile.securityEncryptionType": "NonPersistedTPM"}},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, cfg, func(w *world) {
				doc := w.body(tc.change)
				for at, want := range tc.want {
					var got any = doc
					for _, key := range strings.Split(at, ".") {
						m, _ := got.(map[string]any)
						got = m[key]
					}
					if got != want {
						t.Errorf("%s is %v, want %v", at, got, want)
					}
				}
			})
		})
	}
}

// TestUserData: it reaches the guest on the provisioning CD, and nobody through the API.
func TestUserData(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		req := request(p)
		req.UserData = []byte("#cloud-config\n# hush\n")
		inst := w.create(p, req)
		vm := w.only()
		if got, err := base64.StdEncoding.DecodeString(vm.CustomData); err != nil || string(got) != string(req.UserData) || vm.UserData != "" {
			t.Errorf("custom data %q, user data %q, %v", got, vm.UserData, err)
		}
		var doc json.RawMessage
		if err := p.arm.get(w.Context(), string(inst.ID), apiVM, familyGet, &doc); err != nil || strings.Contains(string(doc), vm.CustomData) {
			t.Errorf("GET shows %s, %v", doc, err)
		}
		req = request(p)
		req.UserData = make([]byte, maxUserData+1)
		if _, err := p.Create(w.Context(), req); !errdefs.IsInvalidArgument(err) || w.count(http.MethodPut, vms) != 1 {
			t.Errorf("Create with too much user data: %v", err)
		}
	})
}

func TestTags(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		for name, tags := range map[string]map[string]string{
			"key": {"a/b": "c"}, "value": {"a": strings.Repeat("x", 257)}, "reserved": {"PEERPOD-TOKEN": "x"}, "reserved name": {"name": "x"},
		} {
			req := request(p)
			req.Tags = tags
			if _, err := p.Create(w.Context(), req); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "TAGS") {
				t.Errorf("%s: %v", name, err)
			}
		}
		req := request(p)
		for n := range maxTags {
			req.Tags[strings.Repeat("t", n+1)] = "x"
		}
		if _, err := p.Create(w.Context(), req); !errdefs.IsInvalidArgument(err) {
			t.Errorf("too many tags: %v", err)
		}
	})
}

// TestSizesAreKept: the list is asked for once an hour, and an old one is better than
// none.
func TestSizesAreKept(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider()
		skus := func() int { return w.count(http.MethodGet, "Microsoft.Compute/skus") }
		for range 5 {
			request(p)
		}
		if n := skus(); n != 1 {
			t.Errorf("asked %d times", n)
		}
		time.Sleep(2 * sizesFor)
		w.arm.Inject(fakearm.Fault{Type: "Microsoft.Compute/skus", Status: http.StatusForbidden, Code: "AuthorizationFailed", Count: -1})
		if _, err := p.Plan(w.Context(), cloud.Size{VCPUs: 4}); err != nil {
			t.Errorf("Plan from a list that could not be renewed: %v", err)
		}
		if _, err := w.provider().Plan(w.Context(), cloud.Size{}); !errdefs.IsPermissionDenied(err) {
			t.Errorf("Plan without any list: %v", err)
		}
	})
}

func TestPlan(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider(func(c *Config) { c.InstanceSizes = append(c.InstanceSizes, "standard_dc2AS_v5", "Standard_DC2ads_v5") })
		for _, tc := range []struct {
			size cloud.Size
			want string
		}{
			{cloud.Size{}, small}, {cloud.Size{VCPUs: 3}, large}, {cloud.Size{MemoryMiB: 12000}, large}, {cloud.Size{Type: "standard_dc4as_v5"}, large},
		} {
			if got, err := p.Plan(w.Context(), tc.size); err != nil || got.Type != tc.want || got.Image != testImage {
				t.Errorf("Plan(%+v) = %+v, %v", tc.size, got, err)
			}
		}
		if _, err := p.Plan(w.Context(), cloud.Size{Image: "ubuntu"}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Plan of an image that is none: %v", err)
		}
		other := imageBeside("other")
		if got, err := p.Plan(w.Context(), cloud.Size{Image: other}); err != nil || got.Image != other {
			t.Errorf("Plan of another image: %+v, %v", got, err)
		}
	})
}

func TestSSHKey(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const ed25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f me@here"
	for name, tc := range map[string]struct {
		text string
		want string // of the error
	}{
		"ed25519": {text: ed25519 + "\n"}, "rsa": {text: testKey},
		"private":  {text: "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n", want: "private key"},
		"short":    {text: "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAACQCAAAAAAAAAAQ==", want: "64 bits"},
		"ecdsa":    {text: "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTY=", want: "ecdsa"},
		"two keys": {text: ed25519 + "\n" + ed25519, want: "no single key"},
		"empty":    {want: "no single key"},
		"mixed":    {text: strings.Replace(ed25519, "ssh-ed25519", "ssh-rsa", 1), want: "no key"},
	} {
		got, err := newSSHKey(write(name, tc.text)).line()
		if tc.want == "" && (err != nil || got != strings.TrimSpace(tc.text)) || tc.want != "" && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	k := newSSHKey(filepath.Join(dir, "absent"))
	a, err := k.line()
	if err != nil || checkSSHKey("made", a) != nil {
		t.Errorf("a key of nobody: %q, %v, %v", a, err, checkSSHKey("made", a))
	}
	if b, err := k.line(); err != nil || a != b {
		t.Error("a second key was made")
	}
}
