// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/netns/nstest"
	"github.com/kata-remote/kata-remote/podvm/dhcp/dhcptest"
)

// startInCloud boots the image where there is a DHCP server and a metadata service, and
// where the firmware says what args say.
func startInCloud(t *testing.T, metadata http.Handler, seed string, args ...string) *vm {
	t.Helper()
	node := nstest.New(t, "node")
	v := startVMIn(t, node, podImage(t), seed, 2, args...)
	serveCloud(t, node, metadata)
	return v
}

// serveCloud runs a DHCP server and a metadata service for the machine in a namespace.
func serveCloud(t *testing.T, node *nstest.NS, metadata http.Handler) {
	t.Helper()
	node.Addr("tap0", "169.254.169.254/32")
	var l net.Listener
	var lease *dhcptest.Server
	node.Do(func() (err error) {
		lease, err = dhcptest.Start("tap0", dhcptest.Config{
			Addr: netip.MustParseAddr(guestAddr), Server: netip.MustParsePrefix(nodeAddr).Addr(),
			Options: []dhcpv4.Option{
				dhcpv4.OptSubnetMask(net.CIDRMask(24, 32)), dhcpv4.OptRouter(netip.MustParsePrefix(nodeAddr).Addr().AsSlice()),
				dhcpv4.OptIPAddressLeaseTime(time.Hour),
			},
		})
		if err != nil {
			return err
		}
		t.Cleanup(lease.Close)
		l, err = net.Listen("tcp4", "169.254.169.254:80")
		return err
	})
	srv := &http.Server{Handler: metadata}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		<-served
	})
}

// ec2SMBIOS and azureSMBIOS are how QEMU's firmware says in whose cloud it is.
var (
	ec2SMBIOS   = []string{"-smbios", "type=1,manufacturer=Amazon EC2,product=m6a.large"}
	azureSMBIOS = []string{"-smbios", "type=3,asset=7783-7084-3265-9085-8269-3286-77"}
)

// ec2Metadata is EC2's service, version 2, with user data and a spot interruption.
func ec2Metadata(doc string) http.Handler {
	var h http.ServeMux
	h.HandleFunc("PUT /latest/api/token", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "AQAE-token==") })
	h.HandleFunc("GET /latest/", func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("X-aws-ec2-metadata-token") != "AQAE-token==":
			w.WriteHeader(http.StatusUnauthorized)
		case r.URL.Path == "/latest/user-data":
			fmt.Fprint(w, doc)
		case r.URL.Path == "/latest/meta-data/instance-life-cycle":
			fmt.Fprint(w, "spot")
		case r.URL.Path == "/latest/meta-data/spot/instance-action":
			fmt.Fprint(w, `{"action": "terminate", "time": "2026-11-22T12:00:05Z"}`)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	})
	return &h
}

// azureMetadata is Azure's service without user data: that is on the CD.
func azureMetadata() http.Handler {
	var h http.ServeMux
	h.HandleFunc("GET /metadata/instance/compute/userData", func(http.ResponseWriter, *http.Request) {}) // empty
	return &h
}

func azureCD(t *testing.T, doc string) string {
	t.Helper()
	return seed(t, map[string]string{"ovf-env.xml": `<Environment xmlns="http://schemas.dmtf.org/ovf/environment/1" xmlns:wa="http://schemas.microsoft.com/windowsazure">
<wa:ProvisioningSection><wa:LinuxProvisioningConfigurationSet><wa:HostName>podvm-test</wa:HostName><wa:CustomData>` +
		base64.StdEncoding.EncodeToString([]byte(doc)) + `</wa:CustomData></wa:LinuxProvisioningConfigurationSet></wa:ProvisioningSection></Environment>`})
}

// TestBootedInClouds: the same image, told by EC2's metadata service, and by what Azure
// has on its CD while its metadata service has nothing.
func TestBootedInClouds(t *testing.T) {
	t.Run("EC2", func(t *testing.T) {
		c := newCredentials(t)
		v := startInCloud(t, ec2Metadata(userData(t, c.config())), "", ec2SMBIOS...)
		askAgent(t, v.dial(guestAddr+":15150"), c.tlsConfig(c.client))
		wantTaken(t, v.dial(guestAddr+":15150"), c.tlsConfig(c.client))
		v.waitFor(`"step":"cpus"`)
		wantMarks(t, v.output(), "cpus", "root", "modules", "seed", "nic", "tunnel", "agent", "listening")
	})
	t.Run("Azure", func(t *testing.T) {
		c := newCredentials(t)
		v := startInCloud(t, azureMetadata(), azureCD(t, userData(t, c.config())), azureSMBIOS...)
		askAgent(t, v.dial(guestAddr+":15150"), c.tlsConfig(c.client))
	})
}

// wantTaken asks the agent what the cloud announces, which is what the metadata service has.
func wantTaken(t *testing.T, raw net.Conn, cfg *tls.Config) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c := ttrpc.NewClient(tls.Client(raw, cfg))
	defer c.Close()
	n, err := podvmpb.NewPodVMClient(c).WaitNotice(ctx, &podvmpb.WaitNoticeRequest{})
	if err != nil || n.Kind != podvmpb.NoticeKind_NOTICE_KIND_TAKEN || n.DeadlineUnixMs != time.Date(2026, 11, 22, 12, 0, 5, 0, time.UTC).UnixMilli() {
		t.Errorf("notice %v, %v", n, err)
	}
}
