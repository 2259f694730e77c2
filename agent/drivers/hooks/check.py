"""Which programs and directories are fit to be hooks (R11).

Owns looking at files, and the sentence for each fault. Knows nothing of settings and events; starts
nothing.
"""

import errno
import os
import re
import shlex
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import ConfigError, ExitCode

MAX_LINKS = 40
"""As the kernel's own bound on symbolic links in one path."""

SCRIPT_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""As run-parts takes names without being told otherwise."""

MOST_SCRIPTS = 64
"""In one directory. Each ended one keeps a process number for a while (HookProcess.forget)."""


@dataclass(frozen=True, slots=True)
class RunAs:
    """Whom a hook runs as, by numbers. ``groups`` are the supplementary ones."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str | None = None

    def may(self, found: os.stat_result) -> bool:
        """Whether the mode lets this user execute a file, or pass a directory."""
        if self.uid == 0:
            return stat.S_ISDIR(found.st_mode) or bool(found.st_mode & 0o111)
        if found.st_uid == self.uid:
            return bool(found.st_mode & stat.S_IXUSR)
        if found.st_gid in {self.gid, *self.groups}:
            return bool(found.st_mode & stat.S_IXGRP)
        return bool(found.st_mode & stat.S_IXOTH)


def scripts_in(directory: Path) -> tuple[tuple[Path, ...], tuple[tuple[str, str], ...]]:
    """The scripts of a directory in their order, and the (name, reason) of what is ignored.

    Raises:
        OSError: it cannot be read.
    """
    scripts, ignored = [], []
    for name in sorted(os.listdir(directory), key=os.fsencode):  # noqa: PTH208 - names, not paths
        path = directory / name
        if not SCRIPT_NAME.fullmatch(name):
            ignored.append((name, "its name has other characters than letters, digits, _ and -"))
        elif path.is_dir():
            ignored.append((name, "it is a directory"))
        else:
            scripts.append(path)
    return tuple(scripts), tuple(ignored)


def check_directory(name: str, directory: Path, run_as: RunAs | None = None) -> None:
    """Refuse a directory of scripts that others could change, or one of whose scripts is unfit.

    Raises:
        ConfigError: as ``check_hook`` does; HOOK_MISSING too if there is no script in it, and
            CONFIG_VALUE if there are more than ``MOST_SCRIPTS``.
    """
    try:
        trail = list(_trail(directory))
        scripts, ignored = scripts_in(directory)
    except OSError as error:
        raise ConfigError(
            f"hook {name}: {directory} cannot be read ({error.strerror}); create it, or correct the"
            " path",
            exit_code=ExitCode.HOOK_MISSING,
        ) from error
    if not scripts:
        but = f" ({len(ignored)} files are ignored)" if ignored else ""
        raise ConfigError(
            f"hook {name}: {directory} has no script{but}; put one there whose name is of letters,"
            " digits, _ and - only",
            exit_code=ExitCode.HOOK_MISSING,
        )
    if len(scripts) > MOST_SCRIPTS:
        raise ConfigError(
            f"hook {name}: {directory} has {len(scripts)} scripts; at most {MOST_SCRIPTS} can be run"
        )
    for part in trail:
        _check_unchangeable(name, part)
    for script in scripts:
        check_hook(name, [str(script)], run_as)


def check_hook(name: str, argv: Sequence[str], run_as: RunAs | None = None) -> None:
    """Refuse a hook that could not run, or that others could change (R11).

    Args:
        name: which hook, for the message.
        argv: program and arguments; the program is an absolute path.
        run_as: whom it will run as; None for us.

    Raises:
        ConfigError: CONFIG_VALUE (empty, not absolute), HOOK_MISSING, HOOK_NOT_EXECUTABLE, or
            HOOK_WRITABLE: the file, or a directory or link on the way to it, belongs to neither
            root nor us, or can be written by its group or by others (sticky directories may).
    """
    if not argv or not argv[0].startswith("/"):
        raise ConfigError(
            f"hook {name}: {shlex.join(argv)!r} must be a list that begins with the absolute path"
            ' of a program, like ["/usr/local/bin/on-primary", "--fast"]'
        )
    path = Path(argv[0])
    try:
        mode = path.stat().st_mode
        trail = list(_trail(path))
    except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"hook {name}: {path} cannot be found ({why}); create it, or correct the path",
            exit_code=ExitCode.HOOK_MISSING,
        ) from error
    if not stat.S_ISREG(mode):
        raise ConfigError(
            f"hook {name}: {path} is not a regular file; name a program",
            exit_code=ExitCode.HOOK_NOT_EXECUTABLE,
        )
    blocking = path if not os.access(path, os.X_OK) else None
    if blocking is None and run_as is not None:
        blocking = next((part for part in trail if not run_as.may(part.stat())), None)
    if blocking is not None:
        uid = run_as.uid if run_as is not None else os.geteuid()
        raise ConfigError(
            f"hook {name}: {path} may not be executed by uid {uid} (mode"
            f" {stat.S_IMODE(blocking.stat().st_mode):04o} of {blocking}); run:"
            f" chmod a+x {shlex.quote(str(blocking))}",
            exit_code=ExitCode.HOOK_NOT_EXECUTABLE,
        )
    for part in trail:
        _check_unchangeable(name, part)


def _trail(path: Path) -> Iterator[Path]:
    """``path``, its directories, and those of each link among them."""
    todo, seen, links = [path], set(), 0
    while todo:
        part = todo.pop()
        if part in seen:
            continue
        seen.add(part)
        yield part
        todo.append(part.parent)
        if part.is_symlink():
            links += 1
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            todo.append(part.parent / part.readlink())


def _check_unchangeable(name: str, part: Path) -> None:
    found = part.lstat()
    quoted = shlex.quote(str(part))
    if found.st_uid not in {0, os.geteuid()}:
        raise ConfigError(
            f"hook {name}: {part} belongs to uid {found.st_uid}, who could replace the hook; it"
            f" must belong to root or to uid {os.geteuid()}: run: chown root {quoted}",
            exit_code=ExitCode.HOOK_WRITABLE,
        )
    if stat.S_ISLNK(found.st_mode):  # a link has no mode of its own; its directory's counts
        return
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        raise ConfigError(
            f"hook {name}: {part} can be written by its group or by others (mode"
            f" {stat.S_IMODE(found.st_mode):04o}), who could change the hook: run:"
            f" chmod go-w {quoted}",
            exit_code=ExitCode.HOOK_WRITABLE,
        )
