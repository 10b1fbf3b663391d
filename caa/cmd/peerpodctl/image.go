// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/kata-remote/kata-remote/caa/account"
	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/cloud/aws/ami"
	"github.com/kata-remote/kata-remote/cloud/azure/gallery"
	"github.com/kata-remote/kata-remote/cloud/diskimage"
)

const (
	// publishTimeout: an upload over a slow line, and what clouds then do with it.
	publishTimeout = 4 * time.Hour
	pruneTimeout   = 30 * time.Minute
	// defaultImageDir is where `make podvm-image` builds.
	defaultImageDir = "_output/podvm"
	// defaultNamespace is where the operator keeps peer-pods-cm.
	defaultNamespace = "openshift-sandboxed-containers-operator"
)

// imageKeys are the keys of peer-pods-cm that name the image.
var imageKeys = map[string]string{config.ProviderAWS: "PODVM_AMI_ID", config.ProviderAzure: "AZURE_IMAGE_ID"}

func imageCommand(asked *bool) *cobra.Command {
	parent := &cobra.Command{
		Use: "image", Short: "the pod VM's image in a cloud", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return fmt.Errorf("give a verb: publish or prune") },
	}
	parent.AddCommand(publishCommand(asked), pruneCommand(asked))
	return parent
}

// publishOptions are the flags of image publish.
type publishOptions struct {
	dir, path, output     string
	gallery               string
	updateConfig          bool
	namespace, kubeconfig string
}

func publishCommand(asked *bool) *cobra.Command {
	var o publishOptions
	c := &cobra.Command{
		Use: "publish aws|azure", Args: oneCloud,
		Short: "upload and register the image that make podvm-image built",
		Long: `publish uploads the disk image of a folder that make podvm-image wrote, after verifying its
digest, registers it and prints the id that PODVM_AMI_ID or AZURE_IMAGE_ID is to be set to.
--update-config sets it, with kubectl: pod VMs that are made later are made of it.

aws: a snapshot, written with the EBS direct API, and an AMI of it. azure: a managed disk
that is uploaded to and then removed, and a version of the image podvm-x64 (or -arm64) in a
gallery of AZURE_RESOURCE_GROUP; gallery and image are made when missing. All carry the tags
peerpod-image (the digest), peerpod-cluster (CLUSTER_NAME) and those of TAGS.

Published again, an image is not uploaded again: the id is the same. A publication that was
interrupted is gone on with by the same command, also on another machine; what has arrived is
not sent again.`,
		Example: `  peerpodctl image publish aws --image _output/podvm --config /etc/peerpod/adaptor.conf
  peerpodctl image publish azure --update-config`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := jsonOrText(o.output); err != nil {
				return err
			}
			*asked = true
			ctx, cancel := context.WithTimeout(cmd.Context(), publishTimeout)
			defer cancel()
			return publish(ctx, cmd, args[0], o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.dir, "image", defaultImageDir, "`folder` with the image's manifest.json")
	f.StringVar(&o.path, "config", "", "the adaptor's configuration `file`; the environment overrides it")
	f.StringVar(&o.gallery, "gallery", "", "azure: `name` of the gallery (default PodVMGallery, with _ and CLUSTER_NAME if that is set)")
	f.BoolVar(&o.updateConfig, "update-config", false, "set the id in the ConfigMap peer-pods-cm, with kubectl")
	f.StringVar(&o.namespace, "namespace", defaultNamespace, "the ConfigMap's `namespace`")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "`file` for kubectl; by default it finds its own")
	f.StringVarP(&o.output, "output", "o", "text", "text or json")
	return c
}

// publishedView is the answer in --output json. Its keys are a promise.
type publishedView struct {
	diskimage.Published
	Key     string `json:"key"`     // of peer-pods-cm
	Updated bool   `json:"updated"` // whether the ConfigMap was changed
}

func publish(ctx context.Context, cmd *cobra.Command, provider string, o publishOptions) error {
	cfg, err := config.LoadAccount(o.path, os.Environ(), provider)
	if err != nil {
		return fmt.Errorf("the configuration is wrong:\n%w", err)
	}
	if o.updateConfig {
		if err := findKubectl(); err != nil {
			return err
		}
	}
	show := newMeter(cmd.ErrOrStderr())
	show.step(diskimage.Progress{Step: "verify"})
	send := publishAWS
	if provider == config.ProviderAzure {
		send = publishAzure
	}
	out, err := send(ctx, cfg, o, show.step)
	show.end()
	if ctx.Err() != nil {
		return fmt.Errorf("interrupted; the same command goes on where it was: %w", ctx.Err())
	}
	if err != nil {
		return err
	}
	v := publishedView{Published: out, Key: imageKeys[provider]}
	if o.updateConfig {
		if err = patchConfigMap(ctx, cmd.ErrOrStderr(), o, v.Key, out.ID); err == nil {
			v.Updated = true
		}
	}
	if o.output == "json" {
		b, merr := json.MarshalIndent(v, "", "  ")
		fmt.Fprintln(cmd.OutOrStdout(), string(b))
		return errors.Join(err, merr)
	}
	fmt.Fprintln(cmd.OutOrStdout(), out.ID)
	return err
}

func publishAWS(ctx context.Context, cfg *config.Config, o publishOptions, progress func(diskimage.Progress)) (diskimage.Published, error) {
	a, err := account.AWS(cfg, "")
	if err != nil {
		return diskimage.Published{}, err
	}
	defer a.Close()
	image, err := diskimage.Open(ctx, o.dir, diskimage.Raw)
	if err != nil {
		return diskimage.Published{}, err
	}
	defer image.Close()
	return ami.Publish(ctx, a, ami.Request{Image: image, Cluster: cfg.Cluster, Tags: cfg.Tags, Progress: progress})
}

func publishAzure(ctx context.Context, cfg *config.Config, o publishOptions, progress func(diskimage.Progress)) (diskimage.Published, error) {
	a, err := account.Azure(cfg)
	if err != nil {
		return diskimage.Published{}, err
	}
	defer a.Close()
	image, err := diskimage.Open(ctx, o.dir, diskimage.VHD)
	if err != nil {
		return diskimage.Published{}, err
	}
	defer image.Close()
	return gallery.Publish(ctx, a, gallery.Request{Image: image, Gallery: o.gallery, Cluster: cfg.Cluster, Tags: cfg.Tags, Progress: progress})
}

func pruneCommand(asked *bool) *cobra.Command {
	var (
		path, output, inGallery string
		keep                    int
		dryRun                  bool
	)
	c := &cobra.Command{
		Use: "prune aws|azure", Args: oneCloud,
		Short: "remove published images that nothing uses any more",
		Long: `prune removes images that image publish made for the same CLUSTER_NAME, with their snapshots
(aws), or versions of the gallery (azure), except the newest --keep, the one that PODVM_AMI_ID
or AZURE_IMAGE_ID names, and those that an instance or launch template (aws), or a virtual
machine of the subscription (azure), uses. What interrupted publications have left goes
after a day or two. Images of others are not looked at.`,
		Example: `  peerpodctl image prune aws --dry-run
  peerpodctl image prune azure --keep 3 --config /etc/peerpod/adaptor.conf`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := jsonOrText(output); err != nil {
				return err
			}
			if keep < 0 {
				return fmt.Errorf("--keep is %d; want 0 or more", keep)
			}
			*asked = true
			ctx, cancel := context.WithTimeout(cmd.Context(), pruneTimeout)
			defer cancel()
			cfg, err := config.LoadAccount(path, os.Environ(), args[0])
			if err != nil {
				return fmt.Errorf("the configuration is wrong:\n%w", err)
			}
			var list []diskimage.Pruned
			if args[0] == config.ProviderAzure {
				list, err = pruneAzure(ctx, cfg, gallery.PruneRequest{Gallery: inGallery, Cluster: cfg.Cluster, Configured: cfg.Azure.ImageID, Keep: keep, DryRun: dryRun})
			} else {
				list, err = pruneAWS(ctx, cfg, ami.PruneRequest{Cluster: cfg.Cluster, Configured: cfg.AWS.ImageID, Keep: keep, DryRun: dryRun})
			}
			if err != nil && len(list) == 0 {
				return err
			}
			return errors.Join(err, printPruned(cmd.OutOrStdout(), list, dryRun, output))
		},
	}
	f := c.Flags()
	f.IntVar(&keep, "keep", 1, "how many of the newest to keep, used or not")
	f.BoolVar(&dryRun, "dry-run", false, "say what would be removed, and remove nothing")
	f.StringVar(&path, "config", "", "the adaptor's configuration `file`; the environment overrides it")
	f.StringVar(&inGallery, "gallery", "", "azure: `name` of the gallery, as with publish")
	f.StringVarP(&output, "output", "o", "text", "text or json")
	return c
}

func pruneAWS(ctx context.Context, cfg *config.Config, r ami.PruneRequest) ([]diskimage.Pruned, error) {
	a, err := account.AWS(cfg, "")
	if err != nil {
		return nil, err
	}
	defer a.Close()
	return ami.Prune(ctx, a, r)
}

func pruneAzure(ctx context.Context, cfg *config.Config, r gallery.PruneRequest) ([]diskimage.Pruned, error) {
	a, err := account.Azure(cfg)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	return gallery.Prune(ctx, a, r)
}

// prunedView is the answer in --output json. Its keys are a promise.
type prunedView struct {
	DryRun bool               `json:"dryRun"`
	Images []diskimage.Pruned `json:"images"`
}

func printPruned(w io.Writer, list []diskimage.Pruned, dryRun bool, output string) error {
	if output == "json" {
		b, err := json.MarshalIndent(prunedView{dryRun, append([]diskimage.Pruned{}, list...)}, "", "  ")
		fmt.Fprintln(w, string(b))
		return err
	}
	if len(list) == 0 {
		fmt.Fprintln(w, "there are no published images")
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "IMAGE\tNAME\tCREATED\tSTATE\tWHY")
	for _, p := range list {
		state := "kept"
		switch {
		case p.Removed && dryRun:
			state = "would be removed"
		case p.Removed:
			state = "removed"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", p.ID, p.Name, p.Created, state, p.Reason)
	}
	return t.Flush()
}
