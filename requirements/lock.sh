#!/bin/sh
# lock.sh: writes the four locks beside it anew from pyproject.toml, each name with its newest
# version that fits all of them, and the hashes of all its wheels, whatever machine they are for.
#   runtime.txt  what an installation needs
#   image.txt    what the container image has: that, with the extra mqtt
#   build.txt    what makes the wheel
#   dev.txt      what tests and checks it
# No registry's address is written. The resolver itself is thrown away afterwards.
set -eu

tool=$(mktemp -d)
trap 'rm -rf "$tool"' EXIT
.venv/bin/python -m pip --quiet --disable-pip-version-check install --target "$tool" uv

resolve() {
    "$tool/bin/uv" pip compile --quiet --universal --python-version 3.11 --upgrade \
        --no-header --no-annotate "$@" >/dev/null
}

resolve pyproject.toml --group build --group test --group check --output-file "$tool/all.txt"
set -- --constraints "$tool/all.txt" --generate-hashes
resolve "$@" pyproject.toml --output-file requirements/runtime.txt
resolve "$@" --extra mqtt pyproject.toml --output-file requirements/image.txt
resolve "$@" --group build --output-file requirements/build.txt
resolve "$@" --group test --group check --output-file requirements/dev.txt
