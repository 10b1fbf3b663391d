// SPDX-License-Identifier: Apache-2.0

// Package loopback redirects what is sent to the loopback interface of a pod's network
// namespace on the node: TCP connections to any port of it lead to one port. The pod's
// programs are in another machine; whoever connects to its loopback here means them.
//
// It is one nftables table in the namespace, which goes with the namespace. Connections
// that arrive from outside of it are not touched.
package loopback

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns"
)

const tableName = "peerpod_loopback"

// Ensure redirects to port inside the namespace at path. It may be called again, with
// another port as well.
func Ensure(ctx context.Context, path string, port uint16) error {
	return netns.Do(ctx, path, func() error {
		if have, err := present(port); err != nil || have {
			return err
		}
		c, err := nftables.New()
		if err != nil {
			return err
		}
		table := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: tableName}
		// Added so that there is one to delete: in one transaction, so that there is
		// never half a table.
		c.AddTable(table)
		c.DelTable(table)
		c.AddTable(table)
		chain := c.AddChain(&nftables.Chain{
			Name: "output", Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest,
		})
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: rule(port)})
		if err := c.Flush(); err != nil {
			return fmt.Errorf("redirect the pod's loopback: %w", err)
		}
		return nil
	})
}

// Remove takes the redirect away. A namespace without one, or none at all, is no error.
func Remove(ctx context.Context, path string) error {
	err := netns.Do(ctx, path, func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		c.DelTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: tableName})
		if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove the redirect of the pod's loopback: %w", err)
		}
		return nil
	})
	// A plain file where a namespace was mounted means that it was unmounted.
	if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
		return nil
	}
	return err
}

// rule is `ip daddr 127.0.0.0/8 meta l4proto tcp redirect to :port`.
func rule(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4}, // destination address
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: net.IPv4Mask(255, 0, 0, 0), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{127, 0, 0, 0}},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.Redir{RegisterProtoMin: 1},
	}
}

// present tells whether the redirect to port is there; for use inside netns.Do.
func present(port uint16) (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, err
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return false, fmt.Errorf("list the pod's nftables: %w", err)
	}
	for _, t := range tables {
		if t.Name != tableName {
			continue
		}
		rules, err := c.GetRules(t, &nftables.Chain{Name: "output", Table: t})
		if err != nil {
			return false, fmt.Errorf("list the rules of nftables table %s: %w", tableName, err)
		}
		if len(rules) != 1 {
			return false, nil
		}
		for _, e := range rules[0].Exprs {
			if i, ok := e.(*expr.Immediate); ok {
				return bytes.Equal(i.Data, binaryutil.BigEndian.PutUint16(port)), nil
			}
		}
	}
	return false, nil
}
