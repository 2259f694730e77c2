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


def strace() -> str:
    """The program; skips the test where it is missing or may trace nothing."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("needs: strace: apt-get install strace")
    done = subprocess.run(
        [program, "-qq", "-o", os.devnull, "true"], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("needs: the right to trace a process: run as root with CAP_SYS_PTRACE")
    return program


def slow_disk(pid: int, calls: Sequence[str], delay_s: float) -> Callable[[], object]:
    """Delay the return of each of these calls of a process; returns what ends that.

    A process that has ended, or is slow already, is left alone.
    """
    names = ",".join(calls)
    inject = f"inject={names}:delay_exit={int(delay_s * 1e6)}"
    command = [strace(), "-f", "-qq", "-o", os.devnull, "-e", f"trace={names}", "-e", inject]
    tracer = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE)
    end_at = time.monotonic() + ATTACHED_S
    while (found := _tracer_of(pid)) != tracer.pid and tracer.poll() is None:
        assert time.monotonic() < end_at, "strace does not attach"
        time.sleep(0.01)

    def end() -> None:
        tracer.terminate()
        tracer.communicate(timeout=ATTACHED_S)

    if tracer.poll() is not None:
        _, said = tracer.communicate()
        assert found != 0, f"strace has not attached: {said.decode()}"
    return end


def _tracer_of(pid: int) -> int | None:
    """The process that traces this one, or 0; None if it has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        if fields["State"][0] not in "ZX":
            return int(fields["TracerPid"])
    return None
