"""A data directory that cannot be used is refused with a sentence, and left as it is."""

import json
import os
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import apsw
import pytest

from agent.coordinator.store import Stored
from agent.coordinator.store.data_dir import SCHEMA_VERSION, open_data_dir
from agent.coordinator.store.memory import MemoryStore
from agent.coordinator.store.sqlite import SqliteStore
from agent.errors import ExitCode, StoreError
from agent.model import GroupKey, HistoryEntry, Progress, SessionConfig, Tenure

from .conftest import MakeRecord

DATABASE = "coordinator.db"
TENURE_BEGAN = datetime(2024, 5, 6, 7, 8, 9, 123456, UTC)


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file with its content, but for SQLite's shared memory and an empty WAL."""
    files = {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    return {
        name: content
        for name, content in files.items()
        if not name.endswith("-shm") and (content or not name.endswith("-wal"))
    }


def refused(directory: Path) -> StoreError:
    """The refusal to open ``directory``, which changed nothing and holds nothing."""
    before = snapshot(directory)
    with pytest.raises(StoreError) as error:
        SqliteStore.open(directory)
    assert snapshot(directory) == before
    assert str(directory) in str(error.value)
    assert "nothing was changed" in str(error.value)
    return error.value


@pytest.fixture
async def used(tmp_path: Path, key: GroupKey, make_record: MakeRecord) -> Path:
    """A data directory with a group, left by a coordinator that was stopped."""
    directory = tmp_path / "data"
    store = SqliteStore.open(directory)
    version = await store.create(key, make_record(1))
    await store.swap(key, version, make_record(2))
    await store.close()
    return directory


Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a small file system in memory, with the options that it is given."""
    point = tmp_path / "disk"
    point.mkdir()
    mounted = False

    def make(options: str) -> Path:
        nonlocal mounted
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("needs: the mount command")
        if done.returncode != 0:
            pytest.skip(f"needs: the right to mount a tmpfs ({done.stderr.splitlines()[0]})")
        mounted = True
        return point

    yield make
    if mounted:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes every byte that is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    assert os.statvfs(disk).f_bavail == 0
    return ballast


def hold(directory: Path) -> subprocess.Popen[str]:
    """Another process that holds ``directory`` until it is killed."""
    program = (
        "import sys, pathlib; from agent.coordinator.store.data_dir import open_data_dir;"
        "held = open_data_dir(pathlib.Path(sys.argv[1])); print('held', flush=True);"
        "sys.stdin.read()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(directory)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def remount_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


async def test_a_missing_directory_is_made_for_its_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "var" / "lib" / "failover"
    store = SqliteStore.open(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    await store.close()
    assert modes.keys() >= {DATABASE, "coordinator.lock"}
    assert set(modes.values()) == {0o600}


async def test_what_was_kept_is_there_after_reopening(
    used: Path, key: GroupKey, make_record: MakeRecord
) -> None:
    store = SqliteStore.open(used)
    assert [stored.record for stored in (await store.load()).values()] == [make_record(2)]
    await store.close()


async def test_a_database_is_made_as_durable_as_the_settings_go(used: Path) -> None:
    opened = open_data_dir(used)
    pragmas = {
        name: opened.database.pragma(name)
        for name in ("journal_mode", "synchronous", "foreign_keys")
    }
    opened.close()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


async def test_a_second_coordinator_is_refused_until_the_first_has_closed(
    used: Path, key: GroupKey, make_record: MakeRecord
) -> None:
    first = SqliteStore.open(used)
    error = refused(used)
    assert error.exit_code is ExitCode.DATA_DIR_LOCKED
    assert f"process {os.getpid()} " in str(error)
    version = await first.create(key._replace(group="other"), make_record(1))
    await first.close()
    second = SqliteStore.open(used)
    assert (await second.load())[key._replace(group="other")] == Stored(version, make_record(1))
    await second.close()


async def test_the_lock_of_another_process_names_it_and_ends_with_its_death(used: Path) -> None:
    with hold(used) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            error = refused(used)
            assert error.exit_code is ExitCode.DATA_DIR_LOCKED
            assert f"process {holder.pid} " in str(error)
        finally:
            holder.kill()
    await SqliteStore.open(used).close()


def edit(path: Path, statement: str, *, fold_wal: bool = True) -> None:
    """What another program, or another version, does to a database."""
    database = apsw.Connection(str(path))
    database.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, int(not fold_wal))
    database.execute(statement)
    database.close()


OLDER_SCHEMAS = (
    "DROP TABLE progress; DROP TABLE identity; DROP TABLE retired; PRAGMA user_version = 1",
    "DROP TABLE progress; DROP TABLE identity; PRAGMA user_version = 2",
    "DROP TABLE progress; PRAGMA user_version = 3",
    "PRAGMA user_version = 4",
)


@pytest.mark.parametrize("statements", OLDER_SCHEMAS, ids=[1, 2, 3, 4])
async def test_an_older_schema_is_brought_up_to_date_with_all_that_it_has(
    used: Path, key: GroupKey, make_record: MakeRecord, statements: str
) -> None:
    edit(used / DATABASE, statements)
    ids = set()
    for _ in range(2):
        store = SqliteStore.open(used)
        ids.add(store.store_id)
        (stored,) = (await store.load()).values()
        assert stored.record == make_record(2)
        assert await store.retired_epoch(key) == 0
        await store.close()
    store = SqliteStore.open(used)
    await store.delete(key, stored.version, 7)
    await store.close()
    store = SqliteStore.open(used)
    assert await store.retired_epoch(key) == 7
    assert len(ids | {store.store_id}) == 1
    await store.close()


OLD_RECORD = """{"config":{"id":"pumps","timeout_ticks":20000000,"name":null,"description":null,
"additional":{"Site":["a",1,null,0.5,123456789012345678901234567890,"\\u0000é"]}},"sessions":{
"a":{"config":{"id":"a","name":"A","additional":{"x":{}}},"override":"Off","override_until":null,
"override_order":0,"hold_off":null,"has_to_see":null},
"b":{"config":{"id":"b","name":null,"additional":null},"override":"Off","override_until":null,
"override_order":0,"hold_off":null,"has_to_see":null}},
"holder":{"session_id":"a","epoch":7,"since":"2024-05-06T07:08:09.123456Z","why":"chosen",
"instance":"i1","revoked":false,"last_data":%s},"pending":null,"epoch":7,"revision":9,
"previous":"b","last_data":"2024-05-06T07:00:00Z","acl":null,"quiet":false,
"ended":{"session_id":"b","epoch":6,"since":"2024-05-06T07:08:09.123456Z","why":"chosen",
"instance":null,"revoked":false,"last_data":"2024-05-06T07:00:00Z"}}"""
"""As schema 3 kept it."""


@pytest.mark.parametrize(
    ("last_data", "progress"),
    [
        ('"2024-05-06T07:08:10.5Z"', Progress(7, datetime(2024, 5, 6, 7, 8, 10, 500_000, UTC))),
        ("null", None),
    ],
)
async def test_a_record_of_schema_3_keeps_its_progress_and_its_additional_data(
    used: Path, key: GroupKey, last_data: str, progress: Progress | None
) -> None:
    edit(used / DATABASE, OLDER_SCHEMAS[2])
    text = (OLD_RECORD % last_data).replace("'", "''")
    edit(used / DATABASE, f"UPDATE failover_group SET record = '{text}'")
    for _ in range(2):
        store = SqliteStore.open(used)
        stored = (await store.load())[key]
        await store.close()
        record = stored.record
        assert stored.progress == progress
        assert record.holder == Tenure("a", 7, TENURE_BEGAN, "chosen", "i1")
        assert (record.cleared, record.used, record.offered) == (6, None, None)
        assert record.ended == Tenure("b", 6, TENURE_BEGAN, "chosen")
        assert json.loads(record.config.additional or "") == {
            "Site": ["a", 1, None, 0.5, 123456789012345678901234567890, "\0é"]
        }
        assert record.sessions["a"].config == SessionConfig("a", "A", '{"x":{}}')
        assert record.sessions["b"].config == SessionConfig("b")


async def test_a_damaged_record_of_schema_3_is_named_and_nothing_is_changed(used: Path) -> None:
    edit(used / DATABASE, f"{OLDER_SCHEMAS[2]}; UPDATE failover_group SET record = '[1]'")
    error = refused(used)
    assert error.exit_code is ExitCode.DATA_DIR_DAMAGED
    assert "group 'pumps'" in str(error)


@pytest.mark.parametrize(
    ("changed", "cleared"), [("'$.holder.why', 'x'", 1), ("'$.holder', null", 2)]
)
async def test_a_record_of_schema_4_has_all_but_the_tenure_under_way_cleared(
    used: Path, changed: str, cleared: int
) -> None:
    """R24: there was no failsafe, so each former tenure has ended with its lease."""
    failsafe = "'$.cleared', '$.used', '$.offered', '$.set_revision', '$.ended_at'"
    edit(
        used / DATABASE,
        f"UPDATE failover_group SET record = json_set(json_remove(record, {failsafe}), {changed});"
        " PRAGMA user_version = 4",
    )
    store = SqliteStore.open(used)
    ((_, stored),) = (await store.load()).items()
    await store.close()
    record = stored.record
    assert (record.epoch, record.cleared, record.used, record.ended_at) == (2, cleared, None, None)


async def test_sessions_of_older_schemas_have_no_owner(used: Path, make_record: MakeRecord) -> None:
    """Schema 3 has no owner in its records; schema 4 keeps one."""
    edit(
        used / DATABASE,
        "UPDATE failover_group SET record = json_remove(record, '$.sessions.a.owner',"
        " '$.sessions.b.owner'); DROP TABLE progress; PRAGMA user_version = 3",
    )
    store = SqliteStore.open(used)
    (stored,) = (await store.load()).values()
    await store.close()
    assert {one.owner for one in stored.record.sessions.values()} == {None}
    sessions = {name: replace(one, owner=None) for name, one in make_record(2).sessions.items()}
    assert stored.record == replace(make_record(2), sessions=sessions)


async def test_each_data_directory_has_an_id_of_its_own_for_ever(
    used: Path, tmp_path: Path
) -> None:
    """Fault 9: by it an agent knows one coordinator's data from another's."""
    ids = []
    for directory in (used, used, tmp_path / "other"):
        store = SqliteStore.open(directory)
        ids.append(uuid.UUID(store.store_id))
        await store.close()
    assert ids[0] == ids[1] != ids[2]
    assert MemoryStore().store_id != MemoryStore().store_id


async def test_a_database_that_lost_its_id_is_refused(used: Path) -> None:
    edit(used / DATABASE, "DELETE FROM identity")
    error = refused(used)
    assert error.exit_code is ExitCode.DATA_DIR_DAMAGED
    assert "has no store id" in str(error)


async def test_a_schema_that_no_version_wrote_is_refused(used: Path) -> None:
    edit(used / DATABASE, "PRAGMA user_version = 0")
    assert refused(used).exit_code is ExitCode.DATA_DIR_DAMAGED


@pytest.mark.parametrize("fold_wal", [True, False], ids=["in the file", "in the WAL only"])
async def test_a_newer_schema_is_refused(used: Path, fold_wal: bool) -> None:  # noqa: FBT001 - a parameter
    edit(used / DATABASE, f"PRAGMA user_version = {SCHEMA_VERSION + 1}", fold_wal=fold_wal)
    assert (used / f"{DATABASE}-wal").exists() is not fold_wal
    error = refused(used)
    assert error.exit_code is ExitCode.DATA_DIR_NEWER
    assert f"schema is {SCHEMA_VERSION + 1}" in str(error)
    assert "newer version" in str(error)


async def test_the_database_of_another_program_is_refused_without_a_lock_file(
    tmp_path: Path,
) -> None:
    edit(tmp_path / DATABASE, "CREATE TABLE theirs (x)")
    error = refused(tmp_path)
    assert error.exit_code is ExitCode.DATA_DIR_DAMAGED
    assert "belongs to another program" in str(error)
    assert os.listdir(tmp_path) == [DATABASE]  # noqa: PTH208 - names are enough


@pytest.mark.parametrize("content", [b"", b"SQLite", b"hello " * 100], ids=["empty", "cut", "text"])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / DATABASE).write_bytes(content)
    error = refused(tmp_path)
    assert error.exit_code is ExitCode.DATA_DIR_DAMAGED
    assert "is not an SQLite database" in str(error)


async def test_a_database_with_a_spoilt_page_is_refused(used: Path) -> None:
    with (used / DATABASE).open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 4096)
    assert refused(used).exit_code is ExitCode.DATA_DIR_DAMAGED


async def test_a_database_that_was_cut_short_is_refused(used: Path) -> None:
    os.truncate(used / DATABASE, 4096 * 2)
    assert refused(used).exit_code is ExitCode.DATA_DIR_DAMAGED


async def test_a_database_without_its_tables_is_refused(used: Path) -> None:
    edit(used / DATABASE, "ALTER TABLE failover_group RENAME TO gone")
    error = refused(used)
    assert error.exit_code is ExitCode.DATA_DIR_DAMAGED
    assert "no such table" in str(error)


async def test_a_wal_without_its_database_is_refused_rather_than_replayed_into_a_new_one(
    used: Path,
) -> None:
    edit(used / DATABASE, "DELETE FROM failover_group", fold_wal=False)
    (used / DATABASE).unlink()
    error = refused(used)
    assert error.exit_code is ExitCode.DATA_DIR_DAMAGED
    assert "exists without its coordinator.db" in str(error)


def test_a_file_where_the_directory_should_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("mine")
    error = refused(path)
    assert "is not a directory" in str(error)
    assert refused(path / "below").exit_code is ExitCode.DATA_DIR_DAMAGED
    assert path.read_text() == "mine"


async def test_a_refusal_leaves_no_lock_and_no_descriptor_behind(used: Path) -> None:
    healthy = (used / DATABASE).read_bytes()
    os.truncate(used / DATABASE, 4096 * 2)
    refused(used)
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough
    refused(used)
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208 - as above
    (used / DATABASE).write_bytes(healthy)
    await SqliteStore.open(used).close()


@pytest.mark.parametrize("state", ["no directory", "empty", "used"])
async def test_a_read_only_directory_is_refused(
    state: str, tmp_path: Path, mount: Mount, request: pytest.FixtureRequest
) -> None:
    """By a mount for root, whom permission bits do not stop, and by those bits for others."""
    disk = mount("size=1m") if os.geteuid() == 0 else tmp_path / "disk"
    directory = disk / "data"
    if state == "empty":
        directory.mkdir()
    elif state == "used":
        await SqliteStore.open(directory).close()
    if os.geteuid() == 0:
        remount_read_only(disk)
    else:
        closed = directory if directory.exists() else disk
        paths = [*closed.iterdir(), closed]
        for path in paths:
            path.chmod(0o500 if path.is_dir() else 0o400)
        request.addfinalizer(lambda: closed.chmod(0o700))
    error = refused(directory)
    assert error.exit_code is ExitCode.DATA_DIR_READ_ONLY
    assert "cannot be written" in str(error)


@pytest.mark.parametrize("room", [0, 4096, 8192, 28672])
@pytest.mark.parametrize("state", ["no directory", "empty", "used"])
async def test_a_full_disk_is_refused_wherever_the_room_ends(
    state: str, room: int, mount: Mount
) -> None:
    disk = mount("size=1m")
    directory = disk / "data"
    if state == "empty":
        directory.mkdir()
    elif state == "used":
        await SqliteStore.open(directory).close()
    ballast = fill(disk)
    os.truncate(ballast, ballast.stat().st_size - room)
    with pytest.raises(StoreError) as refusal:
        SqliteStore.open(directory)
    assert not list(directory.glob("*.new"))
    assert refusal.value.exit_code is ExitCode.DATA_DIR_FULL
    assert str(directory) in str(refusal.value)
    assert "free some space" in str(refusal.value)
    ballast.unlink()
    await SqliteStore.open(directory).close()


async def test_a_full_disk_changes_no_byte_of_what_is_kept(mount: Mount) -> None:
    disk = mount("size=1m")
    await SqliteStore.open(disk / "data").close()
    fill(disk)
    assert refused(disk / "data").exit_code is ExitCode.DATA_DIR_FULL


async def test_a_disk_that_fills_up_fails_its_calls_and_the_store_works_again_after(
    mount: Mount, key: GroupKey, make_record: MakeRecord, tmp_path: Path
) -> None:
    disk = mount("size=1m")
    store = SqliteStore.open(disk / "data")
    version, epoch = await store.create(key, make_record(0)), 0
    ballast = fill(disk)
    failures = 0
    while failures < 3:  # the WAL may have room left for the first ones
        tenure = HistoryEntry(epoch + 1, "a", make_record(0).last_data, "x" * 20_000)  # type: ignore[arg-type]
        try:
            version = await store.swap(key, version, make_record(epoch + 1), [tenure])
        except StoreError as error:
            assert error.exit_code is ExitCode.DATA_DIR_FULL  # noqa: PT017 - some calls succeed
            failures += 1
        else:
            epoch += 1
    kept = {key: Stored(version, make_record(epoch))}
    assert await store.load() == kept
    crash = tmp_path / "crash"
    crash.mkdir()
    for path in (disk / "data").iterdir():
        (crash / path.name).write_bytes(path.read_bytes())
    ballast.unlink()

    version = await store.swap(key, version, make_record(epoch + 7))
    assert await store.load() == {key: Stored(version, make_record(epoch + 7))}
    await store.close()
    for directory, expected in (
        (crash, kept),
        (disk / "data", {key: Stored(version, make_record(epoch + 7))}),
    ):
        reopened = SqliteStore.open(directory)
        assert await reopened.load() == expected
        assert (await reopened.history(key))[0] == epoch
        await reopened.close()
