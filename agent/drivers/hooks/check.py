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

def check_hook(name: str, argv: Sequence[str]) -> None:
    """Refuse a hook that could not run, or that others could change (R11).

    Args:
        name: which hook, for the message.
        argv: program and arguments; the program is an absolute path.

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
    if not os.access(path, os.X_OK):
        raise ConfigError(
            f"hook {name}: {path} may not be executed by uid {os.geteuid()} (mode"
            f" {stat.S_IMODE(mode):04o}); run: chmod a+x {shlex.quote(str(path))}",
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
