// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// nameUsers replaces names of a process's user and groups by the numbers they have in
// the container's own /etc/passwd and /etc/group. Names come in the request's
// string_user or, as "user[:group]", in the process's Username; a request that has
// both means the first. root is the container's root directory. InvalidArgument: a
// name that is not there.
func nameUsers(p *specs.Process, s *agentpb.StringUser, root string) error {
	who := p.User.Username
	var groups []string
	if s != nil {
		groups = s.AdditionalGids
		if s.Uid != "" || s.Gid != "" {
			who = strings.TrimSuffix(s.Uid+":"+s.Gid, ":")
		}
	}
	if who == "" && len(groups) == 0 {
		return nil
	}
	passwd, err := openInRoot(root, "etc/passwd")
	if err != nil {
		return err
	}
	defer passwd.Close()
	group, err := openInRoot(root, "etc/group")
	if err != nil {
		return err
	}
	defer group.Close()
	u := &p.User
	if who != "" {
		// What the name leaves open is the request's.
		got, err := user.GetExecUser(who, &user.ExecUser{Uid: int(u.UID), Gid: int(u.GID)}, passwd, group)
		if err != nil {
			return fmt.Errorf("user %q is not one of the container's /etc/passwd and /etc/group: %w: %w", who, err, errdefs.ErrInvalidArgument)
		}
		u.UID, u.GID = uint32(got.Uid), uint32(got.Gid)
		for _, gid := range got.Sgids {
			u.AdditionalGids = append(u.AdditionalGids, uint32(gid))
		}
		if _, err := group.Seek(0, io.SeekStart); err != nil {
			return fmt.Errorf("read the container's /etc/group: %w", err)
		}
	}
	gids, err := user.GetAdditionalGroups(groups, group)
	if err != nil {
		return fmt.Errorf("groups %q are not all in the container's /etc/group: %w: %w", groups, err, errdefs.ErrInvalidArgument)
	}
	for _, gid := range gids {
		u.AdditionalGids = append(u.AdditionalGids, uint32(gid))
	}
	slices.Sort(u.AdditionalGids)
	u.AdditionalGids = slices.Compact(u.AdditionalGids)
	return nil
}

// openInRoot opens a file of a container. Links lead nowhere else. One that is not
// there is empty.
func openInRoot(root, name string) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root, Err: err}
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return os.Open(os.DevNull)
	}
	if err != nil {
		return nil, fmt.Errorf("open the container's /%s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("the container's /%s is not a file: %w", name, errdefs.ErrInvalidArgument)
	}
	return f, nil
}
