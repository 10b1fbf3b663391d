#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Downloads a Debian package that the image is made of, unpacks it into a cache without
# installing it, and prints the directory:
#
#   fetch.sh [kernel] [ARCH]   the kernel that linux-image-cloud-ARCH depends on
#   fetch.sh stub [ARCH]       systemd-boot-efi, which has the EFI stub
#   fetch.sh seccomp [ARCH]    libseccomp-dev, which is linked into podvmd
#
# ARCH is Debian's name, by default this machine's. Once the package is there the script
# needs no network: it takes the newest one of the cache when apt cannot tell or fetch a
# newer one. .package in the directory says which it is: name, version, architecture.
#
# For another architecture than this machine's it asks with package lists of its own:
# dpkg's configuration stays as it is.
#
#   KATA_REMOTE_CACHE   cache directory, default ${XDG_CACHE_HOME:-$HOME/.cache}/kata-remote
set -eu

what=${1:-kernel}
native=$(dpkg --print-architecture)
arch=${2:-$native}
root=${KATA_REMOTE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kata-remote}
cache=$root/$what
[ "$arch" = "$native" ] || cache=$cache-$arch

say() { echo "fetch: $*" >&2; }

case $what in
kernel) meta=linux-image-cloud-$arch ;;
stub) meta=systemd-boot-efi ;;
seccomp) meta=libseccomp-dev ;;
*) say "what is $what? It fetches kernel, stub or seccomp" && exit 2 ;;
esac
mkdir -p "$cache"

# One at a time: two downloads would rename over each other.
exec 9>"$root/.lock"
flock 9

# apt TOOL ARGUMENT...: the tool for the wanted architecture.
apt() {
	tool=$1
	shift
	if [ "$arch" = "$native" ]; then
		"$tool" -o APT::Sandbox::User=root "$@"
		return
	fi
	state=$root/apt-$arch
	mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
	: >"$state/status"
	"$tool" -o APT::Sandbox::User=root -o APT::Architecture="$arch" -o APT::Architectures="$arch" -o Acquire::Languages=none \
		-o Dir::State="$state" -o Dir::State::lists="$state/lists" -o Dir::State::status="$state/status" -o Dir::Cache="$state/cache" "$@"
}

# candidate prints the real package and its version: "name version".
candidate() {
	name=$meta
	if [ "$what" = kernel ]; then
		name=$(apt apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
		[ -n "$name" ] || return 1
	fi
	version=$(apt apt-cache policy "$name" | sed -n 's/^ *Candidate: //p')
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
	if [ -f "$tree/.complete" ]; then
		[ -f "$tree/.package" ] || echo "$1 $2 $arch" >"$tree/.package"
		return 0
	fi
	work=$cache/.fetch # one at a time: a killed run's is ours to replace
	rm -rf "$work"
	mkdir "$work"
	trap 'rm -rf "$work"' EXIT
	# apt drops its rights to _apt for a download; the directory must be its to write.
	chmod 755 "$work"
	(cd "$work" && apt apt-get -qq download "$1=$2" >&2) || return 1
	dpkg-deb -x "$work"/*.deb "$work/tree"
	rm -f "$work"/*.deb
	echo "$1 $2 $arch" >"$work/tree/.package"
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
	say "apt cannot give $meta for $arch now; using the cached one"
	echo "$tree"
	exit 0
fi
say "no package lists or an old one: running apt-get update"
apt apt-get -qq update >&2 || true
try && exit 0
say "cannot download $meta for $arch: check the machine's apt sources and network"
exit 1
