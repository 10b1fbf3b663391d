// SPDX-License-Identifier: Apache-2.0
//
// Asks the emulation of EC2 with the vendor's JavaScript clients, as crosscheck_test.go
// starts it: ENDPOINT, IMAGE, SUBNET and GROUP are in the environment, and the region and
// the key where the clients look for them.
import assert from "node:assert/strict";
import crypto from "node:crypto";
import * as ec2 from "@aws-sdk/client-ec2";
import * as ebs from "@aws-sdk/client-ebs";
import * as sts from "@aws-sdk/client-sts";

const { ENDPOINT: endpoint, IMAGE: image, SUBNET: subnet, GROUP: group } = process.env;
const client = new ec2.EC2Client({ endpoint });
const blocks = new ebs.EBSClient({ endpoint });
const send = (Command, input) => client.send(new ec2[Command + "Command"](input));

let done = 0;
async function check(what, f) {
  try {
    await f();
  } catch (e) {
    console.error(`FAILED: ${what}: ${e.stack}`);
    process.exit(1);
  }
  console.log(`ok: ${what}`);
  done++;
}

async function refused(code, promise) {
  await assert.rejects(promise, (e) => {
    assert.equal(e.name, code, e.message);
    return true;
  });
}

const tags = (type) => ({ ResourceType: type, Tags: [{ Key: "owner", Value: "javascript" }] });
const launch = (more = {}) => ({
  ImageId: image, InstanceType: "m6a.large", MinCount: 1, MaxCount: 1, ClientToken: crypto.randomUUID(),
  UserData: Buffer.from("#cloud-config\n").toString("base64"), InstanceInitiatedShutdownBehavior: "terminate",
  NetworkInterfaces: [{ DeviceIndex: 0, SubnetId: subnet, Groups: [group], DeleteOnTermination: true }],
  BlockDeviceMappings: [{ DeviceName: "/dev/xvda", Ebs: { VolumeSize: 6, VolumeType: "gp3", Encrypted: true, DeleteOnTermination: true } }],
  MetadataOptions: { HttpTokens: "required", HttpPutResponseHopLimit: 1, HttpEndpoint: "enabled" },
  CpuOptions: { AmdSevSnp: "enabled" },
  TagSpecifications: ["instance", "volume", "network-interface"].map(tags), ...more,
});
const run = async (more) => (await send("RunInstances", launch(more))).Instances[0];
const describe = async (id) => (await send("DescribeInstances", { InstanceIds: [id] })).Reservations[0].Instances[0];
const wait = { client, maxWaitTime: 60, minDelay: 1, maxDelay: 1 };

await check("who am I", async () => {
  const me = await new sts.STSClient({ endpoint }).send(new sts.GetCallerIdentityCommand({}));
  assert.match(me.Arn, /^arn:aws:iam::\d{12}:user\//);
});

await check("types, by page and by name", async () => {
  let n = 0;
  for await (const p of ec2.paginateDescribeInstanceTypes({ client, pageSize: 20 }, {})) n += p.InstanceTypes.length;
  assert.ok(n > 50, `${n} types`);
  const [t] = (await send("DescribeInstanceTypes", { InstanceTypes: ["m6a.large"] })).InstanceTypes;
  assert.equal(t.VCpuInfo.DefaultVCpus, 2);
  assert.equal(t.MemoryInfo.SizeInMiB, 8192);
  assert.deepEqual(t.ProcessorInfo.SupportedFeatures, ["amd-sev-snp"]);
  const o = await send("DescribeInstanceTypeOfferings", { LocationType: "availability-zone", Filters: [{ Name: "instance-type", Values: ["m6a.large"] }] });
  assert.equal(o.InstanceTypeOfferings.length, 3);
});

let one;
await check("a launch with everything a pod VM has", async () => {
  const input = launch();
  one = (await send("RunInstances", input)).Instances[0];
  assert.equal(one.State.Name, "pending");
  assert.equal((await send("RunInstances", input)).Instances[0].InstanceId, one.InstanceId);
  await refused("IdempotentParameterMismatch", send("RunInstances", { ...input, InstanceType: "m6a.xlarge" }));
  await ec2.waitUntilInstanceRunning(wait, { InstanceIds: [one.InstanceId] });
  const i = await describe(one.InstanceId);
  assert.equal(i.MetadataOptions.HttpTokens, "required");
  assert.equal(i.MetadataOptions.HttpPutResponseHopLimit, 1);
  assert.equal(i.CpuOptions.AmdSevSnp, "enabled");
  assert.equal(i.ClientToken, input.ClientToken);
  assert.deepEqual(i.SecurityGroups.map((g) => g.GroupId), [group]);
  assert.ok(i.LaunchTime instanceof Date && !isNaN(i.LaunchTime));
  const [v] = (await send("DescribeVolumes", { VolumeIds: [i.BlockDeviceMappings[0].Ebs.VolumeId] })).Volumes;
  assert.equal(v.Size, 6);
  assert.equal(v.Encrypted, true);
  assert.deepEqual(v.Tags, [{ Key: "owner", Value: "javascript" }]);
  assert.equal(v.Attachments[0].DeleteOnTermination, true);
  const [e] = (await send("DescribeNetworkInterfaces", { Filters: [{ Name: "attachment.instance-id", Values: [i.InstanceId] }] })).NetworkInterfaces;
  assert.equal(e.PrivateIpAddress, i.PrivateIpAddress);
  assert.deepEqual(e.TagSet, [{ Key: "owner", Value: "javascript" }]);
});

await check("user data and shutdown behaviour come back", async () => {
  const a = await send("DescribeInstanceAttribute", { InstanceId: one.InstanceId, Attribute: "userData" });
  assert.equal(Buffer.from(a.UserData.Value, "base64").toString(), "#cloud-config\n");
  const b = await send("DescribeInstanceAttribute", { InstanceId: one.InstanceId, Attribute: "instanceInitiatedShutdownBehavior" });
  assert.equal(b.InstanceInitiatedShutdownBehavior.Value, "terminate");
});

await check("a lost reply and a throttled call are asked again, and make one instance", async () => {
  // The emulation loses the next reply of a launch of an m6a.xlarge, then throttles one.
  const two = await run({ InstanceType: "m6a.xlarge", ClientToken: undefined });
  const all = await send("DescribeInstances", { Filters: [{ Name: "instance-type", Values: ["m6a.xlarge"] }] });
  assert.deepEqual(all.Reservations.flatMap((r) => r.Instances.map((i) => i.InstanceId)), [two.InstanceId]);
});

await check("refusals have the service's names", async () => {
  await refused("InvalidAMIID.NotFound", run({ ImageId: "ami-00000000" }));
  await refused("InvalidParameterCombination", run({ SubnetId: subnet }));
  await refused("InvalidParameterCombination", run({ InstanceType: "t3.medium" })); // no SEV-SNP
  await refused("InsufficientInstanceCapacity", run({ InstanceType: "m6a.4xlarge" }));
  await refused("DryRunOperation", run({ DryRun: true }));
  await refused("InvalidInstanceID.NotFound", describe("i-00000000"));
  await refused("InvalidInstanceID.Malformed", describe("x"));
  await refused("InvalidParameterValue", send("DescribeInstances", { Filters: [{ Name: "nothing", Values: ["x"] }] }));
  await refused("UnauthorizedOperation", send("DeleteVolume", { VolumeId: "vol-00000000" }));
});

await check("pages of instances", async () => {
  const many = await send("RunInstances", launch({ MinCount: 7, MaxCount: 7, CpuOptions: undefined, InstanceType: "t3.small" }));
  assert.equal(many.Instances.length, 7);
  await ec2.waitUntilInstanceRunning(wait, { InstanceIds: many.Instances.map((i) => i.InstanceId) });
  const seen = [];
  for await (const p of ec2.paginateDescribeInstances({ client, pageSize: 5 }, { Filters: [{ Name: "tag:owner", Values: ["java*"] }] }))
    seen.push(...p.Reservations.flatMap((r) => r.Instances.map((i) => i.InstanceId)));
  assert.equal(new Set(seen).size, 9);
});

await check("spot, with its request", async () => {
  const i = await run({ InstanceMarketOptions: { MarketType: "spot", SpotOptions: { SpotInstanceType: "one-time" } },
    TagSpecifications: ["instance", "volume", "network-interface", "spot-instances-request"].map(tags) });
  assert.equal(i.InstanceLifecycle, "spot");
  const [q] = (await send("DescribeSpotInstanceRequests", { SpotInstanceRequestIds: [i.SpotInstanceRequestId] })).SpotInstanceRequests;
  assert.equal(q.State, "active");
  assert.equal(q.InstanceId, i.InstanceId);
});

await check("a launch template", async () => {
  const t = (await send("CreateLaunchTemplate", { LaunchTemplateName: "javascript",
    LaunchTemplateData: { KeyName: "peer-pods", InstanceType: "t3.micro", TagSpecifications: [tags("instance")] } })).LaunchTemplate;
  const i = await run({ LaunchTemplate: { LaunchTemplateId: t.LaunchTemplateId }, InstanceType: undefined, CpuOptions: undefined });
  assert.equal(i.InstanceType, "t3.micro");
  assert.equal(i.KeyName, "peer-pods");
  const v = await send("DescribeLaunchTemplateVersions", { LaunchTemplateId: t.LaunchTemplateId });
  assert.equal(v.LaunchTemplateVersions[0].LaunchTemplateData.KeyName, "peer-pods");
  await send("DeleteLaunchTemplate", { LaunchTemplateId: t.LaunchTemplateId });
});

await check("rules of a security group", async () => {
  const rule = { IpProtocol: "udp", FromPort: 9000, ToPort: 9000, UserIdGroupPairs: [{ GroupId: group, Description: "tunnel" }] };
  const out = await send("AuthorizeSecurityGroupIngress", { GroupId: group, IpPermissions: [rule] });
  assert.equal(out.SecurityGroupRules[0].ReferencedGroupInfo.GroupId, group);
  await refused("InvalidPermission.Duplicate", send("AuthorizeSecurityGroupIngress", { GroupId: group, IpPermissions: [rule] }));
  const [g] = (await send("DescribeSecurityGroups", { GroupIds: [group] })).SecurityGroups;
  assert.equal(g.IpPermissions[0].UserIdGroupPairs[0].Description, "tunnel");
  await send("RevokeSecurityGroupIngress", { GroupId: group, IpPermissions: [rule] });
});

let own, snapshot;
await check("an image of blocks, and an instance of it", async () => {
  const s = await blocks.send(new ebs.StartSnapshotCommand({ VolumeSize: 1, ClientToken: "js", Description: "js", Tags: [{ Key: "owner", Value: "javascript" }] }));
  snapshot = s.SnapshotId;
  const data = Buffer.alloc(s.BlockSize, "podvm");
  const sum = (b) => crypto.createHash("sha256").update(b).digest();
  for (const BlockIndex of [0, 5]) {
    await blocks.send(new ebs.PutSnapshotBlockCommand({ SnapshotId: snapshot, BlockIndex, BlockData: data, DataLength: data.length,
      Checksum: sum(data).toString("base64"), ChecksumAlgorithm: "SHA256" }));
  }
  await assert.rejects(blocks.send(new ebs.PutSnapshotBlockCommand({ SnapshotId: snapshot, BlockIndex: 1, BlockData: data, DataLength: data.length,
    Checksum: sum("other").toString("base64"), ChecksumAlgorithm: "SHA256" })), (e) => e.name === "ValidationException");
  await blocks.send(new ebs.CompleteSnapshotCommand({ SnapshotId: snapshot, ChangedBlocksCount: 2, ChecksumAlgorithm: "SHA256",
    ChecksumAggregationMethod: "LINEAR", Checksum: sum(Buffer.concat([sum(data), sum(data)])).toString("base64") }));
  await ec2.waitUntilSnapshotCompleted(wait, { SnapshotIds: [snapshot] });
  const list = await blocks.send(new ebs.ListSnapshotBlocksCommand({ SnapshotId: snapshot }));
  assert.deepEqual(list.Blocks.map((b) => b.BlockIndex), [0, 5]);
  const got = await blocks.send(new ebs.GetSnapshotBlockCommand({ SnapshotId: snapshot, BlockIndex: 5, BlockToken: list.Blocks[1].BlockToken }));
  assert.ok(data.equals(Buffer.from(await got.BlockData.transformToByteArray())));
  own = (await send("RegisterImage", { Name: "javascript", Architecture: "x86_64", VirtualizationType: "hvm", EnaSupport: true, BootMode: "uefi",
    RootDeviceName: "/dev/xvda", BlockDeviceMappings: [{ DeviceName: "/dev/xvda", Ebs: { SnapshotId: snapshot } }], TagSpecifications: [tags("image")] })).ImageId;
  await ec2.waitUntilImageAvailable(wait, { ImageIds: [own] });
  assert.equal((await send("DescribeImages", { Owners: ["self"], Filters: [{ Name: "name", Values: ["javascript"] }] })).Images[0].ImageId, own);
  assert.equal((await run({ ImageId: own })).ImageId, own);
});

await check("everything ends", async () => {
  const ids = [];
  for await (const p of ec2.paginateDescribeInstances({ client, pageSize: 100 }, {})) ids.push(...p.Reservations.flatMap((r) => r.Instances.map((i) => i.InstanceId)));
  const out = await send("TerminateInstances", { InstanceIds: ids });
  assert.ok(out.TerminatingInstances.every((i) => i.CurrentState.Name === "shutting-down"));
  await ec2.waitUntilInstanceTerminated(wait, { InstanceIds: ids });
  const out2 = await send("DeregisterImage", { ImageId: own, DeleteAssociatedSnapshots: true });
  assert.equal(out2.DeleteSnapshotResults[0].ReturnCode, "success");
  await refused("InvalidSnapshot.NotFound", send("DescribeSnapshots", { SnapshotIds: [snapshot] }));
});

console.log(`${done} checks`);
