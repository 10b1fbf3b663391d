// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Source is one sender that the node's source filter lets in.
type Source struct {
	Remote netip.Addr
	VNI    uint32
	Port   uint16
}

// sourceTable and what is in it. The names are visible in nft list ruleset.
const (
	sourceTable  = "peerpod_vxlan"
	portSet      = "ports"
	source4Set   = "sources4"
	source6Set   = "sources6"
	inputChain   = "input"
	sourceChain  = "sources"
	ruleVersion  = "peerpod 1" // user data of each rule; change it with the rules
	keyLenIPv4   = 12          // port, address, VNI, each padded to 4 bytes
	keyLenIPv6   = 24
	vniOffset    = 12 // in the UDP datagram: UDP header 8, VXLAN flags and reserved 4 (RFC 7348 §5)
	vniLen       = 3
	register32   = unix.NFT_REG32_00
	nfprotoIPv4  = unix.NFPROTO_IPV4
	nfprotoIPv6  = unix.NFPROTO_IPV6
	ipv4SrcField = 12
	ipv6SrcField = 8
)

// vniType only says how nft list ruleset prints a VNI: 0x012345 reads 1.35.69.0. As an
// integer, which has no fixed length, it would always read 0 (nft 1.0.6).
var vniType = nftables.TypeIPAddr

// nftLock serialises this process's changes of nftables: a change reads first and
// then sends one transaction, and the nftables library counts set ids in a global.
// It is a channel so that a waiter can leave with its context.
var nftLock = make(chan struct{}, 1)

func lockNFT(ctx context.Context) (unlock func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case nftLock <- struct{}{}:
		return func() { <-nftLock }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// sourceFilter is the table in the caller's network namespace.
type sourceFilter struct {
	conn     *nftables.Conn
	table    *nftables.Table
	ports    *nftables.Set
	sources4 *nftables.Set
	sources6 *nftables.Set
	exists   bool
}

func openSourceFilter() (*sourceFilter, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables socket: %w", err)
	}
	t := &nftables.Table{Name: sourceTable, Family: nftables.TableFamilyINet}
	f := &sourceFilter{
		conn:  conn,
		table: t,
		ports: &nftables.Set{Table: t, Name: portSet, KeyType: nftables.TypeInetService},
		sources4: &nftables.Set{Table: t, Name: source4Set, Concatenation: true,
			KeyType: nftables.MustConcatSetType(nftables.TypeInetService, nftables.TypeIPAddr, vniType)},
		sources6: &nftables.Set{Table: t, Name: source6Set, Concatenation: true,
			KeyType: nftables.MustConcatSetType(nftables.TypeInetService, nftables.TypeIP6Addr, vniType)},
	}
	f.exists, err = hasTable(conn, t)
	return f, err
}

func hasTable(conn *nftables.Conn, t *nftables.Table) (bool, error) {
	tables, err := conn.ListTablesOfFamily(t.Family)
	if err != nil {
		return false, fmt.Errorf("list nftables tables: %w", err)
	}
	return slices.ContainsFunc(tables, func(o *nftables.Table) bool { return o.Name == t.Name }), nil
}

// allowSource lets s in and everybody else out of its port. It reports whether
// anything had to change.
func allowSource(ctx context.Context, s Source) (bool, error) {
	unlock, err := lockNFT(ctx)
	if err != nil {
		return false, err
	}
	defer unlock()
	f, err := openSourceFilter()
	if err != nil {
		return false, err
	}
	changed, err := f.ensureRules()
	if err != nil {
		return false, err
	}
	for _, want := range []struct {
		set *nftables.Set
		key []byte
	}{{f.ports, portKey(s.Port)}, {f.setOf(s), s.key()}} {
		keys, err := f.keys(want.set)
		if err != nil {
			return false, err
		}
		if containsKey(keys, want.key) {
			continue
		}
		changed = true
		if err := f.conn.SetAddElements(want.set, []nftables.SetElement{{Key: want.key}}); err != nil {
			return false, fmt.Errorf("add element to nftables set %s: %w", want.set.Name, err)
		}
	}
	if !changed {
		return false, nil
	}
	if err := f.conn.Flush(); err != nil {
		return false, fmt.Errorf("allow VXLAN source %s VNI %d in nftables: %w", s.Remote, s.VNI, err)
	}
	return true, nil
}

// disallowSource is the reverse of allowSource: with the last source of a port the
// port goes, with the last of all the table.
func disallowSource(ctx context.Context, s Source) error {
	unlock, err := lockNFT(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	f, err := openSourceFilter()
	if err != nil || !f.exists {
		return err
	}
	sources, err := f.list()
	if err != nil {
		return err
	}
	s.Remote = s.Remote.Unmap()
	rest := slices.DeleteFunc(slices.Clone(sources), func(o Source) bool { return o == s })
	samePort := slices.ContainsFunc(rest, func(o Source) bool { return o.Port == s.Port })
	switch {
	case len(rest) == 0:
		f.conn.DelTable(f.table)
	case len(rest) == len(sources):
		return nil
	default:
		if err := f.conn.SetDeleteElements(f.setOf(s), []nftables.SetElement{{Key: s.key()}}); err != nil {
			return fmt.Errorf("delete element of nftables set: %w", err)
		}
		if !samePort {
			if err := f.conn.SetDeleteElements(f.ports, []nftables.SetElement{{Key: portKey(s.Port)}}); err != nil {
				return fmt.Errorf("delete element of nftables set: %w", err)
			}
		}
	}
	if err := f.conn.Flush(); err != nil {
		return fmt.Errorf("disallow VXLAN source %s VNI %d in nftables: %w", s.Remote, s.VNI, err)
	}
	return nil
}

// ListNode returns the senders that the filter in the caller's network namespace
// lets in: one for each node end that was made and not removed.
func ListNode(ctx context.Context) ([]Source, error) {
	unlock, err := lockNFT(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	f, err := openSourceFilter()
	if err != nil || !f.exists {
		return nil, err
	}
	return f.list()
}

func (f *sourceFilter) list() ([]Source, error) {
	var out []Source
	for _, set := range []*nftables.Set{f.sources4, f.sources6} {
		keys, err := f.keys(set)
		if err != nil {
			return nil, err
		}
		for _, k := range keys {
			s, err := sourceOf(k)
			if err != nil {
				return nil, fmt.Errorf("nftables set %s: %w", set.Name, err)
			}
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(a, b Source) int {
		return cmp.Or(cmp.Compare(a.VNI, b.VNI), cmp.Compare(a.Port, b.Port), a.Remote.Compare(b.Remote))
	})
	return out, nil
}

// keys returns the elements of set, none when the table does not exist yet.
func (f *sourceFilter) keys(set *nftables.Set) ([][]byte, error) {
	if !f.exists {
		return nil, nil
	}
	elements, err := f.conn.GetSetElements(set)
	if err != nil {
		return nil, fmt.Errorf("list elements of nftables set %s: %w", set.Name, err)
	}
	keys := make([][]byte, len(elements))
	for i, e := range elements {
		keys[i] = e.Key
	}
	return keys, nil
}

func (f *sourceFilter) setOf(s Source) *nftables.Set {
	if s.Remote.Unmap().Is4() {
		return f.sources4
	}
	return f.sources6
}

func containsKey(keys [][]byte, key []byte) bool {
	return slices.ContainsFunc(keys, func(k []byte) bool { return slices.Equal(k, key) })
}

func portKey(port uint16) []byte { return binary.BigEndian.AppendUint16(nil, port) }

// key is port, address and VNI as the rule loads them: each field begins at a
// multiple of four bytes, and the kernel fills the rest with zeros.
func (s Source) key() []byte {
	k := binary.BigEndian.AppendUint16(nil, s.Port)
	k = append(k, 0, 0)
	k = append(k, s.Remote.Unmap().AsSlice()...)
	return binary.BigEndian.AppendUint32(k, s.VNI<<8)
}

func sourceOf(key []byte) (Source, error) {
	if len(key) != keyLenIPv4 && len(key) != keyLenIPv6 {
		return Source{}, fmt.Errorf("key of %d bytes is not one of ours", len(key))
	}
	end := len(key) - 4
	addr, _ := netip.AddrFromSlice(key[4:end])
	return Source{
		Remote: addr,
		VNI:    binary.BigEndian.Uint32(key[end:]) >> 8,
		Port:   binary.BigEndian.Uint16(key),
	}, nil
}

// ensureRules puts the table with its sets, chains and rules into the transaction
// unless all are there. One transaction made them, so rules that are there mean that
// the sets are; rules of another version are replaced.
func (f *sourceFilter) ensureRules() (bool, error) {
	priority := nftables.ChainPriorityRaw
	accept := nftables.ChainPolicyAccept
	input := &nftables.Chain{Name: inputChain, Table: f.table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookInput, Priority: priority, Policy: &accept}
	sources := &nftables.Chain{Name: sourceChain, Table: f.table}
	inputRules := [][]expr.Any{portRule(f.ports)}
	sourceRules := [][]expr.Any{
		sourceRule(nfprotoIPv4, ipv4SrcField, 4, f.sources4),
		sourceRule(nfprotoIPv6, ipv6SrcField, 16, f.sources6),
		{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}},
	}
	if f.exists {
		a, err := rulesCurrent(f.conn, input, len(inputRules))
		if err != nil {
			return false, err
		}
		b, err := rulesCurrent(f.conn, sources, len(sourceRules))
		if err != nil || (a && b) {
			return false, err
		}
	}
	f.conn.AddTable(f.table)
	for _, set := range []*nftables.Set{f.ports, f.sources4, f.sources6} {
		if err := f.conn.AddSet(set, nil); err != nil {
			return false, fmt.Errorf("add nftables set %s: %w", set.Name, err)
		}
	}
	f.conn.AddChain(sources)
	f.conn.AddChain(input)
	f.conn.FlushChain(input)
	f.conn.FlushChain(sources)
	addRules(f.conn, sources, sourceRules)
	addRules(f.conn, input, inputRules)
	return true, nil
}

func addRules(conn *nftables.Conn, chain *nftables.Chain, rules [][]expr.Any) {
	for _, exprs := range rules {
		conn.AddRule(&nftables.Rule{Table: chain.Table, Chain: chain, Exprs: exprs, UserData: []byte(ruleVersion)})
	}
}

// rulesCurrent reports whether chain has n rules of this version.
func rulesCurrent(conn *nftables.Conn, chain *nftables.Chain, n int) (bool, error) {
	rules, err := conn.GetRules(chain.Table, chain)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("list rules of nftables chain %s: %w", chain.Name, err)
	}
	for _, r := range rules {
		if string(r.UserData) != ruleVersion {
			return false, nil
		}
	}
	return len(rules) == n, nil
}

// portRule: UDP to one of our ports is decided by the chain sources.
func portRule(ports *nftables.Set) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: 1, SetName: ports.Name, SetID: ports.ID},
		&expr.Verdict{Kind: expr.VerdictJump, Chain: sourceChain},
	}
}

// sourceRule accepts what a (port, source address, VNI) of set sent. A datagram too
// short to have a VNI does not match and meets the drop at the end.
func sourceRule(family byte, field, length uint32, set *nftables.Set) []expr.Any {
	words := length / 4
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: register32, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Payload{DestRegister: register32 + 1, Base: expr.PayloadBaseNetworkHeader, Offset: field, Len: length},
		&expr.Payload{DestRegister: register32 + 1 + words, Base: expr.PayloadBaseTransportHeader, Offset: vniOffset, Len: vniLen},
		&expr.Lookup{SourceRegister: register32, SetName: set.Name, SetID: set.ID},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
}

// markBytes is a packet mark in the form of a register.
func markBytes(mark uint32) []byte { return binaryutil.NativeEndian.PutUint32(mark) }
