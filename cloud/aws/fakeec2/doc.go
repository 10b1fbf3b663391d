// SPDX-License-Identifier: Apache-2.0

// Package fakeec2 is an Amazon EC2 for tests and demonstrations: one region of one
// account, as a server that speaks the wire protocols of EC2 (API version 2016-11-15,
// form in, XML out), of the two calls of STS that a client of EC2 makes, and of the
// EBS direct API, with the instance metadata service of each instance.
//
// It is strict: a request is held to the vendor's own model of the interface (model.txt,
// made by gen/generate.sh), so that a parameter that the service does not have is
// refused here too, and replies are rendered from the same model. It is stateful:
// what was made stays until it is deleted, with the volumes and network interfaces
// that belong to it, and Leaks tells what is left. And it misbehaves as the service
// does: changes are seen late, launches find no capacity or no quota, callers are
// throttled with the service's own numbers, credentials lack permissions, and on
// request (Inject) replies get lost after the effect, bodies are slow or cut short, and
// launches fail half way.
//
// Everything that takes time follows Config.Now and happens when it is looked at:
// without a Host a Server has no goroutine. With one, instances are real machines,
// started and stopped by goroutines that Close waits for.
//
// What the service does comes from the EC2 API reference and user guide (November
// 2026); texts of errors from reports of users, where there were any.
package fakeec2
