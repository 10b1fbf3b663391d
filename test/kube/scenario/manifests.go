// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"strings"

	"github.com/kata-remote/kata-remote/test/kube/cluster"
	"github.com/kata-remote/kata-remote/test/kube/images"
)

// expand puts the names in that manifests share. A pod's grace period is short where
// nothing is to be seen in its end.
func expand(manifest string) string {
	return strings.NewReplacer("CLASS", cluster.RuntimeClass, "AGNHOST", images.Agnhost, "BUSYBOX", images.Busybox).Replace(manifest)
}

// stays is the label of the pod that a drain leaves alone.
const stays = "stays"

var plainPod = expand(`apiVersion: v1
kind: Pod
metadata: {name: plain, namespace: default, labels: {` + stays + `: "yes"}}
spec:
  tolerations: [{operator: Exists}]
  terminationGracePeriodSeconds: 0
  containers: [{name: main, image: "AGNHOST", args: [netexec], readinessProbe: {httpGet: {path: /hostname, port: 8080}}}]
`)

// workloads are what most checks look at. They start together: what a node with work
// to do is like. ends come later, and refused one by one: a node of two processors
// carries eight machines.
func workloads() string {
	return expand(deployment + containers + early)
}

const deployment = `apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      runtimeClassName: CLASS
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: AGNHOST
        args: [netexec]
        ports: [{containerPort: 8080}]
        startupProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, failureThreshold: 60}
        readinessProbe: {httpGet: {path: /hostname, port: 8080}, periodSeconds: 2}
        livenessProbe: {exec: {command: [sh, -c, "exit 0"]}, timeoutSeconds: 30}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
---
`

// containers: one pod with init containers, a sidecar, hooks, volumes and a message.
const containers = `apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {color: blue}
---
apiVersion: v1
kind: Pod
metadata: {name: parts}
spec:
  runtimeClassName: CLASS
  restartPolicy: Never
  terminationGracePeriodSeconds: 30
  volumes:
  - {name: shared, emptyDir: {}}
  - {name: settings, configMap: {name: settings}}
  initContainers:
  - {name: first, image: "BUSYBOX", command: [sh, -c, "echo first > /shared/order"], volumeMounts: [{name: shared, mountPath: /shared}]}
  - name: sidecar
    image: BUSYBOX
    restartPolicy: Always
    command: [sh, -c, "echo sidecar runs; echo sidecar >> /shared/order; trap 'echo sidecar ends; exit 0' TERM; while :; do sleep 0.2; done"]
    startupProbe: {exec: {command: [grep, sidecar, /shared/order]}, periodSeconds: 1, timeoutSeconds: 30, failureThreshold: 60}
    volumeMounts: [{name: shared, mountPath: /shared}]
  - {name: second, image: "BUSYBOX", command: [sh, -c, "echo second >> /shared/order"], volumeMounts: [{name: shared, mountPath: /shared}]}
  containers:
  - name: main
    image: BUSYBOX
    command: [sh, -c, "echo main >> /shared/order; trap 'echo main ends; exit 0' TERM; while :; do sleep 0.2; done"]
    lifecycle:
      postStart: {exec: {command: [sh, -c, "echo post-start > /proc/1/fd/1; touch /tmp/started"]}}
      preStop: {exec: {command: [sh, -c, "echo pre-stop > /proc/1/fd/1"]}}
    readinessProbe: {exec: {command: [cat, /tmp/ready]}, periodSeconds: 1, timeoutSeconds: 30}
    volumeMounts: [{name: shared, mountPath: /shared}, {name: settings, mountPath: /settings}]
---
apiVersion: v1
kind: Pod
metadata: {name: account}
spec:
  runtimeClassName: CLASS
  terminationGracePeriodSeconds: 0
  containers: [{name: main, image: "AGNHOST", args: [inclusterclient, --poll-interval=1]}]
---
`

// early: what takes its time to end.
const early = `apiVersion: v1
kind: Pod
metadata: {name: message}
spec:
  runtimeClassName: CLASS
  restartPolicy: Never
  containers:
  - {name: file, image: "BUSYBOX", command: [sh, -c, "printf 'the reason' > /dev/termination-log; exit 3"]}
  - {name: log, image: "BUSYBOX", terminationMessagePolicy: FallbackToLogsOnError, command: [sh, -c, "echo the last words; exit 4"]}
---
apiVersion: batch/v1
kind: Job
metadata: {name: late}
spec:
  activeDeadlineSeconds: 120
  template:
    metadata: {labels: {app: late}}
    spec:
      runtimeClassName: CLASS
      restartPolicy: Never
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: "BUSYBOX", command: [sleep, "3600"]}]
---
`

// ends: pods and jobs that end, each in its way.
const ends = `apiVersion: v1
kind: Pod
metadata: {name: greedy}
spec:
  runtimeClassName: CLASS
  restartPolicy: Never
  containers:
  - name: main
    image: BUSYBOX
    command: [sh, -c, "echo boot $(cat /proc/sys/kernel/random/boot_id); dd if=/dev/zero of=/dev/null bs=200M count=1"]
    resources: {limits: {memory: 64Mi, cpu: 200m}}
---
apiVersion: v1
kind: Pod
metadata: {name: sick}
spec:
  runtimeClassName: CLASS
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: BUSYBOX
    command: [sh, -c, "touch /tmp/healthy; sleep 3600"]
    livenessProbe: {exec: {command: [cat, /tmp/healthy]}, periodSeconds: 2, timeoutSeconds: 30, failureThreshold: 1}
---
apiVersion: batch/v1
kind: Job
metadata: {name: done}
spec:
  template:
    spec:
      runtimeClassName: CLASS
      restartPolicy: Never
      containers: [{name: main, image: "BUSYBOX", command: [sh, -c, "echo boot $(cat /proc/sys/kernel/random/boot_id)"]}]
---
`

// refused: pods that name things of the node, by the words that their events say.
var refused = []struct{ name, spec, words string }{
	{"wants-network", "hostNetwork: true", "hostNetwork is not possible"},
	{"wants-processes", "hostPID: true", "hostPID is not possible"},
	{"wants-ipc", "hostIPC: true", "hostIPC is not possible"},
	{"wants-path", "volumes: [{name: etc, hostPath: {path: /etc}}]", "/node-etc"},
}

// refusedPod is the manifest of one of them.
func refusedPod(name, spec string) string {
	mounts := ""
	if name == "wants-path" {
		mounts = ", volumeMounts: [{name: etc, mountPath: /node-etc}]"
	}
	return expand("apiVersion: v1\nkind: Pod\nmetadata: {name: " + name + "}\nspec:\n  runtimeClassName: CLASS\n  terminationGracePeriodSeconds: 1\n  " + spec +
		"\n  containers: [{name: main, image: \"BUSYBOX\", command: [sleep, \"3600\"]" + mounts + "}]\n")
}
