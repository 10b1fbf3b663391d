// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// defaultPolicy gives a pod the runtime class that it does not name itself. The API
// server evaluates it, and then adds the class's overhead. A pod that names a class,
// as those of the suite's RuntimeClass tests do, keeps it, right or wrong: a default
// of containerd's would hide whether the name had been carried to the node.
const defaultPolicy = `apiVersion: admissionregistration.k8s.io/v1beta1
kind: MutatingAdmissionPolicy
metadata: {name: default-runtime-class}
spec:
  matchConstraints:
    resourceRules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [pods]}]
  matchConditions: [{name: names-none, expression: "!has(object.spec.runtimeClassName)"}]
  failurePolicy: Fail
  reinvocationPolicy: IfNeeded
  mutations:
  - patchType: ApplyConfiguration
    applyConfiguration: {expression: 'Object{spec: Object.spec{runtimeClassName: "` + RuntimeClass + `"}}'}
---
apiVersion: admissionregistration.k8s.io/v1beta1
kind: MutatingAdmissionPolicyBinding
metadata: {name: default-runtime-class}
spec: {policyName: default-runtime-class}
`

// policyTimeout is how long the API server may take to see its own policy.
const policyTimeout = time.Minute

// DefaultToRuntimeClass gives every pod that is created from here on, and names no
// runtime class, RuntimeClass.
func (c *Cluster) DefaultToRuntimeClass(ctx context.Context) error {
	if err := c.Apply(ctx, defaultPolicy); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, policyTimeout)
	defer cancel()
	return Poll(ctx, func(ctx context.Context) error {
		out, err := c.Kubectl(ctx, "run", "probe", "--image=probe", "--dry-run=server", "-o", "jsonpath={.spec.runtimeClassName} {.spec.overhead.cpu}")
		if err == nil && !strings.HasPrefix(out, RuntimeClass+" 250m") {
			err = fmt.Errorf("the policy does not hold yet: a pod has runtime class and overhead %q", out)
		}
		return err
	})
}
