"""What the kernel knows of the process of the tests: its children, threads and open files."""

import contextlib
from pathlib import Path


def children() -> set[int]:
    """Children of this process, zombies included."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found.update(map(int, (task / "children").read_text().split()))
    return found


def threads() -> int:
    """How many threads it has, also those that Python's threading does not know of."""
    return len(list(Path("/proc/self/task").iterdir()))


def descriptors() -> int:
    """How many open files it has, and one more: the directory that is read for this."""
    return len(list(Path("/proc/self/fd").iterdir()))


def open_files() -> dict[int, str]:
    """What each of its descriptors is open on."""
    found: dict[int, str] = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory itself
            found[int(link.name)] = str(link.readlink())
    return found
