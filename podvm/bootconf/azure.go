// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/podvm/metadata"
	"golang.org/x/sys/unix"
)

// AzureService reads userData from Azure's instance metadata service.
// https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service
type AzureService struct {
	URL string // of the service; empty: the real one
}

// azureAPIVersion is the first that has userData.
const azureAPIVersion = "?api-version=2021-01-01&format=text"

// Name says what the source is.
func (AzureService) Name() string { return "Azure metadata service" }

// Seed gets user data and host name. NotFound: there is no user data, or the service at
// that address is another cloud's.
func (a AzureService) Seed(ctx context.Context) (*Seed, error) {
	if a.URL == "" {
		a.URL = metadata.URL
	}
	c := metadata.New()
	defer c.Close()
	get := func(name string) ([]byte, error) {
		return c.Do(ctx, http.MethodGet, a.URL+"/metadata/instance/compute/"+name+azureAPIVersion, http.Header{"Metadata": {"true"}}, nil)
	}
	text, err := get("userData")
	if err != nil {
		return nil, err
	}
	var s Seed
	if s.UserData, err = decodeBase64("userData", text); err != nil {
		return nil, err
	}
	// A pod VM works as well without its name, and with a name that cannot be had now.
	if name, err := get("name"); err == nil {
		s.Hostname = strings.TrimSpace(string(name))
	}
	return &s, nil
}

// decodeBase64 decodes a document. NotFound: it is empty.
func decodeBase64(what string, text []byte) ([]byte, error) {
	text = bytes.TrimSpace(text)
	if len(text) == 0 {
		return nil, fmt.Errorf("%s is empty: %w", what, errdefs.ErrNotFound)
	}
	doc, err := base64.StdEncoding.AppendDecode(nil, text)
	if err != nil {
		return nil, invalid("%s is not base64", what)
	}
	return doc, nil
}

// AzureCD reads customData from the CD that Azure puts into a new machine's drive. Its
// file system is UDF; an emulation's may be ISO 9660.
// https://github.com/Azure/WALinuxAgent, azurelinuxagent/pa/provision and ovfenv.py
type AzureCD struct {
	Disks
}

// ovfFile is the one file on it that counts.
const ovfFile = "ovf-env.xml"

// Name says what the source is.
func (AzureCD) Name() string { return "Azure provisioning CD" }

// Seed finds the CD and reads it. NotFound: there is none, or it has no custom data. The
// CD is ejected then, as Azure's own agent does: its content is secret, and no service
// shows it again.
func (a AzureCD) Seed(ctx context.Context) (*Seed, error) {
	return a.find(ctx, "no disk with the file "+ovfFile, func(f *os.File) (*Seed, error) {
		doc, err := readVolumeFile(f, ovfFile)
		if doc == nil || err != nil {
			return nil, err
		}
		s, err := parseOVF(doc)
		if err == nil {
			eject(f)
		}
		return s, err
	})
}

const (
	cdromEject    = 0x5309 // CDROMEJECT, linux/cdrom.h
	cdromLockDoor = 0x5329 // CDROM_LOCKDOOR
)

// eject opens the drive's tray. What is no such drive stays as it is: an emulation may
// have the content on a disk.
func eject(f *os.File) {
	if unix.IoctlSetInt(int(f.Fd()), cdromLockDoor, 0) == nil { // opening a drive locks it
		_ = unix.IoctlSetInt(int(f.Fd()), cdromEject, 0)
	}
}

// readVolumeFile reads a file in the root directory of a UDF or ISO 9660 file system. nil:
// the disk has neither, or no such file. UDF comes first: a disk with both (a "bridge")
// may have a short name in the other.
func readVolumeFile(f io.ReaderAt, name string) ([]byte, error) {
	if u, err := readUDF(f); err == nil {
		return u.read(f, name)
	} else if !errors.Is(err, errNotUDF) {
		return nil, fmt.Errorf("UDF: %w", err)
	}
	v, err := readISO(f)
	if errors.Is(err, errNotISO) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return v.read(f, name)
}

// ovf is the part of an OVF environment that counts. Names are matched without their
// namespaces, whose prefixes differ.
type ovf struct {
	XMLName  xml.Name `xml:"Environment"`
	Sections []struct {
		Sets []struct {
			HostName   string  `xml:"HostName"`
			CustomData *string `xml:"CustomData"`
		} `xml:"LinuxProvisioningConfigurationSet"`
	} `xml:"ProvisioningSection"`
}

// parseOVF reads the OVF environment. It may hold a password, so no error shows any of it.
func parseOVF(doc []byte) (*Seed, error) {
	var env ovf
	d := xml.NewDecoder(bytes.NewReader(doc))
	// Encodings other than UTF-8 need tables; Azure writes UTF-8.
	if err := d.Decode(&env); err != nil {
		var syntax *xml.SyntaxError
		if errors.As(err, &syntax) {
			return nil, invalid("%s, line %d: not XML", ovfFile, syntax.Line)
		}
		return nil, invalid("%s is not an OVF environment", ovfFile)
	}
	for _, section := range env.Sections {
		for _, set := range section.Sets {
			s := &Seed{Hostname: strings.TrimSpace(set.HostName)}
			if set.CustomData == nil {
				return nil, fmt.Errorf("%s has no CustomData: %w", ovfFile, errdefs.ErrNotFound)
			}
			var err error
			s.UserData, err = decodeBase64(ovfFile+": CustomData", []byte(*set.CustomData))
			return s, err
		}
	}
	return nil, fmt.Errorf("%s has no LinuxProvisioningConfigurationSet: %w", ovfFile, errdefs.ErrNotFound)
}
