// SPDX-License-Identifier: Apache-2.0

package gallery

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/azure"
	"github.com/kata-remote/kata-remote/cloud/diskimage"
)

// PruneActions are what a role must allow for Prune, in the resource group; the first and
// the last at the subscription.
var PruneActions = []string{
	"Microsoft.Compute/virtualMachines/read",
	"Microsoft.Compute/galleries/images/read",
	"Microsoft.Compute/galleries/images/versions/read",
	"Microsoft.Compute/galleries/images/versions/delete",
	"Microsoft.Compute/disks/read",
	"Microsoft.Compute/disks/delete",
	"Microsoft.Compute/disks/endGetAccess/action",
	"Microsoft.Compute/locations/operations/read",
}

// abandonedAfter is how old the disk of an upload must be before it is taken for what an
// interrupted publication has left, and not for one under way. No URL for an upload
// is good any more then.
const abandonedAfter = 2 * accessFor

// PruneRequest says what may go.
type PruneRequest struct {
	Gallery    string // see Request
	Cluster    string // whose images; see Request
	Configured string // AZURE_IMAGE_ID; "": none
	Keep       int    // how many of the newest of each definition stay, whether used or not
	DryRun     bool   // look only
}

// Prune removes versions of ours that are not among the newest, not configured, and that
// no virtual machine of the subscription was made of; and disks that interrupted uploads
// have left. It returns what became of each, the newest first; with an error, as far as
// it came.
func Prune(ctx context.Context, a *azure.Account, r PruneRequest) ([]diskimage.Pruned, error) {
	path, err := galleryPath(a, r.Gallery, r.Cluster)
	if err != nil {
		return nil, err
	}
	defs, err := azure.List[resource](ctx, a, path+"/images", azure.APIGallery)
	if err != nil && !azure.Missing(err) {
		return nil, err
	}
	used, err := uses(ctx, a)
	if err != nil {
		return nil, err
	}
	var out []diskimage.Pruned
	for _, d := range defs {
		def := path + "/images/" + d.Name
		list, err := versions(ctx, a, def)
		if err != nil {
			return out, err
		}
		list = slices.DeleteFunc(list, func(v resource) bool { return v.tag(cloud.TagImage) == "" || v.tag(cloud.TagCluster) != r.Cluster })
		slices.SortFunc(list, func(x, y resource) int { return compareVersions(y.Name, x.Name) })
		for n, v := range list {
			id := def + "/versions/" + v.Name
			p := diskimage.Pruned{ID: id, Name: strings.Join([]string{path[strings.LastIndex(path, "/")+1:], d.Name, v.Name}, "/"),
				Digest: v.tag(cloud.TagImage), Created: v.Properties.PublishingProfile.PublishedDate}
			by := used[strings.ToLower(id)]
			switch {
			case strings.EqualFold(id, r.Configured), n == 0 && strings.EqualFold(def, strings.TrimSuffix(r.Configured, "/versions/latest")):
				p.Reason = "configured as AZURE_IMAGE_ID"
			case by != "":
				p.Reason = "used by virtual machine " + by
			case v.Properties.ProvisioningState == "Creating":
				p.Reason = "being published"
			case n < r.Keep:
				p.Reason = fmt.Sprintf("one of the newest %d", r.Keep)
			default:
				p.Removed, p.Reason = true, "old and not used"
			}
			if p.Removed && !r.DryRun {
				if err := a.Delete(ctx, id, azure.APIGallery); err != nil {
					return out, err
				}
			}
			out = append(out, p)
		}
	}
	left, err := pruneDisks(ctx, a, r, path[:strings.Index(path, "/providers/")])
	return append(out, left...), err
}

func compareVersions(a, b string) int {
	x, y := strings.Split(a, "."), strings.Split(b, ".")
	return slices.CompareFunc(x, y, func(p, q string) int { return cmp.Or(cmp.Compare(len(p), len(q)), cmp.Compare(p, q)) })
}

// pruneDisks removes what interrupted uploads have left.
func pruneDisks(ctx context.Context, a *azure.Account, r PruneRequest, group string) ([]diskimage.Pruned, error) {
	disks, err := azure.List[resource](ctx, a, group+"/providers/Microsoft.Compute/disks", azure.APIDisk)
	if err != nil {
		return nil, err
	}
	var out []diskimage.Pruned
	for _, d := range disks {
		made, err := time.Parse(time.RFC3339, d.Properties.TimeCreated)
		if d.tag(cloud.TagImage) == "" || d.tag(cloud.TagCluster) != r.Cluster || !strings.HasPrefix(d.Name, "peerpod-upload-") || err != nil || time.Since(made) < abandonedAfter {
			continue
		}
		path := group + "/providers/Microsoft.Compute/disks/" + d.Name
		if !r.DryRun {
			if err := dropDisk(ctx, a, path, d.Properties.DiskState); err != nil {
				return out, err
			}
		}
		out = append(out, diskimage.Pruned{ID: path, Name: d.Name, Digest: d.tag(cloud.TagImage), Created: made.UTC().Format(time.RFC3339), Removed: true, Reason: "left by an interrupted upload"})
	}
	return out, nil
}

// uses tells of versions, by lower-case id, which virtual machine was made of them.
func uses(ctx context.Context, a *azure.Account) (map[string]string, error) {
	sub, err := a.Subscription()
	if err != nil {
		return nil, err
	}
	vms, err := azure.List[struct {
		Name       string `json:"name"`
		Properties struct {
			StorageProfile struct {
				ImageReference struct {
					ID           string `json:"id"`
					ExactVersion string `json:"exactVersion"`
				} `json:"imageReference"`
			} `json:"storageProfile"`
		} `json:"properties"`
	}](ctx, a, sub+"/providers/Microsoft.Compute/virtualMachines", azure.APIVM)
	if err != nil {
		return nil, err
	}
	used := map[string]string{}
	for _, vm := range vms {
		ref := vm.Properties.StorageProfile.ImageReference
		id := ref.ID
		if ref.ExactVersion != "" && !strings.Contains(strings.ToLower(id), "/versions/") {
			id += "/versions/" + ref.ExactVersion
		}
		used[strings.ToLower(id)] = vm.Name
	}
	return used, nil
}
