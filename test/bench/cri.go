// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// cri talks to containerd as the kubelet does, on a connection that stays: starting
// crictl for each call would be most of what is measured.
type cri struct {
	conn *grpc.ClientConn
	runtimeapi.RuntimeServiceClient
}

func dialCRI() (*cri, error) {
	conn, err := grpc.NewClient("unix://"+testbed.ContainerdSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &cri{conn, runtimeapi.NewRuntimeServiceClient(conn)}, nil
}

func (c *cri) Close() { c.conn.Close() }

// exec runs a command and returns how long it took.
func (c *cri) exec(ctx context.Context, container string, command ...string) (time.Duration, error) {
	begin := time.Now()
	r, err := c.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: command, Timeout: 300})
	took := time.Since(begin)
	if err == nil && r.ExitCode != 0 {
		err = fmt.Errorf("%q ended with status %d: %s", command, r.ExitCode, r.Stderr)
	}
	return took, err
}

// start creates and starts a container in a pod and returns how long both took
// together.
func (c *cri) start(ctx context.Context, pod, name, image string) (id string, took time.Duration, err error) {
	ps, err := c.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil {
		return "", 0, err
	}
	own := &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}}
	req := &runtimeapi.CreateContainerRequest{
		PodSandboxId: pod,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: name}, Image: &runtimeapi.ImageSpec{Image: image},
			Command: []string{"sleep", "1000"}, Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: own},
		},
		SandboxConfig: &runtimeapi.PodSandboxConfig{Metadata: ps.Status.Metadata},
	}
	begin := time.Now()
	r, err := c.CreateContainer(ctx, req)
	if err != nil {
		return "", 0, err
	}
	_, err = c.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: r.ContainerId})
	return r.ContainerId, time.Since(begin), err
}
