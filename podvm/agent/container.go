// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// keptExecs is how many processes added by ExecProcess a container remembers. One is
// remembered after its end, for those who ask late; a container that is probed every
// second for a year must not fill the guest with them. Beyond the number the oldest
// goes of which everything was fetched, else the oldest that has ended.
const keptExecs = 1024

// container is one container of the pod.
type container struct {
	id    ContainerID
	agent *Agent
	op    chan struct{} // holds one token: the operation lock
	// abandon ends the creation under way: nobody wants the container any more.
	abandon context.CancelFunc

	// Set by create, before the state is StateCreated.
	spec      *specs.Spec
	runner    runner
	cgroup    cgroups.Manager
	sharedPID bool
	storages  []string // mount points it holds a reference to
	imported  bool     // its root file system is the store's
	forgetOOM func()

	// freezer serialises uses of the cgroup's freezer: its manager keeps the state,
	// and a thaw must not come between another's freeze and kill.
	// Held while the kernel freezes, which the manager waits for a bounded time; a
	// kill on cgroup v2 does not need it.
	freezer sync.Mutex

	mu        sync.Mutex
	state     ContainerState     // guarded by mu
	initExec  ExecID             // guarded by mu; another name of the first process
	init      *process           // guarded by mu
	pid       int                // guarded by mu; of the first process, in the agent's pid namespace; 0: none yet
	execs     []*process         // guarded by mu; oldest first
	resources *cgroups.Resources // guarded by mu; what is in force
}

// idPattern is what names may look like: they become parts of paths.
var idPattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// reservedIDs are the agent's own directories beside those of the containers.
var reservedIDs = []string{"image", "runtime", "sandbox", "shared"}

func checkContainerID(id string) error {
	if slices.Contains(reservedIDs, id) {
		return fmt.Errorf("container_id %q is a directory of the agent: %w", id, errdefs.ErrInvalidArgument)
	}
	return checkID("container_id", id)
}

func checkID(kind, id string) error {
	if !idPattern.MatchString(id) || len(id) > 255 {
		return fmt.Errorf("%s %q: it has at least two letters, digits, '_', '.' or '-', the first a letter or digit: %w", kind, id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// lock takes the operation lock. unlock gives it back.
func (c *container) lock(ctx context.Context) error {
	select {
	case c.op <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the operation under way on container %s: %w", c.id, ctx.Err())
	}
}

func (c *container) unlock() { <-c.op }

// to takes a step of the container's life.
func (c *container) to(s ContainerState) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := step("container "+string(c.id), containerTransitions, c.state, s); err != nil {
		return err
	}
	c.state = s
	return nil
}

// in checks that the container is in one of the states, and returns which.
func (c *container) in(want ...ContainerState) (ContainerState, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if slices.Contains(want, c.state) {
		return c.state, nil
	}
	return c.state, fmt.Errorf("container %s is %s, not %s: %w", c.id, c.state, want[0], errdefs.ErrFailedPrecondition)
}

// find returns a process. An empty id means the first. NotFound: there is none of
// that name.
func (c *container) find(id ExecID) (*process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if id == "" || id == c.initExec || id == ExecID(c.id) {
		if c.init == nil {
			return nil, fmt.Errorf("container %s is %s and has no process yet: %w", c.id, c.state, errdefs.ErrNotFound)
		}
		return c.init, nil
	}
	for _, p := range c.execs {
		if p.id == id && p.started() {
			return p, nil
		}
	}
	return nil, fmt.Errorf("Invalid exec id %s of container %s: %w", id, c.id, errdefs.ErrNotFound)
}

// create sets the container up to where only the user's command is missing. The
// caller holds the operation lock and removes what create leaves after an error.
func (c *container) create(ctx context.Context, req *agentpb.CreateContainerRequest, sb *sandbox) error {
	a := c.agent
	c.spec = toSpec(req.OCI)
	for _, s := range withoutPulledPause(c.spec, req.Storages) {
		if err := a.addStorage(ctx, c.id, s); err != nil {
			return err
		}
		c.storages = append(c.storages, filepath.Clean(s.MountPoint))
	}
	if c.spec.Root != nil && c.spec.Root.Path == a.root.Path(string(c.id)) {
		used, err := a.root.Use(string(c.id))
		if err != nil {
			return err
		}
		c.imported = used
	}
	if err := c.checkSources(); err != nil {
		return err
	}
	if !isBuiltIn(c.spec) {
		addHooks(c.spec, sb.hooks)
		if c.spec.Process != nil && c.spec.Root != nil {
			if err := nameUsers(c.spec.Process, req.StringUser, c.spec.Root.Path); err != nil {
				return err
			}
		}
	}
	where := placement{
		ipc: sb.ipc, uts: sb.uts, net: a.cfg.PodNetNS, hostname: sb.hostname != "",
		cgroup: filepath.Join(a.cfg.CgroupParent, string(c.id)),
	}
	if req.SandboxPidns {
		where.pid = a.sharedPIDNS()
	}
	r, init, err := c.newRunner(where)
	if err != nil {
		return err
	}
	c.runner = r
	if err := r.spawn(init, c.spec.Process != nil && c.spec.Process.Terminal); err != nil {
		return err
	}
	return c.created(init, ExecID(req.ExecId), req.SharedMounts)
}

// checkSources names the mount whose source the guest does not have; the kernel would
// only say that something is missing.
func (c *container) checkSources() error {
	for _, m := range c.spec.Mounts {
		if m.Type != "bind" && !slices.Contains(m.Options, "bind") && !slices.Contains(m.Options, "rbind") {
			continue
		}
		if _, err := os.Stat(m.Source); err != nil {
			return fmt.Errorf("mount %s: the guest has no %s to bind there: %w: %w", m.Destination, m.Source, err, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// created notes what is known once the first process exists.
func (c *container) created(init *process, initExec ExecID, shared []*agentpb.SharedMount) error {
	fail := func(err error) error {
		_ = init.handle.Signal(unix.SIGKILL)
		_, _ = init.handle.Wait()
		init.close()
		return err
	}
	at, err := c.runner.first()
	if err != nil {
		return fail(err)
	}
	if err := c.agent.shareMounts(shared, at.pid); err != nil {
		return fail(err)
	}
	c.cgroup, c.sharedPID = at.cgroup, at.sharedPID
	if err := c.agent.offerPIDNS(at.pid); err != nil {
		return fail(err)
	}
	if at.oom != nil {
		if c.forgetOOM, err = c.agent.oom.add(c.id, at.oom, c.cgroup); err != nil {
			// The container works without; the reason of a death by memory is then missing.
			c.agent.log.Warn("cannot watch for out-of-memory kills", logkey.Container, c.id, logkey.Error, err)
		}
	}
	c.mu.Lock()
	c.init, c.initExec, c.resources, c.pid = init, initExec, &at.limits, at.pid
	c.mu.Unlock()
	if err := c.to(StateCreated); err != nil {
		return fail(err)
	}
	c.agent.wg.Go(func() { c.await(init) })
	return nil
}

// await waits for a process to end and publishes its status.
func (c *container) await(p *process) {
	st, err := p.handle.Wait()
	status := int32(255)
	if st != nil {
		status = exitStatus(st)
	} else {
		c.agent.log.Error("lost the exit status of a process", logkey.Container, c.id, logkey.Exec, p.id, logkey.Error, err)
	}
	c.mu.Lock()
	first := p == c.init
	c.mu.Unlock()
	if first {
		// A kill by the kernel is reported before the death it caused.
		c.agent.oom.check(c.id)
		if c.sharedPID {
			// The pid namespace outlives the container and with it its processes would.
			if err := c.killAll(); err != nil {
				c.agent.log.Error("kill what the container left behind", logkey.Container, c.id, logkey.Error, err)
			}
		}
		// It was created, running or paused: each may become stopped.
		_ = c.to(StateStopped)
	}
	p.mu.Lock()
	p.state, p.status = ProcessExited, status
	p.mu.Unlock()
	p.stdin.Abort()
	p.stdout.Exited()
	if p.stderr != nil {
		p.stderr.Exited()
	}
	close(p.exited)
}

// start lets the first process become the user's command.
func (c *container) start(ctx context.Context) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	if _, err := c.in(StateCreated); err != nil {
		return err
	}
	if err := c.to(StateRunning); err != nil {
		return err
	}
	if err := c.init.to(ProcessRunning); err != nil {
		return err
	}
	if err := c.runner.begin(); err != nil {
		return fmt.Errorf("start container %s: %w", c.id, err)
	}
	return nil
}

// exec adds a process. user has names for what the spec has numbers of; nil: none.
func (c *container) exec(ctx context.Context, id ExecID, spec *specs.Process, user *agentpb.StringUser) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	if _, err := c.in(StateRunning); err != nil {
		return err
	}
	if err := nameUsers(spec, user, c.rootNow()); err != nil {
		return fmt.Errorf("exec %s in container %s: %w", id, c.id, err)
	}
	p, err := newProcess(id, spec, false)
	if err != nil {
		return err
	}
	if err := c.reserve(p); err != nil {
		return err
	}
	if err := c.runner.spawn(p, spec.Terminal); err != nil {
		c.mu.Lock()
		c.execs = slices.DeleteFunc(c.execs, func(e *process) bool { return e == p })
		c.mu.Unlock()
		return fmt.Errorf("exec %s in container %s: %w", id, c.id, err)
	}
	_ = p.to(ProcessRunning) // from Starting, always
	c.agent.wg.Go(func() { c.await(p) })
	return nil
}

// rootNow is the container's root directory with all that is mounted in it.
func (c *container) rootNow() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return "/proc/" + strconv.Itoa(c.pid) + "/root"
}

// reserve takes an exec id, and makes room for it.
func (c *container) reserve(p *process) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.id == c.initExec || p.id == ExecID(c.id) || slices.ContainsFunc(c.execs, func(e *process) bool { return e.id == p.id }) {
		return fmt.Errorf("exec id %s of container %s: %w", p.id, c.id, errdefs.ErrAlreadyExists)
	}
	if len(c.execs) >= keptExecs {
		i := slices.IndexFunc(c.execs, (*process).settled)
		if i < 0 {
			i = slices.IndexFunc(c.execs, func(e *process) bool { exited, _ := e.hasExited(); return exited })
		}
		if i >= 0 {
			old := c.execs[i]
			c.execs = slices.Delete(c.execs, i, i+1)
			c.agent.wg.Go(old.close)
		}
	}
	c.execs = append(c.execs, p)
	return nil
}

// signal sends a signal as the package comment says.
func (c *container) signal(id ExecID, sig unix.Signal) error {
	p, err := c.find(id)
	if err != nil {
		return err
	}
	if id != "" || sig != unix.SIGKILL {
		return p.signal(sig)
	}
	if exited, collected := p.hasExited(); exited && collected {
		return p.signal(sig)
	}
	return c.killAll()
}

// killAll kills every process of the container, frozen ones too.
func (c *container) killAll() error {
	if err := c.killCgroup(); err != nil {
		return fmt.Errorf("kill the processes of container %s: %w", c.id, err)
	}
	c.mu.Lock()
	init := c.init
	c.mu.Unlock()
	// The first process may have moved to another cgroup; its end is that of its pid
	// namespace.
	if err := init.handle.Signal(unix.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill container %s: %w", c.id, err)
	}
	return nil
}

// killCgroup kills what is in the cgroup. An absent one is empty.
func (c *container) killCgroup() error {
	m := c.cgroup
	if cgroups.IsCgroup2UnifiedMode() {
		err := os.WriteFile(filepath.Join(m.Path(""), "cgroup.kill"), []byte("1"), 0)
		if err == nil || errors.Is(err, os.ErrNotExist) && !m.Exists() || errors.Is(err, unix.ENODEV) {
			return nil
		}
	}
	if !m.Exists() {
		return nil
	}
	c.freezer.Lock()
	defer c.freezer.Unlock()
	// Frozen, nothing can fork while the list is read. Freezing may fail in a cgroup
	// that is full of dying processes; the kill is tried all the same.
	_ = m.Freeze(cgroups.Frozen)
	pids, err := m.GetAllPids()
	errs := []error{err}
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("kill %d: %w", pid, err))
		}
	}
	if err := m.Freeze(cgroups.Thawed); err != nil {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil && m.Exists() {
		return err
	}
	return nil
}

// freeze pauses or resumes the container.
func (c *container) freeze(ctx context.Context, to ContainerState) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	from, how := StateRunning, cgroups.Frozen
	if to == StateRunning {
		from, how = StatePaused, cgroups.Thawed
	}
	if _, err := c.in(from); err != nil {
		return err
	}
	c.freezer.Lock()
	err := c.cgroup.Freeze(how)
	c.freezer.Unlock()
	if err != nil {
		return fmt.Errorf("make container %s %s: %w", c.id, to, err)
	}
	if err := c.to(to); err != nil {
		// Thawed, it takes a signal that waited and may have ended before this line.
		if _, ended := c.in(StateStopped); to == StateRunning && ended == nil {
			return nil
		}
		return err
	}
	return nil
}

// errRemoved says that somebody else removed the container first.
var errRemoved = errors.New("removed meanwhile")

// remove kills what runs and releases everything. A second call finds the container
// gone or, after an error, goes on where the first stopped.
func (c *container) remove(ctx context.Context) error {
	c.abandon()
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	c.mu.Lock()
	state, init := c.state, c.init
	processes := slices.Clone(c.execs)
	c.mu.Unlock()
	if state == StateRemoved {
		return fmt.Errorf("%s: container %s: %w", invalidID, c.id, errRemoved)
	}
	if init != nil {
		processes = append(processes, init)
		if exited, _ := init.hasExited(); !exited {
			if err := c.killAll(); err != nil {
				return err
			}
		}
	}
	for _, p := range processes {
		select {
		case <-p.exited:
		case <-ctx.Done():
			return fmt.Errorf("wait for process %s of container %s to end: %w", p.id, c.id, ctx.Err())
		}
	}
	for _, p := range processes {
		p.close()
	}
	return c.release(context.WithoutCancel(ctx))
}

// release gives back what the container holds. No process of it is left.
func (c *container) release(ctx context.Context) error {
	a := c.agent
	if c.forgetOOM != nil {
		c.forgetOOM()
	}
	if c.runner != nil {
		if err := c.runner.destroy(); err != nil {
			return fmt.Errorf("remove container %s: %w", c.id, err)
		}
	}
	var errs []error
	for _, m := range c.storages {
		errs = append(errs, a.dropStorage(m))
	}
	c.storages = nil
	if c.imported {
		_, err := a.root.Remove(ctx, string(c.id))
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove container %s: %w", c.id, err)
	}
	if err := c.to(StateRemoved); err != nil {
		return err
	}
	a.mu.Lock()
	if a.containers[c.id] == c {
		delete(a.containers, c.id)
	}
	a.mu.Unlock()
	return nil
}

// pidNSPath is a pid namespace that stays open as f, as a path that any process of
// the guest can open.
func pidNSPath(f *os.File) string {
	return "/proc/" + strconv.Itoa(os.Getpid()) + "/fd/" + strconv.Itoa(int(f.Fd()))
}
