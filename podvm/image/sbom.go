// SPDX-License-Identifier: Apache-2.0

package image

import (
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// Component is a part of the image that somebody else made.
type Component struct {
	Name, Version string
	Arch          string // Debian's name of the architecture; "" for a Go module
}

// debian tells of a Debian package.
func (c Component) debian() bool { return c.Arch != "" }

// ParseComponent reads "name=version:architecture", a Debian package that was linked into
// podvmd.
func ParseComponent(s string) (Component, error) {
	name, rest, found := strings.Cut(s, "=")
	at := strings.LastIndex(rest, ":")
	if !found || at < 0 || name == "" {
		return Component{}, fmt.Errorf("component %q is not of the form name=version:architecture", s)
	}
	return Component{name, rest[:at], rest[at+1:]}, nil
}

// readPackage reads what fetch.sh noted in the directory of a package. A directory that
// somebody else unpacked tells nothing.
func readPackage(dir string) Component {
	b, err := os.ReadFile(filepath.Join(dir, ".package"))
	f := strings.Fields(string(b))
	if err != nil || len(f) != 3 {
		return Component{}
	}
	return Component{f[0], f[1], f[2]}
}

// The part of SPDX 2.3 that is used (https://spdx.github.io/spdx-spec/v2.3).
type (
	spdxDocument struct {
		SPDXVersion   string             `json:"spdxVersion"`
		DataLicense   string             `json:"dataLicense"`
		SPDXID        string             `json:"SPDXID"`
		Name          string             `json:"name"`
		Namespace     string             `json:"documentNamespace"`
		CreationInfo  spdxCreation       `json:"creationInfo"`
		Packages      []spdxPackage      `json:"packages"`
		Relationships []spdxRelationship `json:"relationships"`
	}
	spdxCreation struct {
		Created  string   `json:"created"`
		Creators []string `json:"creators"`
	}
	spdxPackage struct {
		SPDXID           string         `json:"SPDXID"`
		Name             string         `json:"name"`
		Version          string         `json:"versionInfo"`
		DownloadLocation string         `json:"downloadLocation"`
		FilesAnalyzed    bool           `json:"filesAnalyzed"`
		LicenseConcluded string         `json:"licenseConcluded"`
		LicenseDeclared  string         `json:"licenseDeclared"`
		Copyright        string         `json:"copyrightText"`
		Purpose          string         `json:"primaryPackagePurpose,omitempty"`
		Checksums        []spdxChecksum `json:"checksums,omitempty"`
		Refs             []spdxRef      `json:"externalRefs,omitempty"`
	}
	spdxChecksum struct {
		Algorithm string `json:"algorithm"`
		Value     string `json:"checksumValue"`
	}
	spdxRef struct {
		Category string `json:"referenceCategory"`
		Type     string `json:"referenceType"`
		Locator  string `json:"referenceLocator"`
	}
	spdxRelationship struct {
		Element string `json:"spdxElementId"`
		Type    string `json:"relationshipType"`
		Related string `json:"relatedSpdxElement"`
	}
)

const noAssertion = "NOASSERTION"

// bill is the bill of materials under construction.
type bill struct {
	doc spdxDocument
	err error
}

// add lists a package that relates to another one, and returns its id.
func (b *bill) add(p spdxPackage, from, how string) string {
	p.SPDXID = fmt.Sprintf("SPDXRef-Package-%d", len(b.doc.Packages))
	p.DownloadLocation, p.LicenseConcluded, p.LicenseDeclared, p.Copyright = noAssertion, noAssertion, noAssertion, noAssertion
	if p.Version == "" {
		p.Version = noAssertion
	}
	b.doc.Packages = append(b.doc.Packages, p)
	b.doc.Relationships = append(b.doc.Relationships, spdxRelationship{from, how, p.SPDXID})
	return p.SPDXID
}

// part lists a Debian package or, without an architecture, a Go module.
func (b *bill) part(c Component, from, how string) {
	locator := fmt.Sprintf("pkg:golang/%s@%s", c.Name, c.Version)
	if c.debian() {
		locator = fmt.Sprintf("pkg:deb/debian/%s@%s?arch=%s", c.Name, strings.NewReplacer("+", "%2B", "~", "~").Replace(c.Version), c.Arch)
	}
	b.add(spdxPackage{Name: c.Name, Version: c.Version, Refs: []spdxRef{{"PACKAGE-MANAGER", "purl", locator}}}, from, how)
}

// billOfMaterials lists what is in a disk: the kernel, the stub, podvmd with its modules,
// and what else was linked into it. Its time is that of all files of the image.
func billOfMaterials(p *parts, d DiskConfig, disk *Disk) *bill {
	const document = "SPDXRef-DOCUMENT"
	b := &bill{doc: spdxDocument{
		SPDXVersion: "SPDX-2.3", DataLicense: "CC0-1.0", SPDXID: document, Name: "peer-pod-vm-" + disk.Architecture,
		Namespace:    "https://spdx.org/spdxdocs/peer-pod-vm-" + strings.ToLower(disk.GUID),
		CreationInfo: spdxCreation{epoch.UTC().Format("2006-01-02T15:04:05Z"), []string{"Tool: podvm-image"}},
	}}
	info, err := buildinfo.ReadFile(p.podvmd)
	if err != nil {
		b.err = fmt.Errorf("bill of materials: %w", err)
		return b
	}
	image := b.add(spdxPackage{
		Name: "peer-pod-vm", Version: p.release, Purpose: "OPERATING-SYSTEM",
		Checksums: []spdxChecksum{{"SHA256", disk.Authenticode}},
	}, document, "DESCRIBES")
	for _, c := range []Component{p.kernelPackage, p.stubPackage} {
		if c.Name != "" {
			b.part(c, image, "CONTAINS")
		}
	}
	program, err := os.ReadFile(p.podvmd)
	if err != nil {
		b.err = err
		return b
	}
	sum := sha256.Sum256(program)
	podvmd := b.add(spdxPackage{
		Name: info.Path, Version: info.Main.Version, Purpose: "APPLICATION",
		Checksums: []spdxChecksum{{"SHA256", hex.EncodeToString(sum[:])}},
	}, image, "CONTAINS")
	b.part(Component{Name: "std", Version: strings.TrimPrefix(info.GoVersion, "go")}, podvmd, "CONTAINS")
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		b.part(Component{Name: m.Path, Version: m.Version}, podvmd, "CONTAINS")
	}
	for _, c := range d.Components {
		b.part(c, podvmd, "STATIC_LINK")
	}
	return b
}

// write writes the bill as JSON.
func (b *bill) write(w io.Writer) error {
	if b.err != nil {
		return b.err
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(b.doc)
}
