"""The state file: what this agent says of itself to sidecars, and the claim on its session.

Owns one JSON file, replaced as a whole, and the lock beside it. Knows nothing of what it says, and
nothing resumes from it: it is of this run only (R6).
"""

import fcntl
import json
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.errors import ConfigError, ExitCode
from agent.ops.logs import Log

MODE = 0o644
"""Sidecars under other users read it; there are no secrets in it."""

PUBLIC_MODE = 0o755
PRIVATE_MODE = 0o700

MAX_BYTES = 64 * 1024
"""Far above what an agent writes; a larger file is not one of ours."""

WAIT_STEP_S = 0.05

log = Log(__name__)


class StateFile:
    """One agent's state file. ``acquire`` first; it stays this process's until ``close``, or its end.

    Args:
        path: the file. ``<path>.lock`` and ``<path>.tmp`` belong to it as well.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_path = path.with_name(path.name + ".lock")
        self._new_path = path.with_name(path.name + ".tmp")
        self._lock: int | None = None

    @property
    def claim(self) -> int | None:
        """The descriptor that holds the claim, for a guard: the claim lasts until both let go."""
        return self._lock

    def acquire(self, *, wait_s: float = 0.0) -> None:
        """Claim the file, and with it the session, for this process; clear up after a crashed one.

        Args:
            wait_s: how long to wait while the process that made the claim is dead, and its guard
                holds it until it has demoted.

        Raises:
            ConfigError: SESSION_IN_USE, another process has it (the message has its pid);
                STATE_FILE, the directory or the file cannot be written.
        """
        try:
            if self.path.is_dir():
                raise IsADirectoryError("it is a directory")
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, MODE)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._lock_or_wait(lock, wait_s)
            os.ftruncate(lock, 0)
            os.write(lock, f"{os.getpid()}\n".encode())
            self._new_path.unlink(missing_ok=True)
        except BlockingIOError as error:
            holder = _holder(lock)
            os.close(lock)
            raise ConfigError(
                f"state file {self.path} is in use by the process with pid {holder}: two agents"
                " must not share one session; stop that one, or give this one another"
                " --session-id and --state-file",
                exit_code=ExitCode.SESSION_IN_USE,
            ) from error
        except OSError as error:
            os.close(lock)
            raise self._unusable(error) from error
        self._lock = lock

    def _lock_or_wait(self, lock: int, wait_s: float) -> None:
        end_at = time.monotonic() + wait_s
        said = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if Path("/proc", _holder(lock)).exists() or time.monotonic() >= end_at:
                    raise
                if not said:
                    said = True
                    log.warning("waiting for the guard of the agent before", pid=_holder(lock))
                time.sleep(WAIT_STEP_S)  # nothing else runs yet
            else:
                return

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"state file {self.path} cannot be written ({error.strerror or error}): its directory"
            f" {self.path.parent} must exist and be writable for uid {os.geteuid()}; make it so, or"
            " choose another --state-file",
            exit_code=ExitCode.STATE_FILE,
        )

    def read(self) -> Mapping[str, Any] | None:
        """What is in the file, or None (and a log line) if it is missing or damaged."""
        try:
            with self.path.open("rb") as file:
                text = file.read(MAX_BYTES + 1)
            state = json.loads(text) if len(text) <= MAX_BYTES else None
        except FileNotFoundError:
            log.info("no earlier state", path=self.path)
            return None
        except (OSError, ValueError, RecursionError) as error:
            log.warning("earlier state ignored", path=self.path, reason=error)
            return None
        if not isinstance(state, dict):
            reason = f"not one JSON object of at most {MAX_BYTES} bytes"
            log.warning("earlier state ignored", path=self.path, reason=reason)
            return None
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the file: a reader sees the old state or the new one, never a part.

        There is no fsync: after a power loss nothing may be resumed from the file anyway (R6), and
        on a busy disk it takes seconds, which a lease has not.

        Raises:
            OSError: it could not be written (disk full, say); the old state is still there.
        """
        assert self._lock is not None, "acquire() comes first"  # noqa: S101 - our own mistake
        text = json.dumps(state, allow_nan=False) + "\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        try:
            with open(os.open(self._new_path, flags, MODE), "w", encoding="utf-8") as file:  # noqa: PTH123 - opens a descriptor
                os.fchmod(file.fileno(), MODE)  # whatever the umask is
                file.write(text)
            self._new_path.replace(self.path)
        except OSError:
            with suppress(OSError):
                self._new_path.unlink()
            raise

    def close(self) -> None:
        """Give the claim up. May be called twice. The file stays, and so does the lock's file."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _holder(lock: int) -> str:
    """The process id that made the claim."""
    return os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"


def default_directory() -> Path:
    """Where state files go if nobody said: made if it is missing, and nobody else's.

    $RUNTIME_DIRECTORY (systemd's), $XDG_RUNTIME_DIR/failover-agent, /run/failover-agent for root,
    /tmp/failover-agent-<uid>: the first that applies.

    Raises:
        ConfigError: STATE_FILE, it cannot be made, or somebody else could replace what is in it.
    """
    directory, mode = _usual()
    if mode is not None:
        _make(directory, mode)
    return directory


def usual_directory() -> Path:
    """As ``default_directory``, and whether it is there or not."""
    return _usual()[0]


def _usual() -> tuple[Path, int | None]:
    """The directory, and the mode to make it with; None if it is systemd's."""
    if given := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(given.split(":")[0]), None  # under DynamicUser it is a link
    return _choose(os.environ.get("XDG_RUNTIME_DIR"), os.geteuid())


def _choose(xdg_runtime_dir: str | None, uid: int) -> tuple[Path, int]:
    if xdg_runtime_dir:
        return Path(xdg_runtime_dir, "failover-agent"), PUBLIC_MODE
    if uid == 0:
        return Path("/run/failover-agent"), PUBLIC_MODE
    # the same one for every process of this user, whatever its TMPDIR is
    return Path(f"/tmp/failover-agent-{uid}"), PRIVATE_MODE  # noqa: S108 - _make() checks the owner


def _make(directory: Path, mode: int) -> None:
    try:
        directory.mkdir(mode, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise ConfigError(
            f"directory {directory} for state files cannot be made ({error.strerror}):"
            " make it, or say where the file is to be by --state-file",
            exit_code=ExitCode.STATE_FILE,
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"directory {directory} for state files is not safe: it must be a directory (not a"
            f" link), owned by uid {os.geteuid()} (it is by {found.st_uid}) and writable by nobody"
            f" else (its mode is {found.st_mode & 0o7777:04o}); remove it, or use --state-file",
            exit_code=ExitCode.STATE_FILE,
        )
