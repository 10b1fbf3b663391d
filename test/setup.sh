#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Installs from Debian what building and testing need, or the packages that are named,
# and nothing that is there already. No service is started: Debian's packages ask policy-rc.d, and for the
# time of the installation it says no. A containerd that runs on this machine is
# left alone.
set -eu

packages="qemu-system-x86 containerd runc containernetworking-plugins busybox-static
gcc libc6-dev libseccomp-dev pkg-config bash-static iproute2 iptables protobuf-compiler libprotobuf-dev
ovmf qemu-utils dosfstools sbsigntool openssl"
[ $# -eq 0 ] || packages=$*

missing=
for p in $packages; do
	dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q '^install ok installed$' || missing="$missing $p"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ]; then
	echo "setup: these packages are missing and only root can install them:$missing" >&2
	exit 1
fi
echo "setup: installing$missing" >&2

policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
	trap 'rm -f "$policy"' EXIT
	trap 'exit 1' INT TERM
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
fi

log=$(mktemp)
install() {
	# shellcheck disable=SC2086 # a list of names
	DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing >"$log" 2>&1
}
if ! install; then # the package lists may be missing or old
	apt-get update >>"$log" 2>&1 || true
	if ! install; then
		tail -n 20 "$log" >&2
		echo "setup: apt-get could not install$missing; the whole log is $log" >&2
		exit 1
	fi
fi
rm -f "$log"
