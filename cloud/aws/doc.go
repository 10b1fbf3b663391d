// SPDX-License-Identifier: Apache-2.0

// Package aws makes pod VMs on Amazon EC2.
//
//	Plan    DescribeImages, DescribeInstanceTypes     once, then from memory
//	Create  note the attempt ─► RunInstances ─┬─► an instance
//	            ▲                             ├─► no capacity: the next attempt
//	            └── type × market × subnet ◄──┘   anything else: the caller's
//	Get     DescribeInstances                         one call for many callers
//	Delete  DescribeInstances, TerminateInstances, then volumes and interfaces
//
// # One token, one instance
//
// An attempt is one way to ask: a type, a market (spot or on demand) and a subnet.
// EC2's ClientToken is a hash of the request's token and the attempt, because EC2
// keeps tokens by zone and refuses one that comes with other parameters (EC2
// Developer Guide, "Ensuring idempotency in Amazon EC2 API requests"). Each attempt
// is noted before its call, and only a definite refusal leads to the next, so that at
// any moment at most the attempt noted last can have made an instance: a repeated
// Create repeats that one, and gets the instance if there is one. Refusals for want
// of capacity are remembered for three minutes and not asked for again meanwhile.
//
// Everything that a launch makes carries the tags from the launch on, and is deleted
// by EC2 with the instance: an instance ends with its volumes and interfaces or, if it
// should not, Delete and List find what is left by its tags.
//
// # Lag
//
// EC2's answers lag behind what it has done, by seconds. An instance that this
// process has made exists, whatever DescribeInstances says, for the first half
// minute. An instance that was terminated is listed for an hour; here it is gone.
//
// # Throttles
//
// Calls wait in token buckets kept below EC2's own, deletions before others. Equal
// questions of many callers are one call (type batcher). What EC2 refuses for being
// too much is Unavailable at once, and halves our rate for a while.
//
// # Credentials
//
// Keys of the configuration, a role by web identity, a profile, or the SDK's chain.
// Files that hold one are read again when they change, within ten seconds. No
// credential is ever part of an error.
//
// Facts, unless a comment says otherwise: EC2 API Reference and EC2 User Guide as of
// November 2026, aws-sdk-go-v2 service/ec2 v1.344.1.
package aws
