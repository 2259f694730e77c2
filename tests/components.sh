#!/bin/sh
# components.sh: installs what components.txt beside it names and this machine lacks. Says nothing
# when nothing is missing. Where it may not install, the tests concerned say so (closing_table.py).
set -eu

missing=
for package in $(sed 's/#.*//' "$(dirname "$0")/components.txt"); do
    dpkg-query --show --showformat='${db:Status-Status}\n' "$package" 2>/dev/null |
        grep -qx installed || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed:$missing; as root, on Debian: apt-get install$missing" >&2
    exit 0
fi
echo "installing$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet=2
# $missing is split on purpose: one word a package.
apt-get install --yes --quiet=2 --no-install-recommends $missing >/dev/null
