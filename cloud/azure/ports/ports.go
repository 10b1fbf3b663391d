// SPDX-License-Identifier: Apache-2.0

// Package ports opens the ports between worker nodes and pod VMs in network security
// groups.
//
// A packet has to pass the group of the interface and the group of the subnet, where
// they have one; where there is none, Azure lets everything pass within a virtual
// network. In each group the first rule that matches decides, by priority. So of each
// port is found out what decides now; where that is no rule, or one that denies, a rule
// is made with the lowest free priority from 1000 on, or before the one that denies.
// Rules let traffic from VirtualNetwork in to VirtualNetwork: the network of the nodes and
// those it is connected with. (learn.microsoft.com, "Network security groups", 2026-11.)
package ports

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/azure"
)

// Actions are what a role must allow for Open.
var Actions = []string{
	"Microsoft.Compute/virtualMachines/read",
	"Microsoft.Network/networkInterfaces/read",
	"Microsoft.Network/virtualNetworks/subnets/read",
	"Microsoft.Network/networkSecurityGroups/read",
	"Microsoft.Network/networkSecurityGroups/securityRules/write",
	"Microsoft.Network/locations/operations/read", // at the subscription
}

// Request says what to open.
type Request struct {
	VM       string // resource id of the node's; "": NSGID or SubnetID tells
	SubnetID string // AZURE_SUBNET_ID, where pod VMs get their interfaces; "": the node's
	NSGID    string // AZURE_NSG_ID, of pod VMs; "": none but the subnet's
	Ports    []cloud.Port
	DryRun   bool // look only
}

// Priorities of rules that are made. 100 to 4096 are a person's to give.
const (
	firstPriority, lowestPriority, highestPriority = 1000, 100, 4096
)

// virtualNetwork is the service tag for the network, its peers and what is connected.
const virtualNetwork = "VirtualNetwork"

type reference struct {
	ID string `json:"id"`
}

type group struct {
	ID         string `json:"id"`
	Name       string `json:"name"`
	Properties struct {
		SecurityRules []rule `json:"securityRules"`
	} `json:"properties"`
}

type rule struct {
	Name       string         `json:"name,omitempty"`
	Properties ruleProperties `json:"properties"`
}

type ruleProperties struct {
	Description                string   `json:"description,omitempty"`
	Protocol                   string   `json:"protocol"`
	SourcePortRange            string   `json:"sourcePortRange,omitempty"`
	SourcePortRanges           []string `json:"sourcePortRanges,omitempty"`
	DestinationPortRange       string   `json:"destinationPortRange,omitempty"`
	DestinationPortRanges      []string `json:"destinationPortRanges,omitempty"`
	SourceAddressPrefix        string   `json:"sourceAddressPrefix,omitempty"`
	SourceAddressPrefixes      []string `json:"sourceAddressPrefixes,omitempty"`
	DestinationAddressPrefix   string   `json:"destinationAddressPrefix,omitempty"`
	DestinationAddressPrefixes []string `json:"destinationAddressPrefixes,omitempty"`
	Access                     string   `json:"access"`
	Priority                   int      `json:"priority"`
	Direction                  string   `json:"direction"`
}

// Open lets nodes and pod VMs reach each other, and returns the rules that this takes,
// each with whether it was there or was made (DryRun: would be). None: nothing is in the
// way. InvalidArgument: what r names does not exist.
func Open(ctx context.Context, a *azure.Account, r Request) ([]cloud.PortRule, error) {
	ids, err := groups(ctx, a, r)
	if err != nil {
		return nil, err
	}
	var out []cloud.PortRule
	for _, id := range ids {
		var g group
		if err := get(ctx, a, id, &g); err != nil {
			return out, err
		}
		rules := plan(&g, id, r.Ports)
		for i := range rules {
			if rules[i].Priority == 0 {
				return out, fmt.Errorf("security group %s has no priority free for a rule before the one that denies %s/%d; remove that one: %w",
					g.Name, rules[i].Protocol, rules[i].Number, errdefs.ErrFailedPrecondition)
			}
			if rules[i].State != cloud.RuleThere && !r.DryRun {
				if err := a.Put(ctx, id+"/securityRules/"+rules[i].Name, azure.APINetwork, body(rules[i])); err != nil {
					return append(out, rules...), err
				}
				rules[i].State = cloud.RuleMade
			}
		}
		out = append(out, rules...)
	}
	return out, nil
}

func get(ctx context.Context, a *azure.Account, id string, into any) error {
	err := a.Get(ctx, id, versionOf(id), into)
	if azure.Missing(err) {
		return fmt.Errorf("%w: correct --provider-id, AZURE_SUBNET_ID or AZURE_NSG_ID: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

func versionOf(id string) string {
	if strings.Contains(strings.ToLower(id), "/microsoft.compute/") {
		return azure.APIVM
	}
	return azure.APINetwork
}

// groups are the ids of the security groups on the way, each once.
func groups(ctx context.Context, a *azure.Account, r Request) ([]string, error) {
	var subnets, found []string
	add := func(list *[]string, id string) {
		if id != "" && !slices.ContainsFunc(*list, func(s string) bool { return strings.EqualFold(s, id) }) {
			*list = append(*list, id)
		}
	}
	add(&found, r.NSGID)
	add(&subnets, r.SubnetID)
	if r.VM != "" {
		var vm struct {
			Properties struct {
				NetworkProfile struct {
					NetworkInterfaces []reference `json:"networkInterfaces"`
				} `json:"networkProfile"`
			} `json:"properties"`
		}
		if err := get(ctx, a, r.VM, &vm); err != nil {
			return nil, err
		}
		for _, ref := range vm.Properties.NetworkProfile.NetworkInterfaces {
			var nic struct {
				Properties struct {
					NetworkSecurityGroup reference `json:"networkSecurityGroup"`
					IPConfigurations     []struct {
						Properties struct {
							Subnet reference `json:"subnet"`
						} `json:"properties"`
					} `json:"ipConfigurations"`
				} `json:"properties"`
			}
			if err := get(ctx, a, ref.ID, &nic); err != nil {
				return nil, err
			}
			add(&found, nic.Properties.NetworkSecurityGroup.ID)
			for _, ip := range nic.Properties.IPConfigurations {
				add(&subnets, ip.Properties.Subnet.ID)
			}
		}
	}
	if len(subnets)+len(found) == 0 {
		return nil, fmt.Errorf("no network is known: give the node's --provider-id, or set AZURE_SUBNET_ID: %w", errdefs.ErrInvalidArgument)
	}
	for _, id := range subnets {
		var subnet struct {
			Properties struct {
				NetworkSecurityGroup reference `json:"networkSecurityGroup"`
			} `json:"properties"`
		}
		if err := get(ctx, a, id, &subnet); err != nil {
			return nil, err
		}
		add(&found, subnet.Properties.NetworkSecurityGroup.ID)
	}
	return found, nil
}

// plan finds out what decides about each port, and which rules are needed.
func plan(g *group, id string, ports []cloud.Port) []cloud.PortRule {
	var inbound []rule
	taken := map[int]bool{}
	for _, r := range g.Properties.SecurityRules {
		if strings.EqualFold(r.Properties.Direction, "Inbound") {
			inbound = append(inbound, r)
			taken[r.Properties.Priority] = true
		}
	}
	slices.SortFunc(inbound, func(a, b rule) int { return a.Properties.Priority - b.Properties.Priority })
	var out []cloud.PortRule
	for _, p := range ports {
		pr := cloud.PortRule{Port: p, Where: id, From: virtualNetwork, State: cloud.RuleWanted, Name: fmt.Sprintf("peerpods-%s-%d", p.Protocol, p.Number)}
		before := highestPriority + 1
		for _, r := range inbound {
			if !r.about(p) {
				continue
			}
			if strings.EqualFold(r.Properties.Access, "Allow") {
				pr.State, pr.Name, pr.Priority = cloud.RuleThere, r.Name, r.Properties.Priority
			} else {
				before = r.Properties.Priority
			}
			break
		}
		if pr.State != cloud.RuleThere {
			pr.Priority = free(taken, before)
			taken[pr.Priority] = true
		}
		out = append(out, pr)
	}
	return out
}

// free is the lowest free priority from firstPriority on; where that is not before the
// one that denies, the highest that is. 0, which Azure refuses: there is none.
func free(taken map[int]bool, before int) int {
	for p := firstPriority; p < before; p++ {
		if !taken[p] {
			return p
		}
	}
	for p := min(before, firstPriority) - 1; p >= lowestPriority; p-- {
		if !taken[p] {
			return p
		}
	}
	return 0
}

// about tells whether a rule decides about all traffic to the port within the network.
// One that denies a part of it does not count: somebody meant that part.
func (r rule) about(p cloud.Port) bool {
	q := r.Properties
	return (q.Protocol == "*" || strings.EqualFold(q.Protocol, p.Protocol)) &&
		slices.ContainsFunc(append(q.SourcePortRanges, q.SourcePortRange), func(s string) bool { return s == "*" || s == "0-65535" }) &&
		slices.ContainsFunc(append(q.DestinationPortRanges, q.DestinationPortRange), func(s string) bool { return within(p.Number, s) }) &&
		everywhere(append(q.SourceAddressPrefixes, q.SourceAddressPrefix)) &&
		everywhere(append(q.DestinationAddressPrefixes, q.DestinationAddressPrefix))
}

func everywhere(prefixes []string) bool {
	return slices.ContainsFunc(prefixes, func(s string) bool {
		return s == "*" || s == "0.0.0.0/0" || strings.EqualFold(s, virtualNetwork)
	})
}

// within tells whether a port is in a range as Azure writes them.
func within(port int, ports string) bool {
	if ports == "*" {
		return true
	}
	lo, hi, ranged := strings.Cut(ports, "-")
	if !ranged {
		hi = lo
	}
	a, err1 := strconv.Atoi(lo)
	b, err2 := strconv.Atoi(hi)
	return errors.Join(err1, err2) == nil && a <= port && port <= b
}

func body(p cloud.PortRule) rule {
	return rule{Properties: ruleProperties{
		Description: "peer pods: " + p.For, Protocol: strings.ToUpper(p.Protocol[:1]) + p.Protocol[1:],
		SourcePortRange: "*", DestinationPortRange: strconv.Itoa(p.Number),
		SourceAddressPrefix: virtualNetwork, DestinationAddressPrefix: virtualNetwork,
		Access: "Allow", Priority: p.Priority, Direction: "Inbound",
	}}
}
