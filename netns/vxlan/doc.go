// SPDX-License-Identifier: Apache-2.0

// Package vxlan owns both ends of a pod's tunnel as desired state: Ensure makes or
// repairs, Remove undoes, and both may be repeated at any time, also after a crash
// in the middle.
//
//	 worker node                                    pod VM
//	┌───────────────────────────────┐             ┌───────────────────────┐
//	│ pod netns                     │             │ pod netns             │
//	│  CNI ── eth0 ⇄ Device ────┐   │             │   ┌──── eth0 (vxlan)  │
//	│           tc redirect     │   │   UDP Port  │   │                   │
//	│ node netns          UDP socket ├───────────┤ UDP socket   root netns │
//	│            source filter      │             │   source filter       │
//	└───────────────────────────────┘             └───────────────────────┘
//
// The device is made inside the pod's namespace with its UDP socket in the caller's
// (RTM_NEWLINK with IFLA_NET_NS_FD): in one step, so no half-moved device exists at
// any instant. Devices are told from strangers' by their name, which the caller has
// recorded, together with netns.LinkGroup, which the kernel sets in that same step.
//
// A pod with several interfaces has a tunnel for each, with a VNI and a device of its own;
// all of them are made, and removed, by one call.
//
// # Who may send
//
// VXLAN has no authentication, and a VXLAN socket takes any VNI of its port from
// anybody. On the node the nftables table "inet peerpod_vxlan" in the namespace of the
// socket drops every packet to the port unless its source address belongs to its VNI.
// Elements come and go with the tunnels; the table goes with the last one. Somebody's
// "nft flush ruleset" opens the port until the next Ensure.
//
// In the guest all devices of the port are the pod's and all their packets come from one
// worker, so that the VNI needs no rule. Two IPsec policies in the namespace of the socket let UDP to the
// port come from the worker only ("ip xfrm policy" lists them); what they block is
// XfrmInPolBlock in /proc/net/xfrm_stat.
//
// # Path MTU, node end
//
// The tunnel carries less than the CNI's interface, and redirected frames bypass the
// IP stack, so that nobody would tell the sender. Therefore IP packets larger than
// the tunnel's MTU are not redirected: they go up the IP stack of the pod's
// namespace on the node, are routed to the VXLAN device and so meet the kernel's own
// forwarding path. That fragments what may be fragmented, answers the rest with ICMP
// "fragmentation needed" or "packet too big" from the pod's address, and passes GSO
// super-packets whose segments fit. For this the namespace gets, until RemoveNode:
//
//   - routing table 28784 (28785 for the pod's second interface, and so on) with a
//     default route to the device, whose next hop is a permanent neighbour with the
//     VM's MAC, and a rule (iif = the CNI's interface) that leads there. It stands before the rule for table local, which moves from
//     preference 0 to 3, because the packets' destination is an address of the
//     namespace;
//   - forwarding on the CNI's interface; for IPv6, where no such switch per interface
//     exists before Linux 6.17, on all of them, with accept_ra=2 so that a default
//     route from a router advertisement stays;
//   - copies of ARP replies, neighbour and router advertisements, by which the
//     namespace finds the sender of an oversized packet again. For IPv6 they are
//     marked by the table "ip6 peerpod_nd" so that they are delivered and not routed.
//
// A macvlan hears all multicast, because it passes on only what its own namespace has
// joined. What was changed is recorded in the alias of the device before the change.
// An oversized packet loses one hop of its TTL. Multicast and link-local IPv6 are
// redirected at any size; an underlay of IPv4 fragments what is too large, one of IPv6
// drops it.
//
// # Kernel modules
//
// Guest end: vxlan (with udp_tunnel, ip6_udp_tunnel) and xfrm_user (with xfrm_algo).
// Node end: vxlan, nf_tables (with nfnetlink, libcrc32c), sch_ingress, cls_u32 and
// act_mirred.
//
// Both ends are safe for concurrent use for different tunnels. Calls for the same
// tunnel are serialised by the caller.
package vxlan
