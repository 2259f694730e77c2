"""Check that programs and directories can be hooks, and that nobody else can change them (R11).

Owns the checks of files, and the message for each fault. Knows nothing of settings and events; starts
nothing.
"""

import errno
import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import ConfigError, ExitCode

MAX_LINKS = 40
"""The kernel's own bound on symbolic links in one path."""

SCRIPT_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""The names that run-parts accepts by default."""

HEADER_BYTES = 256
"""How many bytes of a file the kernel reads to execute it; an interpreter line has to fit."""

MOST_NESTED = 4
"""How often the interpreter of a script may be a script, too: the kernel refuses more."""

MOST_SCRIPTS = 64
"""The most scripts in a directory. Each keeps a process id until its run is released (HookProcess.release)."""


@dataclass(frozen=True, slots=True)
class RunAs:
    """User and group ids of a hook. ``groups`` are the supplementary ones."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str | None = None

    def may_execute(self, found: os.stat_result) -> bool:
        """Whether the mode lets this user execute a file, or enter a directory."""
        if self.uid == 0:
            return stat.S_ISDIR(found.st_mode) or bool(found.st_mode & 0o111)
        if found.st_uid == self.uid:
            return bool(found.st_mode & stat.S_IXUSR)
        if found.st_gid in {self.gid, *self.groups}:
            return bool(found.st_mode & stat.S_IXGRP)
        return bool(found.st_mode & stat.S_IXOTH)


def scripts_in(directory: Path) -> tuple[tuple[Path, ...], tuple[tuple[str, str], ...]]:
    """List the scripts of a directory in their order, and (name, reason) of each ignored file.

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


@dataclass(frozen=True, slots=True)
class HookCheck:
    """Rejects programs that cannot run as a hook, or that others could change (R11).

    Attributes:
        name: of the hook, for the message.
        run_as: the user that it will run as; None for this process's.
        search_path: its PATH, for an interpreter line with env; None for this process's.
        writable_directories: allow directories that others can write, such as a ConfigMap volume.
    """

    name: str
    run_as: RunAs | None = None
    search_path: str | None = None
    writable_directories: bool = False

    def check_directory(self, directory: Path) -> None:
        """Reject a directory of scripts that others could change, or with a script that cannot run.

        Raises:
            ConfigError: as ``check_command`` does; HOOK_MISSING too if there is no script in it, and
                CONFIG_VALUE if there are more than ``MOST_SCRIPTS``.
        """
        try:
            components = list(_path_components(directory))
            scripts, ignored = scripts_in(directory)
        except OSError as error:
            raise self._refusal(
                ExitCode.HOOK_MISSING,
                f"{directory} cannot be read ({error.strerror}); create it, or correct the path",
            ) from error
        if not scripts:
            but = f" ({len(ignored)} files are ignored)" if ignored else ""
            raise self._refusal(
                ExitCode.HOOK_MISSING,
                f"{directory} has no script{but}; put one there whose name has only letters,"
                " digits, _ and -",
            )
        if len(scripts) > MOST_SCRIPTS:
            raise self._refusal(
                ExitCode.CONFIG_VALUE,
                f"{directory} has {len(scripts)} scripts; at most {MOST_SCRIPTS} can be run",
            )
        for part in components:
            self._check_not_writable(part)
        for script in scripts:
            self.check_command([str(script)])

    def check_command(self, argv: Sequence[str]) -> None:
        """Reject a program that cannot run as a hook, or that others could change.

        Raises:
            ConfigError: CONFIG_VALUE (empty, not absolute), HOOK_MISSING, HOOK_NOT_EXECUTABLE (also:
                no interpreter line, or no such interpreter), or HOOK_WRITABLE: the file, or a directory
                or link on the way to it, belongs to neither root nor our user, or its group or others
                can write it (sticky directories are allowed).
        """
        if not argv or not argv[0].startswith("/"):
            raise self._refusal(
                ExitCode.CONFIG_VALUE,
                f"{shlex.join(argv)!r} must be a list that begins with the absolute path"
                ' of a program, like ["/usr/local/bin/on-primary", "--fast"]',
            )
        path = Path(argv[0])
        try:
            mode = path.stat().st_mode
            components = list(_path_components(path))
        except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
            why = getattr(error, "strerror", None) or error
            raise self._refusal(
                ExitCode.HOOK_MISSING,
                f"{path} cannot be found ({why}); create it, or correct the path",
            ) from error
        if (fault := self._execution_fault(path, mode, components)) is not None:
            raise self._refusal(ExitCode.HOOK_NOT_EXECUTABLE, f"{path} {fault}")
        for part in components:
            self._check_not_writable(part)

    def _execution_fault(self, path: Path, mode: int, components: Sequence[Path]) -> str | None:
        """Why a file could not be executed, or None if it could."""
        if not stat.S_ISREG(mode):
            return "is not a regular file; name a program"
        if os.statvfs(path).f_flag & os.ST_NOEXEC:
            return (
                "is on a file system that is mounted noexec, so nothing there can be"
                " executed: move it, or name its interpreter first, like"
                f' ["/bin/sh", "{path}"]'
            )
        run_as = self.run_as
        blocking = path if not os.access(path, os.X_OK) else None
        if blocking is None and run_as is not None:
            parts = (part for part in components if not run_as.may_execute(part.stat()))
            blocking = next(parts, None)
        if blocking is not None:
            uid = run_as.uid if run_as is not None else os.geteuid()
            return (
                f"may not be executed by uid {uid} (mode"
                f" {stat.S_IMODE(blocking.stat().st_mode):04o} of {blocking}); run:"
                f" chmod a+x {shlex.quote(str(blocking))}"
            )
        fault = _format_fault(path, self.search_path)
        return None if fault is None else f"cannot be executed: {fault}"

    def _check_not_writable(self, part: Path) -> None:
        found = part.lstat()
        quoted = shlex.quote(str(part))
        if found.st_uid not in {0, os.geteuid()}:
            raise self._refusal(
                ExitCode.HOOK_WRITABLE,
                f"{part} belongs to uid {found.st_uid}, who could replace the hook; it"
                f" must belong to root or to uid {os.geteuid()}: run: chown root {quoted}",
            )
        if stat.S_ISLNK(found.st_mode):  # the mode of its directory decides
            return
        is_directory = stat.S_ISDIR(found.st_mode)
        if is_directory and (self.writable_directories or found.st_mode & stat.S_ISVTX):
            return
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            volume = " (or, for a ConfigMap volume, set hook_directories_writable)"
            raise self._refusal(
                ExitCode.HOOK_WRITABLE,
                f"{part} can be written by its group or by others (mode"
                f" {stat.S_IMODE(found.st_mode):04o}), who could change the hook: run:"
                f" chmod go-w {quoted}{volume if is_directory else ''}",
            )

    def _refusal(self, code: ExitCode, text: str) -> ConfigError:
        return ConfigError(f"hook {self.name}: {text}", exit_code=code)


def _format_fault(path: Path, search_path: str | None, nested: int = 0) -> str | None:
    """Why the kernel would not execute the content of a file, or None if it would.

    Args:
        path: the file.
        search_path: the PATH of the hook.
        nested: how many interpreter lines led to this file: 0 for the hook, 1 for its interpreter.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError:  # a program may be executable and not readable
        return None
    if header.startswith(b"#!"):
        if nested > MOST_NESTED:
            return f"it is a script with more than {MOST_NESTED} interpreters in turn"
        return _interpreter_fault(header, search_path, nested)
    if not header:
        return "it is empty; write a program"
    if not header.strip(b"\0"):
        return "it begins with nothing but zeros, as after a power failure: install it again"
    if header.startswith(b"\x7fELF") or b"\0" in header:  # the kernel may know other formats
        return None
    return (
        "it has no interpreter line: its very first line must be one like #!/bin/sh, with no byte order"
        " mark and no blank before it"
    )


def _interpreter_fault(header: bytes, search_path: str | None, nested: int) -> str | None:
    line, newline, _ = header[2:].partition(b"\n")
    if not newline and len(header) == HEADER_BYTES:
        return f"its interpreter line is longer than {HEADER_BYTES} bytes; use a shorter path"
    text = os.fsdecode(line)
    if text.endswith("\r"):
        return (
            "its interpreter line ends with a carriage return, so it is in DOS format: run:"
            " sed -i 's/\\r$//' on it"
        )
    program, _, argument = text.strip(" \t").replace("\t", " ").partition(" ")
    if not program.startswith("/"):
        return f"its interpreter line names {program!r}, which is no absolute path, like #!/bin/sh"
    if not os.access(program, os.X_OK) or not Path(program).is_file():
        return f"its interpreter {program} is not there, or may not be executed: install it"
    if Path(program).name == "env":
        return _env_fault(argument.strip(), search_path)
    fault = _format_fault(Path(program), search_path, nested + 1)
    return None if fault is None else f"its interpreter {program} cannot be executed: {fault}"


def _env_fault(argument: str, search_path: str | None) -> str | None:
    """Why env would not find the program of an interpreter line; the kernel passes one argument."""
    words = [argument]
    if argument.startswith("-S"):
        words = argument.removeprefix("-S").split()
        while words and "=" in words[0]:
            words.pop(0)
    program = words[0] if words else ""
    if program.startswith("-") or "/" in program:  # an option, or a path, which env resolves itself
        return None
    if " " in program:
        return f"env is given {program!r} as the name of one program: write #!/usr/bin/env -S {program}"
    where = search_path if search_path is not None else os.environ.get("PATH", os.defpath)
    if not program or shutil.which(program, path=where) is None:
        return (
            f"env finds no {program!r} on the PATH that the hook has ({where}): install it, name it by"
            " its absolute path, or set PATH in hook_environment"
        )
    return None


def _path_components(path: Path) -> Iterator[Path]:
    """Yield ``path``, its directories, and those of each symbolic link among them."""
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
