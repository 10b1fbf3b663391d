// SPDX-License-Identifier: Apache-2.0

package cluster

import "time"

// Of Kubernetes' objects, what the checks look at.

// Metadata of an object.
type Metadata struct {
	Name, Namespace, UID string
	DeletionTimestamp    *time.Time
}

// Condition of an object.
type Condition struct{ Type, Status, Reason, Message string }

// Conditions of an object.
type Conditions []Condition

// Get returns the condition of a type, or one that says nothing.
func (cs Conditions) Get(typ string) Condition {
	for _, c := range cs {
		if c.Type == typ {
			return c
		}
	}
	return Condition{Type: typ}
}

// Node is a worker node.
type Node struct {
	Status struct {
		Conditions Conditions
		NodeInfo   struct{ KubeletVersion, ContainerRuntimeVersion, KernelVersion, BootID string }
	}
}

// Pod is a pod.
type Pod struct {
	Metadata Metadata
	Spec     struct {
		RuntimeClassName string
		Overhead         map[string]string
	}
	Status struct {
		Phase, Reason, Message, PodIP, HostIP, QOSClass string
		Conditions                                      Conditions
		InitContainerStatuses                           []ContainerStatus
		ContainerStatuses                               []ContainerStatus
	}
}

// Ready tells whether the pod is.
func (p *Pod) Ready() bool { return p.Status.Conditions.Get("Ready").Status == "True" }

// Container returns the status of a container of the pod, or an empty one.
func (p *Pod) Container(name string) ContainerStatus {
	for _, all := range [][]ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
		for _, s := range all {
			if s.Name == name {
				return s
			}
		}
	}
	return ContainerStatus{}
}

// ContainerStatus is the state of a container of a pod.
type ContainerStatus struct {
	Name         string
	Ready        bool
	RestartCount int
	State        ContainerState
	LastState    ContainerState
}

// ContainerState is one of three, or none.
type ContainerState struct {
	Waiting    *struct{ Reason, Message string }
	Running    *struct{ StartedAt time.Time }
	Terminated *struct {
		ExitCode              int
		Reason, Message       string
		StartedAt, FinishedAt time.Time
	}
}

// PodList is a list of pods.
type PodList struct{ Items []Pod }

// Event is what a program of the cluster says of an object.
type Event struct {
	Metadata              Metadata
	Type, Reason, Message string
	InvolvedObject        struct{ Kind, Name string }
}

// EventList is a list of events.
type EventList struct{ Items []Event }

// Job is a job.
type Job struct {
	Status struct {
		Conditions        Conditions
		Succeeded, Failed int
	}
}
