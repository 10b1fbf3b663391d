// SPDX-License-Identifier: Apache-2.0

package ports_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/azure"
	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
	"github.com/kata-remote/kata-remote/cloud/azure/ports"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type object = map[string]any

// world is an emulation with a node in it, whose interface and subnet have groups.
type world struct {
	*testing.T
	arm                                  *fakearm.Server
	acct                                 *azure.Account
	node, nic, subnet, nicNSG, subnetNSG string
}

func account(t *testing.T, arm *fakearm.Server, client string) *azure.Account {
	t.Helper()
	c := arm.Config()
	a, err := azure.NewAccount(azure.Config{SubscriptionID: c.Subscription, Region: c.Region, ResourceGroup: c.Groups[0],
		Credentials: azure.Credentials{TenantID: c.Tenant, ClientID: client, ClientSecret: fakearm.DefaultSecret},
		Endpoint:    "https://arm.test", AuthorityHost: "https://login.test", Transport: &http.Client{Transport: arm.Transport()}})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func inWorld(t *testing.T, f func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		cfg := fakearm.Config{SecurityGroups: []string{"nic-nsg", "subnet-nsg"}, Timing: fakearm.Timing{RetryAfter: time.Second}}
		cfg.Images = []fakearm.Image{{ID: cfg.ImageID("", "", "1.0.0")}}
		cfg.Principals = []fakearm.Principal{{Client: fakearm.DefaultClient, Secret: fakearm.DefaultSecret}, {Client: "exact", Secret: fakearm.DefaultSecret, Actions: ports.Actions}}
		for i, a := range ports.Actions {
			cfg.Principals = append(cfg.Principals, fakearm.Principal{Client: fmt.Sprint("without-", i), Secret: fakearm.DefaultSecret, Actions: ports.Actions, NotActions: []string{a}})
		}
		arm := fakearm.New(cfg)
		t.Cleanup(arm.Close)
		c := arm.Config()
		w := &world{T: t, arm: arm, acct: account(t, arm, fakearm.DefaultClient), subnet: c.SubnetID(fakearm.Subnet{}), nicNSG: c.SecurityGroupID("nic-nsg"), subnetNSG: c.SecurityGroupID("subnet-nsg")}
		group, err := w.acct.Group()
		if err != nil {
			t.Fatal(err)
		}
		w.node, w.nic = group+"/providers/Microsoft.Compute/virtualMachines/node-1", group+"/providers/Microsoft.Network/networkInterfaces/node-1-nic"
		w.put(w.subnet, azure.APINetwork, object{"properties": object{"addressPrefix": "10.0.0.0/24", "networkSecurityGroup": object{"id": w.subnetNSG}}})
		w.put(w.nic, azure.APINetwork, object{"location": c.Region, "properties": object{"networkSecurityGroup": object{"id": w.nicNSG},
			"ipConfigurations": []any{object{"name": "ip", "properties": object{"subnet": object{"id": w.subnet}}}}}})
		w.put(w.node, azure.APIVM, object{"location": c.Region, "properties": object{"hardwareProfile": object{"vmSize": "Standard_D2as_v5"},
			"storageProfile": object{"imageReference": object{"id": cfg.Images[0].ID}, "osDisk": object{"name": "node-disk", "createOption": "FromImage", "deleteOption": "Delete"}},
			"osProfile": object{"computerName": "node-1", "adminUsername": "core", "linuxConfiguration": object{"disablePasswordAuthentication": true, "ssh": object{"publicKeys": []any{
				object{"path": "/home/core/.ssh/authorized_keys", "keyData": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f pods"}}}}},
			"networkProfile": object{"networkInterfaces": []any{object{"id": w.nic}}}}})
		f(w)
	})
}

func (w *world) put(path, version string, body any) {
	w.Helper()
	if err := w.acct.Put(w.Context(), path, version, body); err != nil {
		w.Fatal(err)
	}
}

// rule puts one of somebody else's into the interface's group.
func (w *world) rule(name string, priority int, protocol, access, portRange, source string) {
	w.Helper()
	w.put(w.nicNSG+"/securityRules/"+name, azure.APINetwork, object{"properties": object{"priority": priority, "protocol": protocol, "access": access, "direction": "Inbound",
		"sourcePortRange": "*", "destinationPortRange": portRange, "sourceAddressPrefix": source, "destinationAddressPrefix": "*"}})
}

// open returns what was done as "group proto/port priority state".
func (w *world) open(r ports.Request) []string {
	w.Helper()
	r.Ports = cloud.Ports(15150, 9000)
	rules, err := ports.Open(w.Context(), w.acct, r)
	if err != nil {
		w.Fatal(err)
	}
	var out []string
	for _, p := range rules {
		out = append(out, fmt.Sprintf("%s %s/%d %d %s", p.Where[strings.LastIndex(p.Where, "/")+1:], p.Protocol, p.Number, p.Priority, p.State))
	}
	return out
}

func (w *world) same(got, want []string) {
	w.Helper()
	if !slices.Equal(got, want) {
		w.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestBothGroups: on the way are the interface's and the subnet's; each gets its rules once.
func TestBothGroups(t *testing.T) {
	inWorld(t, func(w *world) {
		for _, step := range []struct {
			dry   bool
			state string
		}{{true, "not there"}, {false, "made"}, {false, "there"}} {
			w.same(w.open(ports.Request{VM: w.node, DryRun: step.dry}), []string{
				"nic-nsg tcp/15150 1000 " + step.state, "nic-nsg udp/9000 1001 " + step.state, "nic-nsg tcp/9000 1002 " + step.state,
				"subnet-nsg tcp/15150 1000 " + step.state, "subnet-nsg udp/9000 1001 " + step.state, "subnet-nsg tcp/9000 1002 " + step.state})
		}
	})
}

// TestOthersRules: what decides is the first rule that matches.
func TestOthersRules(t *testing.T) {
	inWorld(t, func(w *world) {
		w.rule("taken", 1000, "Tcp", "Allow", "22", "*")
		w.rule("wide", 1001, "*", "Allow", "15000-16000", "VirtualNetwork")
		w.rule("deny-udp", 500, "Udp", "Deny", "*", "*")
		w.rule("one-host", 1003, "Tcp", "Allow", "9000", "10.9.9.9")
		w.same(w.open(ports.Request{NSGID: w.nicNSG}), []string{"nic-nsg tcp/15150 1001 there", "nic-nsg udp/9000 499 made", "nic-nsg tcp/9000 1002 made"})
		w.same(w.open(ports.Request{NSGID: w.nicNSG}), []string{"nic-nsg tcp/15150 1001 there", "nic-nsg udp/9000 499 there", "nic-nsg tcp/9000 1002 there"})
		w.rule("deny-all", 100, "*", "Deny", "*", "*")
		_, err := ports.Open(w.Context(), w.acct, ports.Request{NSGID: w.nicNSG, Ports: cloud.Ports(15150, 9000)})
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "no priority free") {
			w.Errorf("no priority is left: %v", err)
		}
	})
}

// TestNoGroup: nothing is in the way.
func TestNoGroup(t *testing.T) {
	inWorld(t, func(w *world) {
		w.put(w.subnet+"2", azure.APINetwork, object{"properties": object{"addressPrefix": "10.0.1.0/24"}})
		w.same(w.open(ports.Request{SubnetID: w.subnet + "2"}), nil)
	})
}

// TestTrouble: throttles are waited out, lost replies are asked after.
func TestTrouble(t *testing.T) {
	inWorld(t, func(w *world) {
		w.arm.Inject(fakearm.Fault{Method: "GET", Type: "Microsoft.Network/networkSecurityGroups", Status: 429, Code: "TooManyRequests", RetryAfter: 20 * time.Second, Count: 3})
		w.arm.Inject(fakearm.Fault{Method: "PUT", Type: "Microsoft.Network/networkSecurityGroups/securityRules", Lost: true})
		w.same(w.open(ports.Request{NSGID: w.nicNSG}), []string{"nic-nsg tcp/15150 1000 made", "nic-nsg udp/9000 1001 made", "nic-nsg tcp/9000 1002 made"})
	})
}

// TestActions: the table is enough, and nothing in it is too much.
func TestActions(t *testing.T) {
	inWorld(t, func(w *world) {
		for i, a := range ports.Actions {
			_, err := ports.Open(w.Context(), account(w.T, w.arm, fmt.Sprint("without-", i)), ports.Request{VM: w.node, Ports: cloud.Ports(15150, 9000)})
			if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), a) {
				w.Errorf("without %s: %v", a, err)
			}
		}
		if _, err := ports.Open(w.Context(), account(w.T, w.arm, "exact"), ports.Request{VM: w.node, Ports: cloud.Ports(15150, 9000)}); err != nil {
			w.Error(err)
		}
	})
}

func TestMistakes(t *testing.T) {
	inWorld(t, func(w *world) {
		for want, req := range map[string]ports.Request{
			"correct --provider-id": {VM: w.node + "x"},
			"set AZURE_SUBNET_ID":   {},
			"AZURE_NSG_ID":          {NSGID: w.nicNSG + "x"},
		} {
			if _, err := ports.Open(w.Context(), w.acct, req); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
				w.Errorf("%+v: %v", req, err)
			}
		}
		if vm, err := azure.ParseProviderID("azure://" + w.node); vm != w.node || err != nil {
			w.Errorf("%q, %v", vm, err)
		}
		for id, want := range map[string]string{
			"azure:///subscriptions/s/resourceGroups/g/providers/Microsoft.Compute/virtualMachineScaleSets/x/virtualMachines/0": "set AZURE_NSG_ID",
			"aws:///us-east-1a/i-0123456789abcdef0": "is not of the form",
		} {
			if _, err := azure.ParseProviderID(id); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
				w.Errorf("%s: %v", id, err)
			}
		}
	})
}
