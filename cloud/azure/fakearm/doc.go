// SPDX-License-Identifier: Apache-2.0

// Package fakearm is an emulation of Azure Resource Manager for tests and for the demo:
// an http.Handler that speaks the wire protocol of the login endpoint, of
// Microsoft.Compute, Microsoft.Network and of the page blobs behind disk uploads, keeps
// state, and misbehaves as the real one does.
//
// It is strict. A request body is held to the shapes of the vendor's own model
// (schema.tsv, written by schemagen): a property that the model does not have is
// refused with its path, and so is a value that an enumeration does not have. Property
// names and enumeration values must be written as in the model; the real service
// compares many of them without case, so what passes here passes there.
//
// Everything that takes time follows Config.Now: states change when the clock passes
// them, at the next request or scripting call, and without one when machines stand
// behind the instances (Config.Host).
//
//	PUT virtual machine   Creating -> Succeeded | Failed (VM, NIC and disk stay)
//	                      machine started after Timing.Start; the operation ends after Timing.Create
//	DELETE                any -> Deleting -> gone, with NIC, disk and address whose deleteOption says so
//	machine ends          PowerState/running -> PowerState/stopped
//	spot eviction         notice in scheduled events, then deallocated or deleted (evictionPolicy)
//
// A machine with an osProfile reports to the wire server that it is ready, on Azure;
// one that never does ends its creation with OSProvisioningTimedOut, whatever
// provisionVMAgent says. Here nobody waits for the report unless Config.ReportTimeout
// says so; a machine is provisioned when it has been started and Timing.Create is over.
//
// The real service's error texts are no contract; these follow documentation and
// published logs.
//
// Sources: Azure/azure-rest-api-specs (Microsoft.Compute 2026-04-01, DiskRP 2026-03-02,
// GalleryRP 2025-12-03, SkusRP 2021-07-01, Microsoft.Network 2025-05-01) and
// learn.microsoft.com: "Track asynchronous Azure operations", "Azure Instance Metadata
// Service", "Throttling of Azure compute resources", "Upload a VHD to Azure".
package fakearm
