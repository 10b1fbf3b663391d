// SPDX-License-Identifier: Apache-2.0

// Package gallery makes versions of an image in an Azure compute gallery of disk images,
// and removes old ones.
//
// A publication uploads the VHD into a managed disk (createOption Upload), page by page
// and without the empty ones, makes a version of it, and removes the disk: no storage
// account. What there is in the cloud says how far it is, so that a publication that was
// interrupted is resumed by whoever has the same image:
//
//	version with our tags                  done
//	disk with our tags, upload over        make the version
//	disk with our tags, being uploaded to  go on with the pages that its blob has not
//	nothing                                from the beginning
//
// Gallery and image definition are made when missing. The definition is of generation 2
// and, on x64, for ordinary, trusted-launch and confidential VMs, so that one image does for
// every AZURE_SECURITY_TYPE. Each cluster has a gallery of its own, and the tags
// cloud.TagImage and cloud.TagCluster tell its images from others'.
package gallery

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/azure"
	"github.com/kata-remote/kata-remote/cloud/diskimage"
)

// PublishActions are what a role must allow for Publish, in the resource group; the
// last at the subscription.
var PublishActions = []string{
	"Microsoft.Compute/galleries/read",
	"Microsoft.Compute/galleries/write",
	"Microsoft.Compute/galleries/images/read",
	"Microsoft.Compute/galleries/images/write",
	"Microsoft.Compute/galleries/images/versions/read",
	"Microsoft.Compute/galleries/images/versions/write",
	"Microsoft.Compute/disks/read",
	"Microsoft.Compute/disks/write",
	"Microsoft.Compute/disks/delete",
	"Microsoft.Compute/disks/beginGetAccess/action",
	"Microsoft.Compute/disks/endGetAccess/action",
	"Microsoft.Compute/locations/operations/read",
}

// Request says what to publish.
type Request struct {
	Image    *diskimage.Image // of format VHD
	Gallery  string           // name; "": PodVMGallery, with _ and the cluster
	Cluster  string           // CLUSTER_NAME; "": no cluster's
	Tags     map[string]string
	Progress func(diskimage.Progress) // nil: nobody wants to know
}

// publication is one Publish under way.
type publication struct {
	*azure.Account
	Request
	group string // path of the resource group
	def   string // path of the image definition
	disk  string // path of the disk to upload to
	out   diskimage.Published
}

type resource struct {
	ID         string            `json:"id,omitempty"`
	Name       string            `json:"name,omitempty"`
	Location   string            `json:"location,omitempty"`
	Tags       map[string]string `json:"tags,omitempty"`
	Properties properties        `json:"properties"`
}

// properties are those of versions, definitions and disks that are looked at.
type properties struct {
	ProvisioningState string `json:"provisioningState"`
	DiskState         string `json:"diskState"`
	TimeCreated       string `json:"timeCreated"`
	HyperVGeneration  string `json:"hyperVGeneration"`
	Architecture      string `json:"architecture"`
	OSState           string `json:"osState"`
	PublishingProfile struct {
		PublishedDate string `json:"publishedDate"`
	} `json:"publishingProfile"`
}

// Publish makes an image available. Published twice, it is one version. When ctx ends,
// what is there so far stays, for the next Publish. InvalidArgument: the image is
// damaged, or the configuration lacks something. Further errors have the classes of
// package azure.
func Publish(ctx context.Context, a *azure.Account, r Request) (diskimage.Published, error) {
	p := &publication{Account: a, Request: r}
	if p.Progress == nil {
		p.Progress = func(diskimage.Progress) {}
	}
	p.out = diskimage.Published{Digest: r.Image.Tag(), Version: r.Image.Version}
	path, err := galleryPath(a, r.Gallery, r.Cluster)
	if err != nil {
		return p.out, err
	}
	p.group = path[:strings.Index(path, "/providers/")]
	p.def = path + "/images/" + definitions[r.Image.Architecture].name
	sum := sha256.Sum256([]byte(r.Cluster + "\x00" + p.def))
	p.disk = fmt.Sprintf("%s/providers/Microsoft.Compute/disks/peerpod-upload-%s-%x", p.group, r.Image.Short(), sum[:4])
	p.Progress(diskimage.Progress{Step: "find"})
	done, err := p.find(ctx)
	if err == nil && !done {
		err = p.make(ctx, path)
	}
	p.out.Existed = done
	if err != nil {
		return p.out, err
	}
	return p.out, p.removeDisk(ctx) // of this publication, or left by an earlier one
}

// make publishes what is not there.
func (p *publication) make(ctx context.Context, path string) error {
	p.Progress(diskimage.Progress{Step: "prepare"})
	if err := p.prepare(ctx, path); err != nil {
		return err
	}
	if err := p.upload(ctx); err != nil {
		return err
	}
	p.Progress(diskimage.Progress{Step: "register"})
	return p.register(ctx)
}

var notInNames = regexp.MustCompile(`[^A-Za-z0-9.]+`)

// galleryPath: names of galleries have letters, digits, dots and underscores, at most 80.
func galleryPath(a *azure.Account, name, cluster string) (string, error) {
	group, err := a.Group()
	if err != nil {
		return "", err
	}
	if name == "" {
		// With the operators of cloud-api-adaptor, PodVMGallery_ and the cluster's id.
		name = "PodVMGallery"
		if c := strings.Trim(notInNames.ReplaceAllString(cluster, "_"), "_."); c != "" {
			name += "_" + c[:min(len(c), 60)]
		}
	} else if notInNames.MatchString(strings.ReplaceAll(name, "_", "")) || len(name) > 80 {
		return "", fmt.Errorf("the gallery's name %q has more than letters, digits, dots and underscores, or than 80 of them: %w", name, errdefs.ErrInvalidArgument)
	}
	return group + "/providers/Microsoft.Compute/galleries/" + name, nil
}

// definitions by the manifest's architecture. Confidential VMs are x64 only.
var definitions = map[string]struct{ name, arch, security string }{
	diskimage.AMD64: {"podvm-x64", "x64", "TrustedLaunchAndConfidentialVmSupported"},
	diskimage.ARM64: {"podvm-arm64", "Arm64", "TrustedLaunchSupported"},
}

func (p *publication) tags() map[string]string {
	all := maps.Clone(p.Tags)
	if all == nil {
		all = map[string]string{}
	}
	all[cloud.TagImage] = p.Image.Tag()
	if p.Image.Version != "" {
		all[cloud.TagImage+"-version"] = p.Image.Version
	}
	if p.Cluster != "" {
		all[cloud.TagCluster] = p.Cluster
	}
	return all
}

// tag reads one; Azure keeps names in any case.
func (r resource) tag(name string) string {
	for k, v := range r.Tags {
		if strings.EqualFold(k, name) {
			return v
		}
	}
	return ""
}

func (p *publication) ours(r resource) bool {
	return r.tag(cloud.TagImage) == p.Image.Tag() && r.tag(cloud.TagCluster) == p.Cluster
}

// versions of a definition; none, if that does not exist.
func versions(ctx context.Context, a *azure.Account, def string) ([]resource, error) {
	list, err := azure.List[resource](ctx, a, def+"/versions", azure.APIGallery)
	if azure.Missing(err) {
		return nil, nil
	}
	return list, err
}

// find looks for the version, and waits until it can be used. One that has failed is
// removed: it cannot be made again under its name.
func (p *publication) find(ctx context.Context) (bool, error) {
	for pause := 2 * time.Second; ; pause = min(2*pause, 30*time.Second) {
		list, err := versions(ctx, p.Account, p.def)
		if err != nil {
			return false, err
		}
		waiting := false
		for _, v := range list {
			if !p.ours(v) {
				continue
			}
			switch v.Properties.ProvisioningState {
			case "Succeeded":
				p.name(v.Name)
				return true, nil
			case "Creating", "Updating", "Migrating":
				waiting = true
			case "Failed":
				if err := p.Delete(ctx, p.def+"/versions/"+v.Name, azure.APIGallery); err != nil {
					return false, err
				}
			}
		}
		if !waiting {
			return false, nil
		}
		if err := cloud.Pause(ctx, pause); err != nil {
			return false, err
		}
	}
}

func (p *publication) name(version string) {
	p.out.ID = p.def + "/versions/" + version
	seg := strings.Split(p.out.ID, "/")
	p.out.Name = strings.Join([]string{seg[8], seg[10], version}, "/")
}

// prepare makes gallery and definition, where they are missing.
func (p *publication) prepare(ctx context.Context, path string) error {
	var g resource
	err := p.Get(ctx, path, azure.APIGallery, &g)
	if azure.Missing(err) {
		err = p.Put(ctx, path, azure.APIGallery, map[string]any{"location": p.Region(), "tags": p.galleryTags(), "properties": map[string]any{"description": "images of peer pods' VMs"}})
	}
	if err != nil {
		return err
	}
	want := definitions[p.Image.Architecture]
	var d resource
	err = p.Get(ctx, p.def, azure.APIGallery, &d)
	if azure.Missing(err) {
		return p.Put(ctx, p.def, azure.APIGallery, map[string]any{"location": p.Region(), "tags": p.galleryTags(), "properties": map[string]any{
			"osType": "Linux", "osState": "Generalized", "hyperVGeneration": "V2", "architecture": want.arch,
			"identifier": map[string]any{"publisher": "peerpods", "offer": "podvm", "sku": want.arch},
			"features": []any{map[string]any{"name": "SecurityType", "value": want.security},
				map[string]any{"name": "IsAcceleratedNetworkSupported", "value": "True"},
				map[string]any{"name": "DiskControllerTypes", "value": "SCSI, NVMe"}}}})
	}
	if err != nil {
		return err
	}
	if q := d.Properties; q.HyperVGeneration != "V2" || q.OSState != "Generalized" || !strings.EqualFold(cmp.Or(q.Architecture, "x64"), want.arch) {
		return fmt.Errorf("the image definition %s is %s, %s, generation %s, and the image needs %s, Generalized, generation V2; remove it, or name another gallery: %w",
			p.def, q.Architecture, q.OSState, q.HyperVGeneration, want.arch, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (p *publication) galleryTags() map[string]string {
	all := maps.Clone(p.Tags)
	if p.Cluster != "" {
		if all == nil {
			all = map[string]string{}
		}
		all[cloud.TagCluster] = p.Cluster
	}
	return all
}

// register makes a version of the disk. Its number is the time, so that later ones are
// newer to Azure as well.
func (p *publication) register(ctx context.Context) error {
	now := time.Now().UTC()
	version := fmt.Sprintf("%d.%d.%d", now.Year(), int(now.Month())*100+now.Day(), now.Hour()*10000+now.Minute()*100+now.Second())
	err := p.Put(ctx, p.def+"/versions/"+version, azure.APIGallery, map[string]any{"location": p.Region(), "tags": p.tags(), "properties": map[string]any{
		"publishingProfile": map[string]any{"replicaCount": 1, "targetRegions": []any{map[string]any{"name": p.Region(), "regionalReplicaCount": 1}}},
		"storageProfile":    map[string]any{"osDiskImage": map[string]any{"source": map[string]any{"id": p.disk}}}}})
	if err != nil {
		return err
	}
	p.name(version)
	return nil
}

func (p *publication) removeDisk(ctx context.Context) error {
	var d resource
	err := p.Get(ctx, p.disk, azure.APIDisk, &d)
	if azure.Missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return dropDisk(ctx, p.Account, p.disk, d.Properties.DiskState)
}

// dropDisk removes a disk in whatever state it is.
func dropDisk(ctx context.Context, a *azure.Account, disk, state string) error {
	if state == "ActiveUpload" {
		// The content of an upload that ends early is checked, and refused; the URL is
		// invalid all the same.
		if err := a.Post(ctx, disk+"/endGetAccess", azure.APIDisk, nil, nil); errdefs.IsPermissionDenied(err) {
			return err
		}
	}
	return a.Delete(ctx, disk, azure.APIDisk)
}
