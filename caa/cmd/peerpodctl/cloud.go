// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/kata-remote/kata-remote/caa/account"
	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	awsports "github.com/kata-remote/kata-remote/cloud/aws/ports"
	"github.com/kata-remote/kata-remote/cloud/azure"
	azureports "github.com/kata-remote/kata-remote/cloud/azure/ports"
)

// portsTimeout bounds open-ports: a dozen calls, of which each may wait for a throttle.
const portsTimeout = 10 * time.Minute

// clouds are the arguments that name one.
var clouds = []string{config.ProviderAWS, config.ProviderAzure}

// oneCloud takes a cloud's name and nothing else.
func oneCloud(cmd *cobra.Command, args []string) error {
	if len(args) != 1 || args[0] != clouds[0] && args[0] != clouds[1] {
		return fmt.Errorf("name the cloud: %s %s", cmd.CommandPath(), strings.Join(clouds, "|"))
	}
	return nil
}

// jsonOrText checks --output.
func jsonOrText(output string) error {
	if output != "text" && output != "json" {
		return fmt.Errorf("--output is %q; want text or json", output)
	}
	return nil
}

func cloudCommand(asked *bool) *cobra.Command {
	parent := &cobra.Command{
		Use: "cloud", Short: "what the cloud's account must be given before the first pod", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return fmt.Errorf("give a verb: open-ports") },
	}
	var path, providerID, output string
	var dryRun bool
	c := &cobra.Command{
		Use: "open-ports aws|azure", Args: oneCloud,
		Short: "let worker nodes and pod VMs reach each other",
		Long: `open-ports makes the rules of security groups (aws) or network security groups (azure)
that worker nodes and pod VMs need between them: FORWARDER_PORT/tcp (15150) and VXLAN_PORT
(9000), udp and tcp. Rules that are there are left alone, so that it may run as often as one
likes; --dry-run makes none.

The groups are found from a node: --provider-id is what
  kubectl get nodes -o jsonpath='{.items[*].spec.providerID}'
prints. Pod VMs have the groups of AWS_SG_IDS, or AZURE_NSG_ID and AZURE_SUBNET_ID, where the
configuration has these, else the node's. Without --provider-id, those of the configuration
stand for the node's as well.

aws: in a group that both have, a rule lets it in from itself; if they share none, rules
let each in from the other. azure: rules let VirtualNetwork in, in the groups of the node's
interface and of the subnets; where there is no group, nothing is in the way.`,
		Example: `  peerpodctl cloud open-ports aws --provider-id aws:///us-east-1a/i-0123456789abcdef0 --dry-run
  peerpodctl cloud open-ports azure --config /etc/peerpod/adaptor.conf`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := jsonOrText(output); err != nil {
				return err
			}
			*asked = true
			ctx, cancel := context.WithTimeout(cmd.Context(), portsTimeout)
			defer cancel()
			cfg, err := config.LoadAccount(path, os.Environ(), args[0])
			if err != nil {
				return fmt.Errorf("the configuration is wrong:\n%w", err)
			}
			open := openAWS
			if args[0] == config.ProviderAzure {
				open = openAzure
			}
			rules, err := open(ctx, cfg, providerID, dryRun)
			if err != nil && len(rules) == 0 {
				return err
			}
			return errors.Join(err, printRules(cmd.OutOrStdout(), rules, cfg, dryRun, output))
		},
	}
	c.Flags().StringVar(&providerID, "provider-id", "", "provider `id` of a worker node")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "say what would be made, and make nothing")
	c.Flags().StringVar(&path, "config", "", "the adaptor's configuration `file`; the environment overrides it")
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	parent.AddCommand(c)
	return parent
}

func portsOf(cfg *config.Config) []cloud.Port {
	return cloud.Ports(int(cfg.ForwarderPort), int(cfg.VXLANPort))
}

func openAWS(ctx context.Context, cfg *config.Config, providerID string, dryRun bool) ([]cloud.PortRule, error) {
	r := awsports.Request{Groups: cfg.AWS.SecurityGroupIDs, Ports: portsOf(cfg), DryRun: dryRun}
	region := ""
	if providerID != "" {
		var err error
		if region, r.Instance, err = aws.ParseProviderID(providerID); err != nil {
			return nil, err
		}
	}
	a, err := account.AWS(cfg, region)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	return awsports.Open(ctx, a, r)
}

func openAzure(ctx context.Context, cfg *config.Config, providerID string, dryRun bool) ([]cloud.PortRule, error) {
	r := azureports.Request{SubnetID: cfg.Azure.SubnetID, NSGID: cfg.Azure.NSGID, Ports: portsOf(cfg), DryRun: dryRun}
	if providerID != "" {
		var err error
		if r.VM, err = azure.ParseProviderID(providerID); err != nil {
			return nil, err
		}
	}
	a, err := account.Azure(cfg)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	return azureports.Open(ctx, a, r)
}

// rulesView is the answer in --output json. Its keys are a promise.
type rulesView struct {
	DryRun bool             `json:"dryRun"`
	Rules  []cloud.PortRule `json:"rules"`
	Remark string           `json:"remark"`
}

func printRules(w io.Writer, rules []cloud.PortRule, cfg *config.Config, dryRun bool, output string) error {
	remark := fmt.Sprintf("%d is opened for udp and tcp: the manuals say tcp, but VXLAN is UDP (RFC 7348),\nand without udp pods have no network. tcp does no more than agree with the manuals.", cfg.VXLANPort)
	if output == "json" {
		v := rulesView{DryRun: dryRun, Rules: append([]cloud.PortRule{}, rules...), Remark: strings.ReplaceAll(remark, "\n", " ")}
		b, err := json.MarshalIndent(v, "", "  ")
		fmt.Fprintln(w, string(b))
		return err
	}
	if len(rules) == 0 {
		fmt.Fprintln(w, "no security group is on the way between the nodes and pod VMs: nothing to open")
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "IN\tNAME\tPORT\tFROM\tFOR\tSTATE")
	wanted := 0
	for _, r := range rules {
		name := r.Name
		if r.Priority != 0 {
			name += fmt.Sprintf(" (priority %d)", r.Priority)
		}
		state := string(r.State)
		if r.State == cloud.RuleWanted {
			wanted++
			if dryRun {
				state = "would be made"
			}
		}
		fmt.Fprintf(t, "%s\t%s\t%d/%s\t%s\t%s\t%s\n", r.Where[strings.LastIndex(r.Where, "/")+1:], name, r.Number, r.Protocol, r.From, r.For, state)
	}
	t.Flush()
	fmt.Fprintf(w, "\n%s\n", remark)
	if dryRun && wanted > 0 {
		fmt.Fprintln(w, "\nNothing was made. Without --dry-run, it is.")
	}
	return nil
}
