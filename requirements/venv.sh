#!/bin/sh
# venv.sh PYTHON: an empty .venv of that interpreter, for the Makefile. Leaves the one that is there
# if the same interpreter made it for the same locks. What is missing is said in one sentence.
set -eu

python=$1
stamp=.venv/.interpreter

refuse() {
    echo "failover-agent: $*" >&2
    exit 1
}

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    refuse "'$python' does not run; install Python 3.11 or later, or name one: make PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    refuse "'$python' is Python $version and must be 3.11 or later; name one: make PYTHON=python3.12"

made_for="$("$python" -c 'import sys; print(sys.base_prefix, repr(sys.version))') $(cat requirements/*.txt 2>/dev/null | cksum)"
[ "$(cat "$stamp" 2>/dev/null)" != "$made_for" ] || exit 0

# Debian keeps half of the venv module in a package of its own.
if ! "$python" -c 'from ensurepip import version; import venv' 2>/dev/null; then
    package=python$version-venv
    install="apt-get install --yes --no-install-recommends $package"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing $package"
        export DEBIAN_FRONTEND=noninteractive
        $install >/dev/null 2>&1 || { apt-get update && $install; } >/dev/null 2>&1 || true
    fi
    "$python" -c 'from ensurepip import version; import venv' 2>/dev/null ||
        refuse "'$python' cannot make virtual environments; as root, on Debian: $install"
fi

"$python" -m venv --clear .venv
echo "$made_for" >"$stamp"
