// SPDX-License-Identifier: Apache-2.0

package podvmconfig

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// stock is a document as cloud-api-adaptor 0.22 writes it.
const stock = `{
  "pod-network": {
    "podip": "10.244.1.21/24", "pod-hw-addr": "32:b9:59:6b:f0:d5", "interface": "eth0",
    "worker-node-ip": "10.224.0.5/16", "tunnel-type": "vxlan",
    "routes": [ {"dst":"0.0.0.0/0","gw":"10.244.1.1","dev":"eth0","protocol":"boot","scope":"universe"},
                {"dst":"10.244.1.0/24","gw":"","dev":"eth0","protocol":"kernel","scope":"link"} ],
    "neighbors": [ {"ip":"169.254.1.1","hw-addr":"ee:ee:ee:ee:ee:ee","dev":"eth0","state":"permanent"} ],
    "mtu": 1500, "index": 2, "vxlan-port": 4789, "vxlan-id": 555002,
    "dedicated": false, "external-net-via-pod-vm": false
  },
  "pod-namespace": "default", "pod-name": "nginx",
  "tls-server-key": "KEY", "tls-server-cert": "CERT", "tls-client-ca": "CA",
  "tls-min-version": "VersionTLS13"
}`

func TestStockDocument(t *testing.T) {
	c, err := Parse([]byte(stock))
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		PodNetwork: &PodNetwork{
			PodIP: netip.MustParsePrefix("10.244.1.21/24"), PodHWAddr: "32:b9:59:6b:f0:d5", Interface: "eth0",
			WorkerNodeIP: netip.MustParsePrefix("10.224.0.5/16"), TunnelType: "vxlan",
			Routes: []Route{
				{Dst: "0.0.0.0/0", GW: "10.244.1.1", Dev: "eth0", Protocol: "boot", Scope: "universe"},
				{Dst: "10.244.1.0/24", Dev: "eth0", Protocol: "kernel", Scope: "link"},
			},
			Neighbors: []Neighbor{{IP: "169.254.1.1", HWAddr: "ee:ee:ee:ee:ee:ee", Dev: "eth0", State: "permanent"}},
			MTU:       1500, Index: 2, VXLANPort: 4789, VXLANID: 555002,
		},
		PodNamespace: "default", PodName: "nginx",
		TLSServerKey: "KEY", TLSServerCert: "CERT", TLSClientCA: "CA",
	}
	if diff := cmp.Diff(want, c, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Errorf("Parse (-want +got):\n%s", diff)
	}
	again, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	c2, err := Parse(again)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(c, c2, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Errorf("a document changes when it is written and read:\n%s", diff)
	}
}

// TestFurtherNetworks: what only we write keeps the stock part as it is.
func TestFurtherNetworks(t *testing.T) {
	ours := strings.Replace(stock, `"pod-namespace"`, `"more-pod-networks": [{
    "podip": "10.9.0.5/16", "podips": ["10.9.0.5/16", "fd09::5/64"], "pod-hw-addr": "32:b9:59:6b:f0:d6", "interface": "net1",
    "worker-node-ip": "10.224.0.5/16", "tunnel-type": "vxlan", "mtu": 9000, "vxlan-port": 4789, "vxlan-id": 555003,
    "table-routes": [{"dst":"0.0.0.0/0","gw":"10.9.0.1","dev":"net1","table":100}]
  }], "rules": [{"priority":100,"from":"10.9.0.5/32","table":100}], "pod-namespace"`, 1)
	c, err := Parse([]byte(ours))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := Parse([]byte(stock))
	if err != nil {
		t.Fatal(err)
	}
	same := cmpopts.EquateComparable(netip.Prefix{})
	if d := cmp.Diff(plain.PodNetwork, c.PodNetwork, same); d != "" {
		t.Errorf("the first network (-stock +ours):\n%s", d)
	}
	all := c.Networks()
	if len(all) != 2 || all[0].Interface != "eth0" || all[1].VXLANID != 555003 || all[1].TableRoutes[0].Table != 100 || c.Rules[0].Table != 100 {
		t.Errorf("networks %+v, rules %+v", all, c.Rules)
	}
	if len(plain.Networks()) != 1 {
		t.Errorf("a stock document has %d networks", len(plain.Networks()))
	}
	for name, tc := range map[string]struct{ old, new, want string }{
		"same interface": {`"net1",
    "worker`, `"eth0",
    "worker`, "more-pod-networks[0].interface"},
		"same VNI":   {`555003`, `555002`, "more-pod-networks[0].vxlan-id"},
		"no address": {`"podips": ["10.9.0.5/16", "fd09::5/64"]`, `"podips": [""]`, "more-pod-networks[0].podip"},
	} {
		_, err := Parse([]byte(strings.Replace(ours, tc.old, tc.new, 1)))
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error = %v, want %q in it", name, err, tc.want)
		}
	}
}

func TestWrongDocumentsNameTheKey(t *testing.T) {
	for name, tc := range map[string]struct{ old, new, want string }{
		"not JSON":         {`{`, `[`, Path},
		"no key":           {`"KEY"`, `""`, "tls-server-key"},
		"no certificate":   {`"CERT"`, `""`, "tls-server-cert"},
		"no client CA":     {`"CA"`, `""`, "tls-client-ca"},
		"no network":       {`"pod-network"`, `"x"`, "pod-network"},
		"no address":       {`"podip": "10.244.1.21/24",`, ``, "podip"},
		"bad address":      {`10.244.1.21/24`, `10.244.1.21`, "10.244.1.21"},
		"no worker":        {`"worker-node-ip": "10.224.0.5/16",`, ``, "worker-node-ip"},
		"unknown tunnel":   {`"vxlan",`, `"gre",`, "tunnel-type"},
		"no interface":     {`"interface": "eth0"`, `"interface": ""`, "interface"},
		"no port":          {`"vxlan-port": 4789`, `"vxlan-port": 0`, "vxlan-port"},
		"VNI of 25 bits":   {`555002`, `16777216`, "vxlan-id"},
		"port of 17 bits":  {`4789`, `65536`, "vxlan-port"},
		"truncated in MTU": {`"mtu": 1500,`, `"mtu": "x",`, "mtu"},
	} {
		_, err := Parse([]byte(strings.Replace(stock, tc.old, tc.new, 1)))
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error = %v, want %q in it", name, err, tc.want)
		}
	}
}

func TestSecretsStayOutOfLogs(t *testing.T) {
	c, err := Parse([]byte(strings.Replace(stock, "KEY", "hush-hush", 1)))
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "key", c.TLSServerKey)
	fmt.Fprintf(&log, "%v %+v %#v %s", *c, *c, *c, c.TLSServerKey)
	if strings.Contains(log.String(), "hush") {
		t.Errorf("the private key reached a log: %s", log.String())
	}
}
