"""A cgroup (version 2) for one test, on a mount of its own."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

EMPTY_S = 60.0
"""How long killed processes may take to be gone, on a busy machine."""


@contextmanager
def new_cgroup() -> Iterator[Path]:
    """The directory of a cgroup; what is in it at the end is killed."""
    with tempfile.TemporaryDirectory() as root:
        command = ["mount", "-t", "cgroup2", "none", root]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            done = None
        if done is None or done.returncode != 0:
            pytest.skip("needs: cgroup2 mount: run as root")
        folder = Path(root, f"test-{os.getpid()}")
        try:
            folder.mkdir()
            try:
                yield folder
            finally:
                _remove(folder)
        finally:
            subprocess.run(["umount", root], check=True)


def _remove(folder: Path) -> None:
    (folder / "cgroup.kill").write_text("1")
    end_at = time.monotonic() + EMPTY_S
    while "populated 1" in (folder / "cgroup.events").read_text():
        assert time.monotonic() < end_at
        time.sleep(0.005)
    for inside, _, _ in os.walk(folder, topdown=False):
        Path(inside).rmdir()
