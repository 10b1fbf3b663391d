// SPDX-License-Identifier: Apache-2.0

package cloud

// Port is one that must be open between worker nodes and pod VMs.
type Port struct {
	Protocol string `json:"protocol"` // "tcp" or "udp"
	Number   int    `json:"port"`
	For      string `json:"for"`
	// BothWays: pod VMs send to nodes as well, without being asked.
	BothWays bool `json:"-"`
}

// Ports are those of a configuration's FORWARDER_PORT and VXLAN_PORT. The manuals of
// peer pods have people open 9000/tcp; VXLAN is UDP (RFC 7348, section 5). Both are in it:
// the one for the tunnel, the other because people and their audits look for it.
func Ports(forwarder, vxlan int) []Port {
	return []Port{
		{"tcp", forwarder, "forwarder", false},
		{"udp", vxlan, "VXLAN tunnel", true},
		{"tcp", vxlan, "as the manuals say", true},
	}
}

// PortRule is a rule of a firewall that opens a Port.
type PortRule struct {
	Port
	Where string    `json:"where"`          // the firewall's id
	Name  string    `json:"name,omitempty"` // the firewall's, or the rule's where rules have names
	From  string    `json:"from"`
	State RuleState `json:"state"`
	// Priority of the rule, where rules have one.
	Priority int `json:"priority,omitempty"`
}

// RuleState is what has become of a PortRule.
type RuleState string

// States of a PortRule.
const (
	RuleThere  RuleState = "there"     // it was there before, or one that lets in more
	RuleWanted RuleState = "not there" // and was not made: a dry run
	RuleMade   RuleState = "made"
)
