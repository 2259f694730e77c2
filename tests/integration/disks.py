"""Disks that are full or slow, for real processes.

A *full* disk is a small tmpfs that is filled to the last byte. A *slow* one is made by strace, which delays the
return of chosen system calls of one process: it works for every program and file system, and nothing else
on the machine becomes slower. What it costs: while it is attached, all system calls of that process are
a little slower, since each one stops twice.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

WRITES_OF_ETCD = ("fsync", "fdatasync")
"""etcd acknowledges nothing before these have returned."""

WRITES_OF_STATE_FILES = ("rename", "renameat", "renameat2")
"""A state file is replaced by a rename, without fsync."""

ATTACHED_S = 10.0


class Disk:
    """A file system in memory, of its own size."""

    def __init__(self, stack: ExitStack, path: Path, size: str) -> None:
        self.path = path
        path.mkdir()
        mount = ("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip("needs: the right to mount a tmpfs: run as root with CAP_SYS_ADMIN")
        stack.callback(subprocess.run, ["umount", "--lazy", str(path)], check=True)
        self._ballast = path / "ballast"

    def fill(self) -> None:
        """Take every byte that is left."""
        with self._ballast.open("ab", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        with self._ballast.open("ab", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass

    def free(self) -> None:
        """Give it back."""
        self._ballast.unlink(missing_ok=True)


def slow_disk(pid: int, calls: Sequence[str], delay_s: float) -> Callable[[], object]:
    """Delay the return of each of these calls of a process; returns what ends that."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("needs: strace: apt-get install strace")
    names = ",".join(calls)
    inject = f"inject={names}:delay_exit={int(delay_s * 1e6)}"
    command = [program, "-f", "-qq", "-o", os.devnull, "-e", f"trace={names}", "-e", inject]
    tracer = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE)
    end_at = time.monotonic() + ATTACHED_S
    while f"TracerPid:\t{tracer.pid}\n" not in _status(pid):
        assert time.monotonic() < end_at, "strace does not attach"
        if tracer.poll() is not None:
            break  # the process has ended meanwhile
        time.sleep(0.01)

    def end() -> None:
        tracer.terminate()
        tracer.communicate(timeout=ATTACHED_S)

    return end


def _status(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/status").read_text()
    return ""
