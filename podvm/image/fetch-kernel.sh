#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Downloads the kernel package that linux-image-cloud-<arch> depends on, unpacks it
# into a cache without installing it, and prints the directory. Once it is there the
# script needs no network: it takes the newest kernel of the cache when apt cannot
# tell or fetch a newer one.
#
#   KATA_REMOTE_CACHE   cache directory, default ${XDG_CACHE_HOME:-$HOME/.cache}/kata-remote
set -eu

arch=$(dpkg --print-architecture)
meta=linux-image-cloud-$arch
cache=${KATA_REMOTE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kata-remote}/kernel
mkdir -p "$cache"

# One at a time: two downloads would rename over each other.
exec 9>"$cache/.lock"
flock 9

say() { echo "fetch-kernel: $*" >&2; }

# candidate prints the real package and its version: "name version".
candidate() {
	name=$(apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
	[ -n "$name" ] || return 1
	version=$(apt-cache policy "$name" | sed -n 's/^ *Candidate: //p')
	[ -n "$version" ] && [ "$version" != "(none)" ] || return 1
	echo "$name $version"
}

# newest prints the complete tree that was unpacked last.
newest() {
	for tree in $(ls -dt "$cache"/*/ 2>/dev/null); do
		if [ -f "$tree/.complete" ]; then
			echo "${tree%/}"
			return 0
		fi
	done
	return 1
}

# fetch NAME VERSION: download, unpack beside the final name, rename.
fetch() {
	tree=$cache/$2
	[ -f "$tree/.complete" ] && return 0
	work=$cache/.fetch # one at a time: a killed run's is ours to replace
	rm -rf "$work"
	mkdir "$work"
	trap 'rm -rf "$work"' EXIT
	# apt drops its rights to _apt for a download; the directory must be its to write.
	chmod 755 "$work"
	(cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$1=$2" >&2) || return 1
	dpkg-deb -x "$work"/*.deb "$work/tree"
	rm -f "$work"/*.deb
	touch "$work/tree/.complete"
	rm -rf "$tree"
	mv "$work/tree" "$tree"
	rm -rf "$work"
	trap - EXIT
}

try() {
	found=$(candidate) || return 1
	# shellcheck disable=SC2086 # two words on purpose
	fetch $found || return 1
	echo "$cache/${found#* }"
}

try && exit 0
if tree=$(newest); then
	say "apt cannot give $meta now; using the cached kernel"
	echo "$tree"
	exit 0
fi
say "no package lists or an old one: running apt-get update"
apt-get -qq update >&2 || true
try && exit 0
say "cannot download $meta: check the machine's apt sources and network"
exit 1
