// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"encoding/xml"
	"fmt"
	"strings"

	"github.com/kata-remote/kata-remote/cloud/iso9660"
)

// discLabel is what the provisioning disc is called. The real one is a UDF volume
// whose label begins so and ends in a number.
const discLabel = "rd_rdfe_stable"

// provisioningDisc is the CD that a machine with an osProfile starts with: ovf-env.xml
// with its name, its user and its custom data. nil for a specialized image, which has
// none. Source: the documents that cloud-init's and WALinuxAgent's documentation show.
func (s *Server) provisioningDisc(vm *resource) []byte {
	if object(vm.doc, "properties.osProfile") == nil {
		return nil
	}
	img, err := iso9660.Image(discLabel, map[string][]byte{"ovf-env.xml": environment(vm)}, vm.made)
	if err != nil {
		panic("fakearm: an image of one file: " + err.Error())
	}
	return img
}

// environment is ovf-env.xml. A password is never in it: what the real one holds is
// taken out when the guest has reported ready.
func environment(vm *resource) []byte {
	esc := func(v string) string {
		var b strings.Builder
		xml.EscapeText(&b, []byte(v))
		return b.String()
	}
	op := object(vm.doc, "properties.osProfile")
	var keys, data strings.Builder
	for _, k := range list(op, "linuxConfiguration.ssh.publicKeys") {
		fmt.Fprintf(&keys, "<PublicKey><Fingerprint>EB0C0AB4B2D5FC35F2F0658D19F44C8283E2DD62</Fingerprint><Path>%s</Path><Value>%s</Value></PublicKey>", esc(text(k, "path")), esc(text(k, "keyData")))
	}
	if vm.vm.customData != "" {
		data.WriteString("<CustomData>" + esc(vm.vm.customData) + "</CustomData>")
	}
	return []byte(`<?xml version="1.0" encoding="utf-8"?>
<Environment xmlns="http://schemas.dmtf.org/ovf/environment/1" xmlns:oe="http://schemas.dmtf.org/ovf/environment/1" xmlns:wa="http://schemas.microsoft.com/windowsazure" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
  <wa:ProvisioningSection>
    <wa:Version>1.0</wa:Version>
    <LinuxProvisioningConfigurationSet xmlns="http://schemas.microsoft.com/windowsazure" xmlns:i="http://www.w3.org/2001/XMLSchema-instance">
      <ConfigurationSetType>LinuxProvisioningConfiguration</ConfigurationSetType>
      <HostName>` + esc(text(op, "computerName")) + `</HostName>
      <UserName>` + esc(text(op, "adminUsername")) + `</UserName>
      <UserPassword>REDACTED</UserPassword>
      <DisableSshPasswordAuthentication>` + fmt.Sprint(flag(op, "linuxConfiguration.disablePasswordAuthentication")) + `</DisableSshPasswordAuthentication>
      <SSH><PublicKeys>` + keys.String() + `</PublicKeys></SSH>
      ` + data.String() + `
    </LinuxProvisioningConfigurationSet>
  </wa:ProvisioningSection>
  <wa:PlatformSettingsSection>
    <wa:Version>1.0</wa:Version>
    <PlatformSettings xmlns="http://schemas.microsoft.com/windowsazure" xmlns:i="http://www.w3.org/2001/XMLSchema-instance">
      <ProvisionGuestAgent>` + fmt.Sprint(at(op, "linuxConfiguration.provisionVMAgent") != false) + `</ProvisionGuestAgent>
      <GuestAgentPackageName i:nil="true"/>
      <PreprovisionedVm>false</PreprovisionedVm>
    </PlatformSettings>
  </wa:PlatformSettingsSection>
</Environment>
`)
}
