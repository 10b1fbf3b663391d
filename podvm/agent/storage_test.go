// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/typespb"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/testing/protocmp"
)

// slowDriver adds a driver whose making waits to be told how to end.
func slowDriver(t *testing.T) (began chan ContainerID, end chan error) {
	began, end = make(chan ContainerID), make(chan error)
	storageDrivers["slow"] = storageDriver{make: func(ctx context.Context, _ *Agent, r *storageRequest) (func() error, error) {
		began <- r.container
		select {
		case err := <-end:
			return nil, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}}
	t.Cleanup(func() { delete(storageDrivers, "slow") })
	return began, end
}

// A storage that takes long holds up those who want it too and nobody else; what one
// caller could not make, the next one tries.
func TestSlowStorage(t *testing.T) {
	began, end := slowDriver(t)
	g := newGuest(t)
	at := filepath.Join(g.agent.cfg.StateDir, "slow")
	slow := &agentpb.Storage{Driver: "slow", MountPoint: at}
	done := make(chan error, 2)
	add := func(id ContainerID) { done <- g.agent.addStorage(g.ctx(), id, slow) }
	go add("first")
	if id := <-began; id != "first" {
		t.Errorf("made for %q", id)
	}
	go add("second")
	other := &agentpb.Storage{Driver: "local", MountPoint: filepath.Join(g.agent.cfg.StateDir, "other")}
	if err := g.agent.addStorage(g.ctx(), "third", other); err != nil {
		t.Errorf("another storage: %v", err)
	}
	gone, cancel := context.WithCancel(g.ctx())
	cancel()
	if err := g.agent.addStorage(gone, "fourth", slow); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that left: %v", err)
	}
	end <- errors.New("no luck")
	if err := <-done; err == nil || !strings.Contains(err.Error(), "no luck") {
		t.Errorf("the first: %v", err)
	}
	if id := <-began; id != "second" {
		t.Errorf("made for %q", id)
	}
	end <- nil
	if err := <-done; err != nil {
		t.Errorf("the second: %v", err)
	}
	if err := g.agent.dropStorage(at); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(at); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	if err := g.agent.dropAllStorage(); err != nil {
		t.Error(err)
	}
}

// Who removes a container that is still being created does not wait for its storage.
func TestRemoveAbandonsCreate(t *testing.T) {
	began, _ := slowDriver(t)
	g := newGuest(t)
	g.sandbox()
	created := make(chan error, 1)
	go func() {
		_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "main", OCI: g.spec("true"), Storages: []*agentpb.Storage{
			{Driver: "slow", MountPoint: filepath.Join(g.agent.cfg.StateDir, "slow")},
		}})
		created <- err
	}()
	<-began
	_, err := g.RemoveContainer(g.ctx(), &agentpb.RemoveContainerRequest{ContainerId: "main"})
	wantClass(t, "RemoveContainer of one that never was", err, errdefs.ErrInternal)
	wantClass(t, "CreateContainer", <-created, context.Canceled)
}

func TestStorageRefusals(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	dir := g.agent.cfg.StateDir
	for _, tc := range []struct {
		s    *agentpb.Storage
		says string
	}{
		{&agentpb.Storage{Driver: "blk", MountPoint: dir + "/x"}, `"blk"`},
		{&agentpb.Storage{Driver: "local", MountPoint: dir + "/../x"}, "not below"},
		{&agentpb.Storage{Driver: "local", MountPoint: dir}, "not below"},
		{&agentpb.Storage{Driver: "local", MountPoint: dir + "/x", Options: []string{"mode=9"}}, "mode=9"},
		{&agentpb.Storage{Driver: "local", MountPoint: dir + "/x", Options: []string{"fsgid=-1"}}, "fsgid=-1"},
		{&agentpb.Storage{Driver: "local", MountPoint: dir + "/x", Options: []string{"quota=1"}}, "quota=1"},
		{&agentpb.Storage{Driver: "local", MountPoint: dir + "/x", Options: []string{"size=much"}}, "size=much"},
		{&agentpb.Storage{Driver: "ephemeral", Fstype: "ext4", MountPoint: dir + "/x"}, "ext4"},
		{&agentpb.Storage{Driver: "ephemeral", MountPoint: dir + "/x", Options: []string{"colour=red"}}, "colour=red"},
		{&agentpb.Storage{Driver: "bind", Source: "/nowhere", MountPoint: dir + "/x"}, "/nowhere"},
		{&agentpb.Storage{Driver: "bind", Source: "/tmp", MountPoint: dir + "/x", Options: []string{"size=1"}}, "size=1"},
	} {
		_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "main", OCI: g.spec("true"), Storages: []*agentpb.Storage{tc.s}})
		wantClass(t, fmt.Sprint(tc.s), err, errdefs.ErrInvalidArgument)
		if err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%v: %v does not say %q", tc.s, err, tc.says)
		}
		if _, err := os.Stat(dir + "/x"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%v: something is left: %v", tc.s, err)
		}
	}
	at := dir + "/shared/both"
	must[any](t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "main", OCI: g.spec("true"), Storages: []*agentpb.Storage{{Driver: "local", MountPoint: at}}}))
	_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "other", OCI: g.spec("true"), Storages: []*agentpb.Storage{{Driver: "ephemeral", MountPoint: at}}})
	wantClass(t, "one mount point, two drivers", err, errdefs.ErrInvalidArgument)
}

// An emptyDir with a limit takes no more than that, for all containers together.
func TestLocalSizeLimit(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	at := g.agent.cfg.StateDir + "/shared/containers/sandbox/rootfs/local/data"
	volume := []*agentpb.Storage{{Driver: "local", Source: "local", Fstype: "local", MountPoint: at, Options: []string{"mode=0777", "size=1048576"}}}
	run := func(id, command string) string {
		t.Helper()
		spec := g.spec(command)
		spec.Mounts = append(spec.Mounts, &agentpb.Mount{Destination: "/vol/data", Source: at, Type: "bind", Options: []string{"rbind"}})
		must[any](t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: id, OCI: spec, Storages: volume}))
		g.start(id)
		out := g.readAll(id, "")
		g.wait(id, "")
		g.remove(id)
		return out
	}
	if out := run("first", "dd if=/dev/zero of=/vol/data/half bs=1k count=600 2>/dev/null && echo fits"); out != "fits\n" {
		t.Errorf("first: %q", out)
	}
	if out := run("second", "dd if=/dev/zero of=/vol/data/more bs=1k count=600 2>/dev/null || echo full; ls /vol/data"); out != "full\nhalf\nmore\n" {
		t.Errorf("second: %q", out)
	}
	must[any](t)(g.DestroySandbox(g.ctx(), &agentpb.DestroySandboxRequest{}))
}

// fs_group gives a volume with content to a group; with OnRootMismatch only where
// its root is not the group's yet.
func TestFSGroup(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	source := filepath.Join(g.dir, "content")
	secret := filepath.Join(source, "dir", "file")
	outside := filepath.Join(g.dir, "outside")
	for _, err := range []error{
		os.MkdirAll(filepath.Dir(secret), 0o700), os.WriteFile(secret, []byte("x"), 0o600), os.WriteFile(outside, nil, 0o600),
		os.Symlink(outside, filepath.Join(source, "link")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	check := func(path string, gid uint32, mode uint32) {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Gid != gid || st.Mode&0o7777 != mode {
			t.Errorf("%s: group %d, mode %o, %v; want group %d, mode %o", path, st.Gid, st.Mode&0o7777, err, gid, mode)
		}
	}
	apply := func(id string, gid uint32, policy typespb.FSGroupChangePolicy) {
		t.Helper()
		must[any](t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: id, OCI: g.spec("true"), Storages: []*agentpb.Storage{{
			Driver: "bind", Source: source, MountPoint: filepath.Join(g.agent.cfg.StateDir, "bound"), FsGroup: &agentpb.FSGroup{GroupId: gid, GroupChangePolicy: policy},
		}}}))
		g.remove(id)
	}
	apply("first", 500, typespb.FSGroupChangePolicy_OnRootMismatch)
	check(source, 500, 0o2770)
	check(filepath.Dir(secret), 500, 0o2770)
	check(secret, 500, 0o660)
	check(outside, 0, 0o600)
	if err := os.Chown(secret, 0, 7); err != nil {
		t.Fatal(err)
	}
	apply("second", 500, typespb.FSGroupChangePolicy_OnRootMismatch)
	check(secret, 7, 0o660)
	apply("third", 500, typespb.FSGroupChangePolicy_Always)
	check(secret, 500, 0o660)
}

// A file system in memory changes its size in place, and keeps what is in it and its
// flags.
func TestUpdateEphemeralMounts(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	at := g.agent.cfg.StateDir + "/sandbox/ephemeral/mem"
	mem := func(size string) *agentpb.Storage {
		return &agentpb.Storage{Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", MountPoint: at, Options: []string{"noexec", size}}
	}
	spec := g.spec("while read size; do dd if=/dev/zero of=/vol/mem/f bs=1k count=$size 2>/dev/null && echo fits || echo full; done")
	spec.Mounts = append(spec.Mounts, &agentpb.Mount{Destination: "/vol/mem", Source: at, Type: "bind", Options: []string{"rbind"}})
	must[any](t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "main", OCI: spec, Storages: []*agentpb.Storage{mem("size=1m")}}))
	g.start("main")
	try := func(kib, want string) {
		t.Helper()
		must[any](t)(g.WriteStdin(g.ctx(), &agentpb.WriteStreamRequest{ContainerId: "main", Data: []byte(kib + "\n")}))
		if got := must[*agentpb.ReadStreamResponse](t)(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: "main", Len: 100})); string(got.Data) != want+"\n" {
			t.Errorf("%s KiB: %q, want %q", kib, got.Data, want)
		}
	}
	try("2000", "full")
	must[any](t)(g.UpdateEphemeralMounts(g.ctx(), &agentpb.UpdateEphemeralMountsRequest{Storages: []*agentpb.Storage{{Driver: "ephemeral", MountPoint: at, Options: []string{"size=4m"}}}}))
	try("3000", "fits")
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil || st.Flags&unix.ST_NOEXEC == 0 || st.Blocks*uint64(st.Bsize) != 4<<20 {
		t.Errorf("file system: %d bytes, flags %#x, %v", st.Blocks*uint64(st.Bsize), st.Flags, err)
	}
	for says, bad := range map[string]*agentpb.Storage{
		"below":     {Driver: "ephemeral", MountPoint: "/tmp", Options: []string{"size=1m"}},
		"size=100k": {Driver: "ephemeral", MountPoint: at, Options: []string{"size=100k"}}, // less than is used
		`"local"`:   {Driver: "local", MountPoint: at, Options: []string{"size=1m"}},
		"there is":  {Driver: "ephemeral", MountPoint: at + "2", Options: []string{"size=1m"}},
	} {
		_, err := g.UpdateEphemeralMounts(g.ctx(), &agentpb.UpdateEphemeralMountsRequest{Storages: []*agentpb.Storage{bad}})
		wantClass(t, says, err, errdefs.ErrInvalidArgument)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v does not say %q", err, says)
		}
	}
}

func TestGetVolumeStats(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	at := g.agent.cfg.StateDir + "/sandbox/ephemeral/mem"
	must[any](t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "main", OCI: g.spec("true"), Storages: []*agentpb.Storage{
		{Driver: "ephemeral", MountPoint: at, Options: []string{"size=1m", "nr_inodes=100"}},
	}}))
	if err := os.WriteFile(filepath.Join(at, "f"), make([]byte, 256<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	got := must[*agentpb.VolumeStatsResponse](t)(g.GetVolumeStats(g.ctx(), &agentpb.VolumeStatsRequest{VolumeGuestPath: at}))
	want := []*agentpb.VolumeUsage{
		{Unit: agentpb.VolumeUsage_BYTES, Total: 1 << 20, Used: 256 << 10, Available: 768 << 10},
		{Unit: agentpb.VolumeUsage_INODES, Total: 100, Used: 2, Available: 98},
	}
	if diff := cmp.Diff(want, got.Usage, protocmp.Transform()); diff != "" || got.VolumeCondition == nil || got.VolumeCondition.Abnormal {
		t.Errorf("condition %v, usage (-want +got):\n%s", got.VolumeCondition, diff)
	}
	_, err := g.GetVolumeStats(g.ctx(), &agentpb.VolumeStatsRequest{VolumeGuestPath: at + "/none"})
	wantClass(t, "a path that is not there", err, errdefs.ErrInternal)
}
