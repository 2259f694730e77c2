"""Create, lock, check and open the data directory of a coordinator with SQLite.

Owns the files and the error messages about them; knows nothing of groups except their tables. A refused directory
is left as it was: a new database is created whole or not at all, and an existing one is read as plain bytes before
SQLite may change it.

Not promised: safety on a network file system, neither of the database (WAL needs shared memory) nor of the lock
file. Use a local disk.
"""

import errno
import fcntl
import os
import uuid
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from agent.coordinator.store.codec import name_of, upgrade_record
from agent.errors import ExitCode, StoreError
from agent.model import GroupKey
from agent.schema.scalars import format_date_time

DATABASE_NAME = "coordinator.db"
LOCK_NAME = "coordinator.lock"

APPLICATION_ID = 0x464F4147
"""The application id ``FOAG`` in the header of the database file."""

SCHEMA_VERSION = 5
"""Incremented with each change that earlier versions cannot read. 4: sessions have an owner, and progress has a
table of its own; 5: records restrict who may be promoted (R24)."""

OLDEST_SCHEMA = 1
"""The oldest schema that is converted to the current one when the store is opened."""

BUSY_MS = 1_000
"""How long to wait for a lock of SQLite, which only an operator's tool can hold."""

RETIRED = """
CREATE TABLE retired (
    id INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    UNIQUE (tenant, namespace, name)
) STRICT;
"""
"""New in schema 2: the epochs of groups that were deleted."""

IDENTITY = """
CREATE TABLE identity (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    store_id TEXT NOT NULL
) STRICT;
"""
"""New in schema 3: the id of the store, in the only row there is."""

NEW_IDENTITY = "INSERT INTO identity (one, store_id) VALUES (1, ?)"

PROGRESS = """
CREATE TABLE progress (
    group_id INTEGER PRIMARY KEY REFERENCES failover_group (id) ON DELETE CASCADE,
    epoch INTEGER NOT NULL,
    last_data TEXT NOT NULL
) STRICT;
"""
"""New in schema 4: the data-processed time of each group's tenure, which was in the record before."""

MOVED = """
CREATE TABLE IF NOT EXISTS moved (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    moved_to TEXT,
    is_copy INTEGER NOT NULL
) STRICT;
"""
"""The table that a store has if it was the source or the target of a copy."""

UNFINISHED = "a copy that was not finished"
"""The place that a store is marked as moved to while a copy is written into it, so that nobody may serve it."""

RESTORED = "CREATE TABLE IF NOT EXISTS restored (one INTEGER PRIMARY KEY) STRICT"
"""An empty table whose presence means that the store was declared as restored from a copy."""

SCHEMA = f"""
CREATE TABLE failover_group (
    id INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    record TEXT NOT NULL,
    UNIQUE (tenant, namespace, name)
) STRICT;
CREATE TABLE history (
    group_id INTEGER NOT NULL REFERENCES failover_group (id) ON DELETE CASCADE,
    epoch INTEGER NOT NULL,
    entry TEXT NOT NULL,
    PRIMARY KEY (group_id, epoch)
) STRICT;
CREATE TABLE access (
    tenant TEXT NOT NULL,
    namespace TEXT NOT NULL,
    acl TEXT NOT NULL,
    PRIMARY KEY (tenant, namespace)
) STRICT, WITHOUT ROWID;
{RETIRED}
{IDENTITY}
{PROGRESS}
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""

_HEADER_BYTES = 100  # https://www.sqlite.org/fileformat.html#the_database_header
_MAGIC = b"SQLite format 3\0"


@dataclass(frozen=True, slots=True)
class DataDir:
    """A data directory, locked for this process until ``close``."""

    path: Path
    database: apsw.Connection
    lock: int
    store_id: str
    moved_to: str | None = None
    """Where the groups were copied to, so that nobody may serve them here any more; or None."""
    copy_id: int = 0
    """The number of the copy that was made here, which its source also records; 0 once the store has been served."""

    def declare_restored(self) -> None:
        """Record that the store was put back from an older copy. Raises apsw.Error."""
        self.database.execute(RESTORED)

    def is_restored(self) -> bool:
        """Whether ``declare_restored`` is in force. Raises apsw.Error."""
        return self.database.table_exists("main", "restored")

    def trust(self) -> None:
        """Withdraw ``declare_restored``. Raises apsw.Error."""
        self.database.execute("DROP TABLE IF EXISTS restored")

    def close(self) -> None:
        """Close the database and unlock the directory, so that another coordinator may open it."""
        try:
            self.database.close()
        finally:
            os.close(self.lock)


def open_data_dir(directory: Path, *, moved_too: bool = False) -> DataDir:
    """Open ``directory``; create it and its files if they are missing.

    ``moved_too``: open also a moved store, leave a copy marked as one, and mark a new store as an unfinished copy.

    Raises:
        StoreError: the directory cannot be used. The message has the path, the fault and what would be
            right; ``exit_code`` is a code DATA_DIR_*.
    """
    path = directory / DATABASE_NAME
    with ExitStack() as undo:
        try:
            _make_directory(directory)
            _check_header(path)
            lock = _lock(directory / LOCK_NAME)
            undo.callback(os.close, lock)
            if not path.exists():
                _create(path, unfinished_copy=moved_too)
            database = _connect(path)
            undo.callback(database.close)
            store_id = _store_id(database, path)
            moved_to, copy_id = _moved(database)
            if moved_to is not None and not moved_too:
                raise StoreError(
                    f"the store in {directory} was copied to {moved_to}, and must not be served beside the"
                    " copy: serve that one, or copy it back with 'failover-agent store copy'",
                    exit_code=ExitCode.STORE_MOVED,
                )
            if copy_id and not moved_too:
                database.execute("DELETE FROM moved")
        except (OSError, apsw.Error) as error:
            raise explain(error, directory) from error
        undo.pop_all()
    return DataDir(path, database, lock, store_id, moved_to, copy_id)


def explain(error: OSError | apsw.Error, directory: Path) -> StoreError:
    """Build the StoreError for an error of the system or of SQLite."""
    match error:
        case (
            OSError(errno=errno.EROFS | errno.EACCES | errno.EPERM)
            | apsw.ReadOnlyError()
            | apsw.PermissionsError()
        ):
            code = ExitCode.DATA_DIR_READ_ONLY
            wrong = "cannot be written"
            right = f"make it writable for user id {os.geteuid()}, or name another directory"
        case _ if _is_full(error):
            code = ExitCode.DATA_DIR_FULL
            wrong = "is on a disk that is full"
            right = "free some space on it"
        case apsw.BusyError() | apsw.LockedError():
            code = ExitCode.DATA_DIR_LOCKED
            wrong = f"has a {DATABASE_NAME} that another program is writing to"
            right = "end that program"
        case OSError(errno=errno.ENOTDIR | errno.EEXIST):
            code = ExitCode.DATA_DIR_DAMAGED
            wrong = "is not a directory"
            right = "name a directory, or one that does not exist yet"
        case _:
            code = ExitCode.DATA_DIR_DAMAGED
            wrong = "cannot be used"
            right = "check the disk, restore the directory from a copy, or name another one"
    return StoreError(
        f"data directory {directory} {wrong}: {right} ({error}); nothing was changed",
        exit_code=code,
    )


def _is_full(error: OSError | apsw.Error) -> bool:
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    no_room_for_shm = getattr(error, "extendedresult", None) == apsw.SQLITE_IOERR_SHMSIZE
    return isinstance(error, apsw.FullError) or no_room_for_shm


def _make_directory(directory: Path) -> None:
    if not directory.is_dir():
        directory.mkdir(mode=0o700, parents=True)
        _sync_directory(directory.parent)


def _sync_directory(directory: Path) -> None:
    """Sync the directory, so that the names of its files are durable, too."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damaged(path: Path, wrong: str, right: str) -> StoreError:
    return StoreError(f"{path} {wrong}: {right}; nothing was changed")


def _check_header(path: Path) -> None:
    """Refuse a file that is not a store, before SQLite opens it or a lock file is created."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except FileNotFoundError:
        return
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise _damaged(
            path,
            "is not an SQLite database",
            "restore it from a copy, or name another data directory",
        )
    _check_identity(
        path,
        application=int.from_bytes(header[68:72], "big"),
        version=int.from_bytes(header[60:64], "big"),
    )


def _check_identity(path: Path, *, application: int, version: int) -> None:
    if application != APPLICATION_ID:
        raise _damaged(
            path,
            f"belongs to another program: its application id is {application:#x},"
            f" not {APPLICATION_ID:#x}",
            "name another data directory",
        )
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer version of this program: its schema is {version}, and"
            f" this version knows schemas up to {SCHEMA_VERSION}: install that version again, or"
            " restore a copy from before; nothing was changed",
            exit_code=ExitCode.DATA_DIR_NEWER,
        )
    if version < OLDEST_SCHEMA:
        raise _damaged(
            path,
            f"has schema {version}, which no version ever wrote",
            "restore it from a copy",
        )


def _lock(path: Path) -> int:
    """Lock the lock file while its descriptor is open; the kernel closes it when the process ends.

    The file is never unlinked: two coordinators could then lock two files of the same name.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
            raise StoreError(
                f"data directory {path.parent} is in use by another coordinator, process {holder}"
                f" (it holds {path.name}): stop that one, or name another directory;"
                " nothing was changed",
                exit_code=ExitCode.DATA_DIR_LOCKED,
            ) from error
        os.ftruncate(lock, os.pwrite(lock, f"{os.getpid()}\n".encode(), 0))
    except BaseException:
        os.close(lock)
        raise
    return lock


def _create(path: Path, *, unfinished_copy: bool) -> None:
    """Create an empty database at ``path``, complete and durable, by one rename."""
    for suffix in ("-wal", "-journal"):
        rest = path.with_name(path.name + suffix)
        if rest.exists():  # SQLite would apply it to the new database
            raise _damaged(
                rest,
                f"exists without its {path.name}",
                "restore both from a copy, or move it away to start empty",
            )
    with closing(apsw.Connection(":memory:")) as empty:
        empty.execute(SCHEMA)
        empty.execute(NEW_IDENTITY, (str(uuid.uuid4()),))
        if unfinished_copy:
            mark(empty, moved_to=UNFINISHED, copy_id=1)
        content = empty.serialize("main")
    unfinished = path.with_name(path.name + ".new")  # may be left by a process that died here
    try:
        with open(unfinished, "wb", opener=_private) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        with suppress(OSError):  # the first error is the one to report
            unfinished.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _connect(path: Path) -> apsw.Connection:
    """Open the database, check all of it, and prove by a commit that it can be written."""
    database = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    with ExitStack() as undo:
        undo.callback(database.close)
        if path.with_name(path.name + "-wal").exists():
            # closing must not write the WAL into the database before it is known to be an intact store
            database.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        database.set_busy_timeout(BUSY_MS)
        version = database.pragma("user_version")
        _check_identity(path, application=database.pragma("application_id"), version=version)
        if database.readonly("main"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        fault = database.pragma("quick_check", 1)
        if fault != "ok":
            raise _damaged(path, f"is damaged ({fault})", "restore it from a copy")
        tables = "failover_group, history, access"
        tables += ", retired" if version >= 2 else ""  # noqa: PLR2004 - a schema's number
        database.execute(f"SELECT 1 FROM {tables} LIMIT 0")  # noqa: S608 - our own names; it fails if one is missing
        if version >= 3:  # noqa: PLR2004 - a schema's number
            _store_id(database, path)
        if version >= 4:  # noqa: PLR2004 - a schema's number
            database.execute("SELECT 1 FROM progress LIMIT 0")
        database.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
        if database.pragma("journal_mode", "wal") != "wal":
            raise _damaged(
                path, "is on a file system without shared memory", "use a directory on a local disk"
            )
        database.pragma("synchronous", "full")
        database.pragma("foreign_keys", value=True)
        with database:
            _upgrade(database, path, version)
        undo.pop_all()
    return database


def _upgrade(database: apsw.Connection, path: Path, version: int) -> None:
    """Convert a database of an older schema to this one, in the caller's transaction."""
    if version < 2:  # noqa: PLR2004 - a schema's number
        database.execute(RETIRED)
    if version < 3:  # noqa: PLR2004 - a schema's number
        database.execute(IDENTITY)
        database.execute(NEW_IDENTITY, (str(uuid.uuid4()),))
    if version < 4:  # noqa: PLR2004 - a schema's number
        database.execute(PROGRESS)
    if version < 5:  # noqa: PLR2004 - a schema's number
        _upgrade_records(database, path)
    database.pragma("user_version", SCHEMA_VERSION)


def _upgrade_records(database: apsw.Connection, path: Path) -> None:
    """Convert the records of schemas 1 to 4 to schema 5."""
    rows: list[Any] = database.execute(
        "SELECT id, tenant, namespace, name, record FROM failover_group"
    ).fetchall()
    for group, *key, text in rows:
        upgraded, progress = upgrade_record(text, f"{name_of(GroupKey(*key))} in {path}")
        database.execute("UPDATE failover_group SET record = ? WHERE id = ?", (upgraded, group))
        if progress is not None:
            database.execute(
                "INSERT INTO progress (group_id, epoch, last_data) VALUES (?, ?, ?)",
                (group, progress.epoch, format_date_time(progress.last_data)),
            )


def mark(database: apsw.Connection, *, moved_to: str | None, copy_id: int) -> None:
    """Record whether the store was moved, or is a copy, as a DataDir has it. Raises apsw.Error."""
    database.execute(MOVED)
    database.execute(
        "INSERT OR REPLACE INTO moved (one, moved_to, is_copy) VALUES (1, ?, ?)",
        (moved_to, copy_id),
    )


def _moved(database: apsw.Connection) -> tuple[str | None, int]:
    """``moved_to`` and ``copy_id`` of a DataDir."""
    if not database.table_exists("main", "moved"):
        return None, 0
    found: tuple[str | None, int] | None = database.execute(
        "SELECT moved_to, is_copy FROM moved"
    ).get
    return found or (None, 0)


def _store_id(database: apsw.Connection, path: Path) -> str:
    found: str | None = database.execute("SELECT store_id FROM identity").get
    if not found:
        raise _damaged(path, "has no store id", "restore it from a copy")
    return found
