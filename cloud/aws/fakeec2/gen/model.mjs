// SPDX-License-Identifier: Apache-2.0
//
// Writes the table that fakeec2 checks requests and replies with (../model.txt) from
// the vendor's own model, as its JavaScript SDK carries it: shapes with their wire
// names. gen/generate.sh fetches the packages and runs this:
//
//	node model.mjs <folder of @aws-sdk/client-ec2> <folder of @aws-sdk/client-sts> > ../model.txt
//
// A schema in dist-es/schemas/schemas_0.js is a list whose first number is its kind
// (1 list, 3 structure, 9 operation); of a structure, [4] are the member names, [5]
// their schemas, and [6] says how many of the first ones are required. A member is a
// schema or [schema, traits]. A schema is a number for a scalar, a function that
// returns a list or a structure, or 64|n: a list of scalar n. The names of enums are
// in the type declarations only, their values in models/enums.js.
import fs from "node:fs";
import path from "node:path";
import vm from "node:vm";

const operations = {
  ec2: `AuthorizeSecurityGroupIngress CancelSpotInstanceRequests CreateLaunchTemplate CreateTags
    DeleteLaunchTemplate DeleteNetworkInterface DeleteSnapshot DeleteTags DeleteVolume DeregisterImage
    DescribeAddresses DescribeAvailabilityZones DescribeImages DescribeInstanceAttribute
    DescribeInstanceStatus DescribeInstanceTypeOfferings DescribeInstanceTypes DescribeInstances
    DescribeKeyPairs DescribeLaunchTemplateVersions DescribeLaunchTemplates DescribeNetworkInterfaces
    DescribePlacementGroups DescribeRegions DescribeSecurityGroups DescribeSnapshots
    DescribeSpotInstanceRequests DescribeSubnets DescribeTags DescribeVolumes DescribeVpcs
    GetConsoleOutput RegisterImage RevokeSecurityGroupIngress RunInstances StartInstances
    StopInstances TerminateInstances`,
  sts: `AssumeRoleWithWebIdentity GetCallerIdentity`,
};
const scalars = { 0: "str", 1: "num", 2: "bool", 4: "time", 5: "time", 7: "time", 21: "blob" };
// These enums have a thousand values, or their values are data of the emulation's.
const noEnum = new Set(["InstanceType", "PlacementGroupStrategy"]);

function load(dir) {
  // What the file imports is classes of the SDK, which the schemas do not need.
  const source = fs.readFileSync(path.join(dir, "dist-es/schemas/schemas_0.js"), "utf8")
    .replace(/^import \{([^}]*)\}.*$/gm, (_, names) => names.split(",").map((n) => n.trim()).filter(Boolean)
      .map((n) => `var ${n} = class { register() {} registerError() {} static for() { return new this(); } };`).join(" "))
    .replace(/^export (var|const) /gm, "var ").replace(/^const /gm, "var ");
  const context = vm.createContext({});
  vm.runInContext(source, context);
  const enums = {};
  const enumFile = path.join(dir, "dist-es/models/enums.js");
  if (fs.existsSync(enumFile)) {
    const text = fs.readFileSync(enumFile, "utf8");
    for (const m of text.matchAll(/^export const (\w+) = \{([^}]*)\}/gm))
      enums[m[1]] = [...m[2].matchAll(/: "([^"]*)"/g)].map((x) => x[1]);
  }
  const members = {}; // interface -> member -> name of its TypeScript type
  const models = path.join(dir, "dist-types/models");
  for (const f of fs.readdirSync(models).filter((f) => f.startsWith("models_"))) {
    let name = "";
    for (const line of fs.readFileSync(path.join(models, f), "utf8").split("\n")) {
      const i = line.match(/^export interface (\w+)/);
      if (i) members[(name = i[1])] = {};
      const m = line.match(/^ {4}(\w+)\??: _?(\w+)(\[\])?/);
      if (m && name) members[name][m[1]] = m[2];
    }
  }
  return { context, enums, members };
}

const upper = (s) => s[0].toUpperCase() + s.slice(1);

function table(service, model) {
  const lines = { op: [], enum: new Map(), in: new Map(), out: new Map() };

  // typeOf returns how the table writes a schema; item is the element name of a list.
  function typeOf(way, schema, enumName) {
    if (typeof schema === "function") schema = schema();
    if (typeof schema === "number") {
      if (schema & 64) return typeOf(way, schema & ~64, enumName) + "*";
      if (!(schema in scalars)) throw new Error("scalar " + schema);
      if (schema === 0 && way === "in" && enumName in model.enums && !noEnum.has(enumName)) {
        lines.enum.set(enumName, model.enums[enumName]);
        return enumName;
      }
      return scalars[schema];
    }
    // A scalar with traits of its own, such as one that must not be logged.
    if (schema[0] === 0) return typeOf(way, schema[4], enumName);
    if (schema[0] === 1) {
      let [of, traits] = Array.isArray(schema[4]) && typeof schema[4][0] !== "string" &&
        (typeof schema[4][0] === "function" || schema[4].length === 2) ? schema[4] : [schema[4], {}];
      const item = way === "out" || service === "sts" ? (traits && traits.xmlName) || "member" : "";
      return typeOf(way, of, enumName) + "*" + item;
    }
    if (schema[0] !== 3) throw new Error("schema kind " + schema[0]);
    structure(way, schema);
    return schema[2];
  }

  function structure(way, schema) {
    const [, , name, , names, schemas, required = 0] = schema;
    if (lines[way].has(name)) return;
    lines[way].set(name, ""); // shapes may contain themselves
    const out = names.map((n, i) => {
      const member = Array.isArray(schemas[i]) ? schemas[i] : [schemas[i], {}];
      const traits = typeof member[1] === "object" ? member[1] : {};
      let wire = traits.xmlName || n;
      if (way === "in" && service === "ec2") wire = traits.ec2QueryName || upper(wire);
      return wire + ":" + typeOf(way, member[0], (model.members[name] || {})[n]) +
        (way === "in" && i < required ? "!" : "");
    });
    lines[way].set(name, out.sort().join(" "));
  }

  for (const op of operations[service].split(/\s+/).sort()) {
    const schema = vm.runInContext(op + "$", model.context);
    const shape = (way, s) => {
      s = typeof s === "function" ? s() : s;
      if (!Array.isArray(s) || s[0] !== 3) return "-"; // no reply but "true"
      structure(way, s);
      return s[2];
    };
    lines.op.push(`op ${op} ${shape("in", schema[4])} ${shape("out", schema[5])}`);
  }
  const sorted = (m, kind) => [...m].sort(([a], [b]) => (a < b ? -1 : 1))
    .map(([n, v]) => `${kind} ${n} ${Array.isArray(v) ? v.map(encodeURIComponent).join(" ") : v}`.trimEnd());
  return [...lines.op, ...sorted(lines.enum, "enum"), ...sorted(lines.in, "in"), ...sorted(lines.out, "out")];
}

const [ec2, sts] = process.argv.slice(2);
const version = (dir) => JSON.parse(fs.readFileSync(path.join(dir, "package.json"))).version;
console.log(`# Generated by gen/generate.sh; do not edit. Names and types of Amazon EC2's and AWS STS's public
# interfaces, taken from @aws-sdk/client-ec2 ${version(ec2)} and @aws-sdk/client-sts ${version(sts)},
# Copyright Amazon.com, Inc. or its affiliates, Apache License 2.0. How to read it: see schema.go.`);
console.log(["service ec2 2016-11-15", ...table("ec2", load(ec2)),
  "service sts 2011-06-15", ...table("sts", load(sts))].join("\n"));
