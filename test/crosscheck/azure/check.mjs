// SPDX-License-Identifier: Apache-2.0
//
// Asks an emulation of Azure everything that the product asks of the real one, with
// the vendor's JavaScript clients, and prints a line for each thing that is as it
// should be. The first that is not ends the program with status 1.
// Environment: ENDPOINT (https), SUBSCRIPTION, TENANT, CLIENT, SECRET, IMAGE, SUBNET, NSG.

import assert from "node:assert/strict";
import { ComputeManagementClient } from "@azure/arm-compute";
import { ClientSecretCredential } from "@azure/identity";
import { PageBlobClient, AnonymousCredential, newPipeline } from "@azure/storage-blob";

const env = process.env;
const group = "pods";
const location = "westeurope";
const options = { authorityHost: env.ENDPOINT, disableInstanceDiscovery: true };
const credential = new ClientSecretCredential(env.TENANT, env.CLIENT, env.SECRET, options);
const client = new ComputeManagementClient(credential, env.SUBSCRIPTION, { endpoint: env.ENDPOINT });
const poll = { updateIntervalInMs: 50 };
const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f pods";

let done = 0;
async function check(what, f) {
  try {
    await f();
  } catch (e) {
    console.error(`not ok  ${what}\n${e.stack}`);
    process.exit(1);
  }
  done++;
  console.log(`ok      ${what}`);
}

async function refused(code, promise) {
  await assert.rejects(promise, (e) => {
    assert.equal(e.code, code, e.message);
    return true;
  });
}

async function all(pages) {
  const out = [];
  for await (const x of pages) out.push(x);
  return out;
}

function machine(name, size = "Standard_D2as_v5") {
  return {
    location,
    tags: { "peerpod-cluster": "js", Name: name },
    hardwareProfile: { vmSize: size },
    storageProfile: {
      imageReference: { id: env.IMAGE },
      osDisk: { name: `${name}-disk`, createOption: "FromImage", deleteOption: "Delete", managedDisk: { storageAccountType: "Standard_LRS" } },
    },
    osProfile: {
      computerName: name,
      adminUsername: "peerpod",
      linuxConfiguration: {
        disablePasswordAuthentication: true,
        ssh: { publicKeys: [{ path: "/home/peerpod/.ssh/authorized_keys", keyData: key }] },
      },
    },
    networkProfile: {
      networkApiVersion: "2022-11-01",
      networkInterfaceConfigurations: [
        {
          name: `${name}-nic`,
          tags: { "peerpod-cluster": "js" },
          primary: true,
          deleteOption: "Delete",
          networkSecurityGroup: { id: env.NSG },
          ipConfigurations: [
            {
              name: "ip",
              subnet: { id: env.SUBNET },
              publicIPAddressConfiguration: {
                name: `${name}-ip`,
                deleteOption: "Delete",
                sku: { name: "Standard" },
                publicIPAllocationMethod: "Static",
              },
            },
          ],
        },
      ],
    },
    userData: Buffer.from("#cloud-config\n").toString("base64"),
  };
}

await check("login is refused with a wrong secret", async () => {
  const wrong = new ClientSecretCredential(env.TENANT, env.CLIENT, "no", options);
  await assert.rejects(wrong.getToken("https://management.azure.com/.default"), /AADSTS7000215/);
});

await check("login with the secret", async () => {
  const t = await credential.getToken("https://management.azure.com/.default");
  assert.ok(t.token && t.expiresOnTimestamp > Date.now());
});

await check("sizes with zones, capabilities and restrictions", async () => {
  const skus = await all(client.resourceSkus.list({ filter: `location eq '${location}'` }));
  const d2 = skus.find((s) => s.resourceType === "virtualMachines" && s.name === "Standard_D2as_v5");
  assert.deepEqual(d2.locationInfo[0].zones, ["1", "2", "3"]);
  assert.equal(d2.capabilities.find((c) => c.name === "MemoryGB").value, "8");
  assert.equal(skus.find((s) => s.name === "Standard_DC2as_v5").capabilities.find((c) => c.name === "ConfidentialComputingType").value, "SNP");
});

await check("a machine is made by one PUT, and its poller ends", async () => {
  const vm = await client.virtualMachines.createOrUpdate(group, "js1", machine("js1"), poll);
  assert.equal(vm.provisioningState, "Succeeded");
  assert.ok(vm.vmId && vm.timeCreated instanceof Date);
  assert.equal(vm.userData, undefined);
  assert.match(vm.networkProfile.networkInterfaces[0].id, /networkInterfaces\/js1-nic$/);
});

await check("GET with instance view and user data", async () => {
  const vm = await client.virtualMachines.get(group, "js1", { expand: "instanceView" });
  assert.deepEqual(vm.instanceView.statuses.map((s) => s.code), ["ProvisioningState/succeeded", "PowerState/running"]);
  const ud = await client.virtualMachines.get(group, "js1", { expand: "userData" });
  assert.equal(Buffer.from(ud.userData, "base64").toString(), "#cloud-config\n");
  const iv = await client.virtualMachines.instanceView(group, "js1");
  assert.equal(iv.statuses[1].code, "PowerState/running");
});

await check("lists, page by page", async () => {
  for (const n of ["js2", "js3"]) await client.virtualMachines.createOrUpdate(group, n, machine(n), poll);
  assert.deepEqual((await all(client.virtualMachines.list(group))).map((v) => v.name), ["js1", "js2", "js3"]);
  assert.deepEqual((await all(client.disks.listByResourceGroup(group))).map((d) => d.name), ["js1-disk", "js2-disk", "js3-disk"]);
});

await check("tags are changed by PATCH", async () => {
  const vm = await client.virtualMachines.update(group, "js1", { tags: { a: "b" } }, poll);
  assert.deepEqual(vm.tags, { a: "b" });
});

await check("what may not change is refused with PropertyChangeNotAllowed", async () => {
  const other = machine("js1");
  other.osProfile.computerName = "other";
  await refused("PropertyChangeNotAllowed", client.virtualMachines.createOrUpdate(group, "js1", other, poll));
});

await check("an unknown size, image and subnet are refused", async () => {
  await refused("InvalidParameter", client.virtualMachines.createOrUpdate(group, "x", machine("x", "Standard_X1"), poll));
  const image = machine("x");
  image.storageProfile.imageReference.id = env.IMAGE.replace("1.0.0", "9.9.9");
  await refused("GalleryImageNotFound", client.virtualMachines.createOrUpdate(group, "x", image, poll));
  const net = machine("x");
  net.networkProfile.networkInterfaceConfigurations[0].ipConfigurations[0].subnet.id += "x";
  await refused("InvalidResourceReference", client.virtualMachines.createOrUpdate(group, "x", net, poll));
  await refused("ResourceNotFound", client.virtualMachines.get(group, "x"));
});

await check("no capacity: the poller fails, and the machine stays until it is deleted", async () => {
  // The client puts the code of a failed operation into its message.
  await assert.rejects(client.virtualMachines.createOrUpdate(group, "full", machine("full", "Standard_D8as_v5"), poll), /has failed\. AllocationFailed\./);
  const vm = await client.virtualMachines.get(group, "full", { expand: "instanceView" });
  assert.equal(vm.provisioningState, "Failed");
  assert.equal(vm.instanceView.statuses[0].code, "ProvisioningState/failed/AllocationFailed");
  await client.virtualMachines.delete(group, "full", poll);
});

await check("429 with Retry-After is waited out", async () => {
  const d = await client.disks.get(group, "js1-disk");
  assert.equal(d.diskState, "Attached");
});

await check("power off, start, deallocate", async () => {
  await client.virtualMachines.powerOff(group, "js1", poll);
  assert.equal((await client.virtualMachines.instanceView(group, "js1")).statuses[1].code, "PowerState/stopped");
  await client.virtualMachines.start(group, "js1", poll);
  await client.virtualMachines.deallocate(group, "js1", poll);
  assert.equal((await client.virtualMachines.instanceView(group, "js1")).statuses[1].code, "PowerState/deallocated");
});

const size = 20 << 20;
function footer() {
  const b = Buffer.alloc(512);
  b.write("conectix");
  b.writeUInt32BE(0x10000, 12);
  b.writeBigUInt64BE(BigInt(size), 48);
  b.writeUInt32BE(2, 60);
  b.writeUInt32BE(~b.reduce((a, v) => a + v, 0) >>> 0, 64);
  return b;
}

await check("a disk is uploaded page by page", async () => {
  const disk = await client.disks.createOrUpdate(group, "up", {
    location, osType: "Linux", hyperVGeneration: "V2", creationData: { createOption: "Upload", uploadSizeBytes: size + 512 },
  }, poll);
  assert.equal(disk.diskState, "ReadyToUpload");
  const sas = await client.disks.grantAccess(group, "up", { access: "Write", durationInSeconds: 600 }, poll);
  const blob = new PageBlobClient(sas.accessSAS, newPipeline(new AnonymousCredential()));
  await blob.uploadPages(Buffer.alloc(1 << 20, "x"), 0, 1 << 20);
  await blob.uploadPages(footer(), size, 512);
  const ranges = await blob.getPageRanges(0, size + 512);
  // The client's count is the last byte less the first.
  assert.deepEqual(ranges.pageRange.map((r) => [r.offset, r.count + 1]), [[0, 1 << 20], [size, 512]]);
  assert.equal((await blob.getProperties()).contentLength, size + 512);
  await client.disks.revokeAccess(group, "up", poll);
  await assert.rejects(blob.getProperties(), (e) => e.statusCode === 403);
  assert.equal((await client.disks.get(group, "up")).diskState, "Unattached");
});

await check("a gallery image version is made of it, and a confidential machine of that", async () => {
  await client.galleries.createOrUpdate(group, "jsgallery", { location }, poll);
  await client.galleryImages.createOrUpdate(group, "jsgallery", "podvm", {
    location, osType: "Linux", osState: "Generalized", hyperVGeneration: "V2", architecture: "x64",
    identifier: { publisher: "p", offer: "o", sku: "s" }, features: [{ name: "SecurityType", value: "ConfidentialVmSupported" }],
  }, poll);
  const source = (await client.disks.get(group, "up")).id;
  const v = await client.galleryImageVersions.createOrUpdate(group, "jsgallery", "podvm", "1.0.0", {
    location, publishingProfile: { targetRegions: [{ name: location }] }, storageProfile: { osDiskImage: { source: { id: source } } },
  }, poll);
  assert.equal(v.provisioningState, "Succeeded");
  const cvm = machine("jscvm", "Standard_DC2as_v5");
  cvm.storageProfile.imageReference.id = v.id;
  cvm.securityProfile = { securityType: "ConfidentialVM", uefiSettings: { vTpmEnabled: true, secureBootEnabled: true } };
  await refused("InvalidParameter", client.virtualMachines.createOrUpdate(group, "jscvm", cvm, poll));
  cvm.storageProfile.osDisk.managedDisk.securityProfile = { securityEncryptionType: "VMGuestStateOnly" };
  const vm = await client.virtualMachines.createOrUpdate(group, "jscvm", cvm, poll);
  assert.equal(vm.securityProfile.securityType, "ConfidentialVM");
});

await check("a community gallery's image", async () => {
  const img = await client.communityGalleryImages.get(location, "others-1234", "podvm");
  assert.equal(img.hyperVGeneration, "V2");
});

await check("everything is deleted", async () => {
  for (const vm of await all(client.virtualMachines.list(group))) await client.virtualMachines.delete(group, vm.name, poll);
  await client.galleryImageVersions.delete(group, "jsgallery", "podvm", "1.0.0", poll);
  await client.galleryImages.delete(group, "jsgallery", "podvm", poll);
  await client.galleries.delete(group, "jsgallery", poll);
  await client.disks.delete(group, "up", poll);
  await client.virtualMachines.delete(group, "js1", poll); // what is gone is gone
  assert.deepEqual(await all(client.virtualMachines.list(group)), []);
});

console.log(`${done} checks`);
