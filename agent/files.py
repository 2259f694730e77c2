"""Open files in directories that may belong to somebody else, such as a hostile workload.

Owns which symbolic links are followed: the last component of a path never, an earlier one only if root or this
process's user owns the link. Only regular files are opened for reading, no FIFO and no device. Knows nothing of
contents.
"""

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

MOST_LINKS = 40
"""The most links on one path, as in the kernel, since links can form a cycle."""

PART = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

NOT_FOLLOWED = "a symbolic link is not followed: name the file itself"


def make_absolute(path: Path) -> Path:
    """Make a path absolute: the guard has another working directory, and the agent's may be removed later.

    Raises:
        ValueError: it is relative, and the working directory does not exist.
    """
    try:
        return path.absolute()
    except FileNotFoundError:
        raise ValueError(
            "must be an absolute path, as the working directory does not exist"
        ) from None


def open_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """Open a file as ``os.open`` does, by the rule of this module; return the descriptor.

    Raises:
        OSError: ELOOP for a link that is not followed.
    """
    parent = open_directory(path.parent)
    try:
        return os.open(path.name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=parent)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, NOT_FOLLOWED) from None
        raise
    finally:
        os.close(parent)


def open_regular(path: Path, *, trusted_link: bool = False) -> int:
    """Open a regular file for reading; return the descriptor. Never blocks, even on a FIFO.

    Args:
        path: the file.
        trusted_link: follow a link that is the last component, too, if root or this user owns it, such as those
            in a volume of Kubernetes.

    Raises:
        OSError: also if it is not a regular file, or is a link that is not followed.
    """
    found = _open_path(path, trusted_link=trusted_link)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(found)


def read_regular(path: Path, most: int, *, trusted_link: bool = False) -> bytes:
    """At most ``most + 1`` bytes of a regular file; raises as ``open_regular`` does."""
    with os.fdopen(open_regular(path, trusted_link=trusted_link), "rb") as file:
        return file.read(most + 1)


def read_bounded(path: Path, most: int) -> bytes:
    """The content of any file, even of a pipe. Raises OSError, also for more than ``most`` bytes."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes")
    return content


def stat_file(path: Path) -> os.stat_result:
    """The status of a file or directory; a link is not followed. Raises OSError."""
    found = _open_path(path, trusted_link=False)
    try:
        return os.fstat(found)
    finally:
        os.close(found)


Signatures = tuple[tuple[int, ...] | None, ...]


def signatures(paths: Iterable[Path]) -> Signatures:
    """A signature of each file, which changes with the file and with the links to it; None without a file."""
    return tuple(map(_signature, paths))


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def open_directory(path: Path) -> int:
    """A descriptor of a directory, for ``dir_fd``. Raises OSError."""
    found = _walk(path)
    if not stat.S_ISDIR(os.fstat(found).st_mode):
        os.close(found)
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return found


def _open_path(path: Path, *, trusted_link: bool) -> int:
    """A descriptor (O_PATH) of the object at a path. Raises OSError for a symbolic link."""
    found = _walk(path) if trusted_link else open_file(path, os.O_PATH)
    if stat.S_ISLNK(os.fstat(found).st_mode):
        os.close(found)
        raise OSError(errno.ELOOP, NOT_FOLLOWED)
    return found


def _walk(path: Path) -> int:
    """A descriptor (O_PATH) of the object at a path, which is walked component by component."""
    links = 0
    todo = list(path.parts[::-1])
    here = os.open(todo.pop() if path.is_absolute() else ".", PART | os.O_DIRECTORY)
    try:
        while todo:
            there = _open_part(todo.pop(), here)
            found = os.fstat(there)
            if not stat.S_ISLNK(found.st_mode):
                os.close(here)
                here = there
                continue
            try:
                if found.st_uid not in {0, os.geteuid()}:
                    owner = f"a symbolic link on the way belongs to uid {found.st_uid}"
                    raise OSError(errno.ELOOP, f"{owner}, and is not followed")
                if (links := links + 1) > MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                target = Path(os.readlink("", dir_fd=there))
            finally:
                os.close(there)
            todo += target.parts[::-1]
            if target.is_absolute():
                os.close(here)
                here = os.open(todo.pop(), PART | os.O_DIRECTORY)
    except BaseException:
        os.close(here)
        raise
    return here


def _open_part(name: str, here: int) -> int:
    try:  # O_DIRECTORY triggers an automount
        return os.open(name, PART | os.O_DIRECTORY, dir_fd=here)
    except NotADirectoryError:
        return os.open(name, PART, dir_fd=here)
