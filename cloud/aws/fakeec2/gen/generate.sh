#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Writes cloud/aws/fakeec2/model.txt anew from the versions below of the vendor's
# JavaScript SDK. It needs node and npm, and a package registry.
set -eu
cd "$(dirname "$0")"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
for p in client-ec2@3.1169.0 client-sts@3.1169.0; do
	mkdir "$tmp/${p%@*}"
	tar -xzf "$tmp/$(npm pack --silent --pack-destination "$tmp" "@aws-sdk/$p")" -C "$tmp/${p%@*}" --strip-components 1
done
node model.mjs "$tmp/client-ec2" "$tmp/client-sts" >"$tmp/model.txt"
mv "$tmp/model.txt" ../model.txt
