"""What the kernel refuses or delays, for tests: a disk that never answers, a frozen process, no further task.

A process that touches the disk does not return, and does not die of SIGKILL, like one on a dead network
file system. A frozen process does not die of SIGKILL either, until it is thawed.
"""

import contextlib
import ctypes
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

FUSE = Path("/dev/fuse")
FREEZER = Path("/sys/fs/cgroup/freezer")
TASKS = Path("/sys/fs/cgroup/pids")
END_S = 60.0
INIT, VERSION = 26, (7, 31)
REQUEST_BYTES = 1 << 17
MNT_FORCE, MNT_DETACH = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def dead_disk(path: Path) -> Iterator[Path]:
    """A directory whose file system takes every request and answers none, until the end of the test."""
    if os.geteuid() != 0 or not FUSE.exists():
        pytest.skip("needs: root and /dev/fuse: run as root on a host with FUSE")
    path.mkdir(exist_ok=True)
    device = os.open(FUSE, os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if _libc.mount(b"dead", os.fsencode(path), b"fuse", 0, options):
        os.close(device)
        pytest.skip(f"needs: mounting FUSE: {os.strerror(ctypes.get_errno())}")
    opcode, unique = struct.unpack_from("=4xIQ", os.read(device, REQUEST_BYTES))
    assert opcode == INIT
    answer = struct.pack("=IIIIHHIIHH", *VERSION, 65536, 0, 16, 12, 65536, 1, 16, 0).ljust(
        64, b"\0"
    )
    os.write(device, struct.pack("=IiQ", 16 + len(answer), 0, unique) + answer)
    taking = threading.Thread(target=_take, args=(device,))
    taking.start()
    try:
        yield path
    finally:
        _libc.umount2(os.fsencode(path), MNT_FORCE | MNT_DETACH)
        taking.join()
        os.close(device)


def _take(device: int) -> None:
    """A request that was taken can be given up by nobody."""
    with contextlib.suppress(OSError):  # the file system is gone
        while os.read(device, REQUEST_BYTES):
            pass


STUCK = """
import ctypes, os, platform, threading, time
clone = {"x86_64": 56}.get(platform.machine(), 220)
CLONE_VFORK, SIGCHLD = 0x4000, 17

def wait_in_kernel():
    if ctypes.CDLL(None).syscall(clone, CLONE_VFORK | SIGCHLD, 0, 0, 0, 0) == 0:
        time.sleep(1000)

threading.Thread(target=wait_in_kernel, daemon=True).start()
time.sleep(1000)
"""
"""A thread that waits in state D, as vfork() does, for a child that never execs."""


@contextlib.contextmanager
def stuck_thread(**environment: str) -> Iterator[int]:
    """A process whose main thread sleeps, while another thread is stuck in the kernel (state D)."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", STUCK],
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            threads = Path(f"/proc/{process.pid}/task")
            end_at = time.monotonic() + END_S
            while _states(threads) != ["D", "S"]:
                assert time.monotonic() < end_at
                time.sleep(0.01)
            yield process.pid
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _states(threads: Path) -> list[str]:
    stats = [(thread / "stat").read_text() for thread in threads.iterdir()]
    return sorted(stat.rpartition(") ")[2][0] for stat in stats)


@contextlib.contextmanager
def freezer(name: str) -> Iterator["Freezer"]:
    """A cgroup that can be frozen; thawed at the end of the test."""
    folder = FREEZER / f"{name}-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"needs: the freezer of cgroup v1: {error.strerror}: run as root")
    frozen = Freezer(folder)
    try:
        yield frozen
    finally:
        frozen.thaw()
        while frozen.members():
            pass  # they were killed, or are moved out
        folder.rmdir()


WITHOUT_PIDFD = """
import ctypes, os, struct, sys
numbers, LOAD, JUMP_IF, RETURN = (424, 434), 0x20, 0x15, 0x06  # pidfd_send_signal, pidfd_open
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | int(sys.argv[1])
filters = [(LOAD, 0, 0, 0), *((JUMP_IF, len(numbers) - n, 0, number) for n, number in enumerate(numbers))]
filters += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
program = b"".join(struct.pack("HBBI", *one) for one in filters)
buffer = ctypes.create_string_buffer(program)
header = struct.pack("HxxxxxxP", len(filters), ctypes.addressof(buffer))
prctl = ctypes.CDLL(None, use_errno=True).prctl
if prctl(38, 1, 0, 0, 0) or prctl(22, 2, header, 0, 0):  # NO_NEW_PRIVS, SECCOMP
    sys.exit(f"no filter: {ctypes.get_errno()}")
os.execv(sys.argv[2], sys.argv[2:])
"""


def without_pidfd(number: int) -> list[str]:
    """The prefix of a command for which the pidfd calls fail with this error number.

    They do so on a kernel before 5.3 (ENOSYS), and under the seccomp filter of an older container engine (EPERM).
    """
    return [sys.executable, "-S", "-c", WITHOUT_PIDFD, str(number)]


FORKS = """
import os, time
os.setsid()
while True:
    try:
        if not os.fork():
            time.sleep(1000)
            os._exit(0)
    except OSError:
        time.sleep(0.001)
"""
"""Uses up every task that it is given."""


@contextlib.contextmanager
def limited_tasks(name: str, most: int) -> Iterator[Path]:
    """A cgroup with a limit of processes and threads; what is in it at the end is killed."""
    folder = TASKS / f"{name}-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"needs: the pids controller of cgroup v1: {error.strerror}: run as root")
    try:
        (folder / "pids.max").write_text(str(most))
        yield folder
    finally:
        end_at = time.monotonic() + END_S
        while pids := (folder / "cgroup.procs").read_text().split():
            assert time.monotonic() < end_at
            for pid in pids:
                with contextlib.suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.01)
        folder.rmdir()


class Freezer:
    """A cgroup of the freezer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def freeze(self, pid: int) -> None:
        """Put a process in, and freeze all that is in it."""
        (self._folder / "cgroup.procs").write_text(str(pid))
        (self._folder / "freezer.state").write_text("FROZEN")
        while (self._folder / "freezer.state").read_text().strip() != "FROZEN":
            pass

    def thaw(self) -> None:
        """Let all go on, or die of what was sent to them."""
        (self._folder / "freezer.state").write_text("THAWED")

    def members(self) -> list[int]:
        """Who is in it; all are moved out that live."""
        left = [int(pid) for pid in (self._folder / "cgroup.procs").read_text().split()]
        for pid in left:
            with contextlib.suppress(OSError):
                (FREEZER / "cgroup.procs").write_text(str(pid))
        return left
