// SPDX-License-Identifier: Apache-2.0

// Package cloud is what the adaptor asks of a place that makes virtual machines.
// A provider lives in a package of its own beside this one and is held to the
// contract below by the conformance suite in cloudtest.
//
// An instance is what the provider bills. The adaptor writes a record before it
// asks for one and drops the record only when the provider answers NotFound;
// everything here exists to make that possible when replies are lost, lists lag
// and callers die.
package cloud

import (
	"context"
	"net/netip"
	"time"
)

// Provider makes, finds and deletes instances. All methods are safe for concurrent
// use, return when ctx ends, and never log; they wrap errors with %w so that the
// class tests of github.com/containerd/errdefs hold:
//
//	InvalidArgument     the request or the configuration is wrong; the text says which key to change
//	PermissionDenied    the credential is missing, expired or may not do this
//	ResourceExhausted   no capacity, or a quota is used up: another type or place may do
//	Unavailable         throttled, or the service is down: the same call may succeed later
//	NotFound            there is no such instance (Get, Delete)
//	AlreadyExists       the token was used with a different request (Create)
//	FailedPrecondition  this node or account lacks something the provider needs
//
// An error of no class is unknown and must be treated as "it may have happened".
type Provider interface {
	// Plan chooses the instance type for a size and says what would be made. It
	// makes nothing; what a cloud's types are it may ask once, and keeps the answer.
	// InvalidArgument and ResourceExhausted name what was asked, what there is, and
	// what to change.
	Plan(ctx context.Context, size Size) (Plan, error)

	// Create makes the instance for req.Token, or returns the one that already
	// exists for it: the same token never makes two, however often and from
	// however many processes it is called. It returns once the instance has an
	// ID; addresses may still be missing (see Get). When it fails after the cloud
	// may have accepted the request, List finds the instance by its tags. A token
	// whose instance is gone may make a new one, so a caller does not delete an
	// instance while a Create with its token is under way.
	Create(ctx context.Context, req CreateRequest) (Instance, error)

	// Get returns the instance as it is now. NotFound once it is gone; an
	// instance that is being deleted, or that has ended but is still listed, is
	// returned with StateDeleting or StateFailed.
	Get(ctx context.Context, id InstanceID) (Instance, error)

	// List returns every instance that carries the owner's tags, those being
	// deleted included. It may lag behind Create and Delete by some seconds.
	List(ctx context.Context, owner Owner) ([]Instance, error)

	// Delete starts deletion and everything that belongs to the instance with it
	// (disks, network interfaces, addresses). Nil: deletion is under way, call
	// again later. NotFound: nothing of it is left, and nothing is billed.
	Delete(ctx context.Context, id InstanceID) error

	// Check tells whether the provider could work now: configuration complete,
	// credentials accepted, what it needs on this node present. It changes
	// nothing. All problems are joined in one error.
	Check(ctx context.Context) error
}

// Underlay is the network between this node and its instances.
type Underlay struct {
	// Local is this node's address as the instances see it, with the prefix of
	// its network.
	Local netip.Prefix
	// MTU in bytes of the device that holds Local.
	MTU int
}

// UnderlayReporter is implemented by providers that make the network between node
// and instances themselves. Without it the adaptor uses the node's default route.
type UnderlayReporter interface {
	Underlay(ctx context.Context) (Underlay, error)
}

// InstanceID is the provider's own name for an instance. Opaque, never empty for an
// instance that exists.
type InstanceID string

// Owner tells whose instances are whose. Every resource a provider makes carries
// both as tags.
type Owner struct {
	Cluster string // one Kubernetes cluster, or one installation
	Node    string // worker node whose adaptor made it; "" in List: all nodes of the cluster
}

// Size is what a pod asks for. Zero fields are not asked for.
type Size struct {
	Type      string // an instance type by name; then the rest only has to fit
	VCPUs     int
	MemoryMiB int
	GPUs      int
	GPUModel  string // as the cloud calls it, case does not matter; "" takes any
	Image     string // image id or name; "" takes the configured one
}

// Plan is what Create will make.
type Plan struct {
	Type string // may be empty where the provider has no types
	// Alternatives are types that would do as well, in the order in which to try
	// them when there is no capacity for Type.
	Alternatives []string `json:",omitempty"`

	VCPUs     int
	MemoryMiB int
	GPUs      int
	Image     string
}

// CreateRequest asks for one instance.
type CreateRequest struct {
	// Token identifies the request. Chosen once by the adaptor and on its disk
	// before Create is called.
	Token string
	// Name is what a person sees in the cloud's console: at most 63 of [a-z0-9-].
	Name string
	// SandboxID is carried as a tag and comes back in Instance.
	SandboxID string
	Owner     Owner
	Plan      Plan
	// UserData is a cloud-config document; see package userdata. It holds secrets.
	UserData []byte
	// Tags are added to the provider's own. A key of the provider's own is an
	// InvalidArgument.
	Tags map[string]string

	// Note keeps what a provider must know of a request when Create is called for
	// it again, perhaps by the next process: which of several places it asked, for
	// one. The text is on disk when Note returns nil; otherwise the provider must
	// not go on. It holds no secret. nil: nobody keeps it.
	Note func(ctx context.Context, progress string) error `json:"-"`
	// Answers returns nil once the machine at addr has answered for this request, and an
	// error only when ctx ends. A provider whose Create waits for its cloud to say that
	// the instance runs asks it beside that wait, as soon as it knows the address, and
	// takes the machine's word: clouds are polled, and tell late. nil: nobody can tell.
	Answers func(ctx context.Context, addr netip.Addr) error `json:"-"`
	// Progress is what Note was last given for this token. "": it was not called.
	Progress string `json:"-"`
}

// State is where an instance stands, in the terms common to all clouds.
type State int

const (
	StateUnknown  State = iota // the provider reported something this table lacks
	StatePending               // accepted; not running yet
	StateRunning               // running, as far as the cloud can tell
	StateDeleting              // deletion is under way
	StateFailed                // it ended or never started, and will not run again
)

func (s State) String() string {
	switch s {
	case StatePending:
		return "pending"
	case StateRunning:
		return "running"
	case StateDeleting:
		return "deleting"
	case StateFailed:
		return "failed"
	}
	return "unknown"
}

// Instance is one virtual machine.
type Instance struct {
	ID        InstanceID
	Name      string
	Token     string
	SandboxID string
	Owner     Owner
	State     State
	// Detail is the provider's word on a failed instance, for a person. May be empty.
	Detail string
	// Addrs are the addresses the node can reach it at; the first carries both
	// agent traffic and tunnel. Empty until the cloud has assigned one.
	Addrs     []netip.Addr
	CreatedAt time.Time
}
