"""The state file, which publishes this agent's state to sidecars, and the claim on its session.

Owns one JSON file, replaced atomically, and its lock file. Knows nothing of the content. No role is resumed from
the file, which describes this run only (R6). Its directory may belong to another user: no link is followed, and
no file of another user is read or changed.
"""

import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agent import files, proctree
from agent.errors import ConfigError, ExitCode
from agent.ops.logs import Log

MODE = 0o644
"""The mode of the state file: sidecars of other users read it, and it contains no secrets."""

PUBLIC_MODE = 0o755
PRIVATE_MODE = 0o700

MAX_BYTES = 64 * 1024
"""The longest state that is read: far more than an agent writes, so a larger file is not one of ours."""

WAIT_STEP_S = 0.05

log = Log(__name__)


class StateFile:
    """One agent's state file. ``acquire`` first; the claim lasts until ``close``, or the process's end.

    Args:
        path: the file. ``<path>.lock`` and ``<path>.tmp`` are used, too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_path = path.with_name(path.name + ".lock")
        self._new_path = path.with_name(path.name + ".tmp")
        self._lock: int | None = None

    @property
    def claim(self) -> int | None:
        """The descriptor of the claim, for the guard: the claim lasts until both have closed it."""
        return self._lock

    def acquire(self, *, wait_s: float = 0.0) -> None:
        """Claim the file, and with it the session, for this process; works on a read-only disk, too.

        Args:
            wait_s: how long to wait for the guard of a dead agent, which keeps the claim until it has
                demoted.

        Raises:
            ConfigError: SESSION_IN_USE, another process has the claim (the message has its pid);
                STATE_FILE, the directory or the file cannot be written.
        """
        try:
            self._lock = self._claim(wait_s)
        except OSError as error:
            raise self._unusable(error) from error

    def _claim(self, wait_s: float) -> int:
        """Open and lock the lock file. Raises OSError, and ConfigError if another process has locked it."""
        lock = self._open_lock()
        try:
            self._lock_or_wait(lock, wait_s)
        except OSError as error:
            pid = _claim_pid(lock)
            os.close(lock)
            raise in_use(self.path, pid) if isinstance(error, BlockingIOError) else error from None
        with suppress(OSError):  # if the disk is full, the first write of the state fails, too
            os.ftruncate(lock, 0)
            os.write(lock, f"{os.getpid()}\n".encode())
        with suppress(OSError):
            os.fchmod(lock, 0o600)  # another user who can open it could lock it, and keep us out
        return lock

    def _keep_claim(self, directory: int) -> None:
        """Keep the lock file young, and make another one if it was removed. The running guard keeps the old one."""
        assert self._lock is not None, "acquire() comes first"  # noqa: S101 - our own mistake
        os.utime(self._lock)  # systemd-tmpfiles removes old files of /tmp
        with suppress(FileNotFoundError):
            found = os.stat(self._lock_path.name, dir_fd=directory, follow_symlinks=False)
            if os.path.samestat(found, os.fstat(self._lock)):
                return
        lock = self._claim(0.0)
        os.dup2(lock, self._lock, inheritable=False)  # the guards of this process know this number
        os.close(lock)

    def _open_lock(self) -> int:
        try:
            lock = files.open_file(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            lock = files.open_file(self._lock_path, os.O_RDONLY | os.O_NONBLOCK)
        found = os.fstat(lock)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1:
            return lock
        os.close(lock)  # the file that would be overwritten may be anything
        right = f"it must be a file of uid {os.geteuid()} without other names, or not be there"
        raise OSError(errno.EPERM, f"{self._lock_path.name} belongs to uid {found.st_uid}; {right}")

    @contextmanager
    def _directory(self) -> Iterator[int]:
        directory = files.open_directory(self.path.parent)
        try:
            yield directory
        finally:
            os.close(directory)

    def _lock_or_wait(self, lock: int, wait_s: float) -> None:
        end_at = time.monotonic() + wait_s
        logged = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if _is_running(_claim_pid(lock)) or time.monotonic() >= end_at:
                    raise
                if not logged:
                    logged = True
                    pid = _claim_pid(lock)
                    log.warning("waiting for the previous agent's guard to exit", pid=pid)
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
        """Read the state; None, with a log line, if the file is missing or damaged."""
        try:
            text = self._read_own()
            state = json.loads(text) if len(text) <= MAX_BYTES else None
        except FileNotFoundError:
            log.info("no previous state", path=self.path)
            return None
        except (OSError, ValueError, RecursionError) as error:
            log.warning("previous state ignored", path=self.path, reason=error)
            return None
        if not isinstance(state, dict):
            reason = f"not one JSON object of at most {MAX_BYTES} bytes"
            log.warning("previous state ignored", path=self.path, reason=reason)
            return None
        return state

    def _read_own(self) -> bytes:
        with os.fdopen(files.open_regular(self.path), "rb") as file:
            if (owner := os.fstat(file.fileno()).st_uid) != os.geteuid():
                raise OSError(errno.EPERM, f"it belongs to uid {owner}, and not to this user")
            return file.read(MAX_BYTES + 1)

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the file atomically: a reader sees the old state or the new one.

        There is no fsync: no role is resumed from the file (R6), and on a busy disk fsync takes seconds,
        longer than a lease allows.

        Raises:
            OSError: it could not be written (disk full, for example); the old state remains.
            ConfigError: SESSION_IN_USE, the lock file was removed, and another process has claimed the file.
        """
        text = json.dumps(state, allow_nan=False) + "\n"
        new, flags = self._new_path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with self._directory() as directory:
            self._keep_claim(directory)
            with suppress(FileNotFoundError):
                os.unlink(new, dir_fd=directory)
            try:
                with os.fdopen(
                    os.open(new, flags, MODE, dir_fd=directory), "w", encoding="utf-8"
                ) as file:
                    os.fchmod(file.fileno(), MODE)  # whatever the umask is
                    file.write(text)
                os.replace(new, self.path.name, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError:
                with suppress(OSError):
                    os.unlink(new, dir_fd=directory)
                raise

    def close(self) -> None:
        """Release the claim. May be called twice. The file and the lock file stay."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _claim_pid(lock: int) -> str:
    """Process id of the process that made the claim."""
    return os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"


def _is_running(pid: str) -> bool:
    """Whether there is a process with this id, and it is no zombie, as in a container without an init."""
    stat = proctree.read(int(pid)) if pid.isdecimal() else None
    return stat is not None and stat.state not in proctree.ENDED


def in_use(path: Path, pid: object) -> ConfigError:
    """The error for a state file that a live agent uses (then the hint is empty), or the guard of a dead agent."""
    if live := _is_running(str(pid)):
        fault = f"in use by the process with pid {pid}: two agents must not share one session; stop that"
        fault += " one, or give this one another --session-id and --state-file"
    else:
        fault = f"held by the guard of the agent with pid {pid}, which has died: the guard has not demoted"
        fault += f" yet; if it is frozen or hangs, end the process that has {path.name}.lock open"
    error = ConfigError(f"state file {path} is {fault}", exit_code=ExitCode.SESSION_IN_USE)
    error.hint = "" if live else None
    return error


def default_directory() -> Path:
    """The default directory of state files, created if it is missing, and checked.

    The first that applies of $RUNTIME_DIRECTORY (systemd's), $XDG_RUNTIME_DIR/failover-agent,
    /run/failover-agent for root, /tmp/failover-agent-<uid>.

    Raises:
        ConfigError: STATE_FILE, it cannot be created, or others could replace files in it.
    """
    directory, mode = _default()
    if mode is not None:
        _create(directory, mode)
    return directory


def default_directory_path() -> Path:
    """Path of ``default_directory``, whether it exists or not."""
    return _default()[0]


def _default() -> tuple[Path, int | None]:
    """The default directory, and the mode to create it with; None if systemd has created it."""
    if directories := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(directories.split(":")[0]), None  # a link, with DynamicUser
    return _choose(os.environ.get("XDG_RUNTIME_DIR"), os.geteuid())


def _choose(xdg_runtime_dir: str | None, uid: int) -> tuple[Path, int]:
    if xdg_runtime_dir:
        return Path(xdg_runtime_dir, "failover-agent"), PUBLIC_MODE
    if uid == 0:
        return Path("/run/failover-agent"), PUBLIC_MODE
    # not TMPDIR: all processes of this user need the same directory
    return Path(f"/tmp/failover-agent-{uid}"), PRIVATE_MODE  # noqa: S108 - _create() checks the owner


def _create(directory: Path, mode: int) -> None:
    try:
        directory.mkdir(mode, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise ConfigError(
            f"directory {directory} for state files cannot be created ({error.strerror}):"
            " create it, or choose another file by --state-file",
            exit_code=ExitCode.STATE_FILE,
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"directory {directory} for state files is not safe: it must be a directory (not a"
            f" link), owned by uid {os.geteuid()} (its owner is {found.st_uid}) and writable by nobody"
            f" else (its mode is {found.st_mode & 0o7777:04o}); remove it, or use --state-file",
            exit_code=ExitCode.STATE_FILE,
        )
