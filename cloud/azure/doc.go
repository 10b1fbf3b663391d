// SPDX-License-Identifier: Apache-2.0

// Package azure is the provider for Azure's virtual machines, by Azure Resource Manager.
//
// An instance is these resources, all in AZURE_RESOURCE_GROUP and all with our tags
// but the disk, which Azure gives the VM's:
//
//	virtualMachines/podvm-<hash>           the hash is of the token, so one token can
//	                                       only ever name one VM
//	networkInterfaces/podvm-<hash>-net
//	disks/podvm-<hash>-disk                unless it is ephemeral
//	publicIPAddresses/podvm-<hash>-ip      with USE_PUBLIC_IP
//
// One PUT of the VM makes them all, with deleteOption Delete, so that one DELETE of the
// VM removes them all. The PUT carries If-None-Match: *, so that it makes a VM or
// changes nothing, whoever else asks; the tag peerpod-request tells whether a VM that
// is there already is the one that was asked for.
//
// # Creating
//
// What can be had is tried in this order: sizes, as the plan has them; for each the
// markets (spot first); for each the zones, from one that depends on the token. Where
// Azure answers that there is no capacity, at once or when the operation ends minutes
// later, what the attempt has left is deleted, the place is not asked again for three
// minutes, and the next is tried, while Create runs.
//
// Before each PUT the request's Note is given the candidate, and after it the URL of
// the operation that Azure has begun (Azure-AsyncOperation). The state itself is read
// from the VM; the operation is asked because it knows why it has failed. So the
// operation of a Create can be followed by another process, with nothing but the
// token and the progress. Create returns when the VM has an address and runs: when Azure
// says so, some ten seconds before its own pollers do, or when the machine has answered
// at that address (CreateRequest.Answers), whichever is first.
//
// # Deleting
//
// A failed operation can leave an interface or a disk without their VM. So deleting an
// instance means: DELETE the VM; when it is gone, DELETE the others by name, until each
// of them is answered with 404 or 204. An interface may be reserved for the VM that
// could not be made (NicReservedForAnotherVm) for up to 180 s; it is waited for. List
// shows what is left of an instance as one that is being deleted, so that whoever
// looks for orphans finds it. Nothing whose name is not ours is ever touched.
//
// # User data
//
// The document goes into customData and not into userData. userData is answered by the
// metadata service for the life of the VM and by Resource Manager to everybody who may
// read the VM; customData is on the provisioning CD of the first boot, which only the
// guest's root can read, and no API returns it. Both take 64 KiB, and Azure says of
// both that secrets do not belong there; so what is secret in the document is made for
// this pod alone and of use to nobody who cannot also take its address.
//
// # Throttling
//
// Requests wait in token buckets at 80 % of Azure's own numbers. A 429 closes its family
// of requests until the time it gives (Retry-After); what cannot wait that long ends
// as Unavailable. A list of all instances is four requests.
//
// Sources: learn.microsoft.com, REST references of Microsoft.Compute 2026-04-01,
// Microsoft.Network 2025-05-01 and Microsoft.Resources 2021-04-01; "Track asynchronous
// Azure operations"; "Throttling limits for Microsoft.Compute".
package azure
