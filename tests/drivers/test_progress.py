"""Where the data-processed time comes from: real sockets, files, commands, exporters and brokers."""
# ruff: noqa: ASYNC220, ASYNC221, ASYNC240 - what blocks here takes microseconds, beside what is tested

import asyncio
import gc
import ipaddress
import json
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from agent import files
from agent.drivers.progress import (
    Plausible,
    Progress,
    Reason,
    Refused,
    file,
    read_time,
    unix_socket,
)
from agent.drivers.progress.mqtt import MqttProgress, Subscriber
from agent.drivers.progress.times import LONGEST_REASON, LONGEST_TEXT, read_text
from agent.drivers.progress.unix_socket import LONGEST_LINE, MOST_CONNECTIONS
from agent.errors import ConfigError, ExitCode
from agent.ops import mqtt
from agent.ops.clock import Clock
from agent.schema.kinds import PROGRESS
from agent.schema.read import validate
from tests.this_process import descriptors, threads

LIMIT_S = 60
"""Time limit of steps that take milliseconds on a quiet machine."""

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
FIRST = NOW - timedelta(minutes=2)
SECOND = NOW - timedelta(minutes=1)
AHEAD = NOW + timedelta(seconds=6)


def iso(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.005)


@dataclass
class Source:
    """A source that runs, and the times that it told."""

    progress: Progress
    times: list[datetime] = field(default_factory=list)

    async def tells(self, time: datetime) -> None:
        await until(lambda: self.times and self.times[-1] == time)

    async def refuses(self, reason: Reason, times: int = 1) -> str:
        await until(lambda: self.progress.refused[reason.value] >= times)
        return str(self.progress.last_error)


def made(kind: str, **keys: Any) -> Source:
    times: list[datetime] = []
    table = {"type": kind, **keys}
    if kind not in {"socket", "mqtt"}:
        table = {"interval": 0.05, "limit": LIMIT_S, **table}
    settings = validate(PROGRESS.load(kind), table)
    clock = Clock(wall=lambda: NOW)
    return Source(Progress(settings, clock, times.append), times)


@asynccontextmanager
async def running(kind: str, **keys: Any) -> AsyncIterator[Source]:
    source = made(kind, **keys)
    await source.progress.start()
    try:
        yield source
    finally:
        async with asyncio.timeout(LIMIT_S):
            await source.progress.stop()


# --- what a time may look like


@given(st.integers(100_000_000, 253_402_300_799))
def test_whole_seconds_are_read_alike_as_a_number_and_as_text(seconds: int) -> None:
    time = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    assert read_time(seconds) == read_time(f" {seconds}\n") == read_time(iso(time)) == time


@given(st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none()))
def test_whatever_comes_is_a_time_in_utc_or_is_refused_in_one_bounded_sentence(value: Any) -> None:
    try:
        assert read_time(value).utcoffset() == timedelta(0)
    except Refused as refused:
        assert len(str(refused)) <= LONGEST_REASON  # noqa: PT017 - either outcome is right


def test_parts_of_a_second_are_kept() -> None:
    assert read_time(1_700_000_000.25) == datetime(2023, 11, 14, 22, 13, 20, 250_000, UTC)
    assert read_time("1.70000000025E9").microsecond == 250_000


@pytest.mark.parametrize(
    ("value", "reason", "says"),
    [
        (1_769_860_800_000, Reason.NOT_A_TIME, "milliseconds"),
        ("1769860800000", Reason.NOT_A_TIME, "milliseconds"),
        (17, Reason.NOT_A_TIME, "an age or a count"),
        ("20260131", Reason.NOT_A_TIME, "an age or a count"),
        (-1_700_000_000, Reason.NOT_A_TIME, "seconds since 1970"),
        (float("nan"), Reason.NOT_A_TIME, "nan"),
        (float("inf"), Reason.NOT_A_TIME, "inf"),
        (10**4000, Reason.NOT_A_TIME, "milliseconds"),
        ("1e999", Reason.NOT_A_TIME, "inf"),
        (True, Reason.NOT_A_TIME, "True"),
        ({"a": 1}, Reason.NOT_A_TIME, "{'a': 1}"),
        ("yesterday", Reason.NOT_A_TIME, "ISO 8601"),
        ("", Reason.NOT_A_TIME, "ISO 8601"),
        (0, Reason.NEVER, "nothing was processed"),
        ("0.0", Reason.NEVER, "nothing was processed"),
        ("0001-01-01T00:00:00", Reason.NEVER, "nothing was processed"),
    ],
)
def test_a_value_that_is_no_time_is_refused_with_the_accepted_forms(
    value: object, reason: Reason, says: str
) -> None:
    with pytest.raises(Refused, match=says) as caught:
        read_time(value)
    assert caught.value.reason is reason


def test_a_time_may_be_ahead_by_the_bound_and_no_more() -> None:
    plausible = Plausible(5)
    at_bound = NOW + timedelta(seconds=5)
    assert plausible.check(at_bound, NOW) == at_bound
    with pytest.raises(Refused, match=r"5\.00\d* s ahead.*may be 5 s") as caught:
        plausible.check(at_bound + timedelta(milliseconds=1), NOW)
    assert caught.value.reason is Reason.FUTURE


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"a": {"b.": 1, "b": iso(FIRST)}}, "a.b"),
        ({"a": [{"t": 0}, {"t": FIRST.timestamp()}]}, "a.1.t"),
        ([str(int(FIRST.timestamp()))], "0"),
    ],
)
def test_a_key_leads_through_objects_and_lists(data: Any, key: str) -> None:
    assert read_text(json.dumps(data).encode(), key) == FIRST


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": {}}', "no a.b: there is no b"),
        (b'{"a": [1]}', "no a.b"),
        (b'{"a": {"b": null}}', "None is not a time"),
        (b'{"a": {"b": true}}', "True is not a time"),
        (b"[" * 10_000, "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not text"),
    ],
)
def test_json_without_a_time_at_the_key_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(Refused, match=says) as caught:
        read_text(data, "a.b")
    assert caught.value.reason is Reason.NOT_A_TIME


def test_a_text_above_the_bound_is_refused_unread() -> None:
    with pytest.raises(Refused) as caught:
        read_text(b" " * (LONGEST_TEXT + 1))
    assert caught.value.reason is Reason.TOO_LONG


# --- a socket


@pytest.fixture
def short(tmp_path: Path) -> Path:
    return tmp_path / "s"


def connected(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, kind)
    client.connect(str(path))
    return client


async def test_each_line_of_each_connection_is_a_time(short: Path) -> None:
    async with running("socket", path=str(short)) as source:
        with connected(short) as one, connected(short) as two:
            one.sendall(iso(FIRST).encode() + b"\n\n")
            await source.tells(FIRST)
            two.sendall(str(SECOND.timestamp()).encode() + b"\r\n")
            await source.tells(SECOND)
            one.sendall(iso(FIRST).encode()[:10])
            two.sendall(b"noise\n")
            await source.refuses(Reason.NOT_A_TIME)
            one.sendall(iso(FIRST).encode()[10:] + b"\n")
            await source.tells(FIRST)
    assert source.times == [FIRST, SECOND, FIRST]


async def test_a_last_line_without_an_end_counts_when_the_stream_ends(short: Path) -> None:
    async with running("socket", path=str(short)) as source:
        with connected(short) as client:
            client.sendall(iso(FIRST).encode())
        await source.tells(FIRST)


async def test_a_line_that_is_too_long_is_refused_once_and_the_next_one_is_read(
    short: Path,
) -> None:
    async with running("socket", path=str(short)) as source:
        with connected(short) as client:
            for _ in range(10):
                client.sendall(b"1" * LONGEST_LINE)
                await asyncio.sleep(0)
            await source.refuses(Reason.TOO_LONG)
            client.sendall(b"1\n" + iso(FIRST).encode() + b"\n")
            await source.tells(FIRST)
    assert source.progress.refused["too_long"] == 1
    assert source.progress.refused["not_a_time"] == 0


async def test_of_a_flood_the_newest_line_is_taken(short: Path) -> None:
    async with running("socket", path=str(short)) as source:
        flood = b"".join(b"%d\n" % (FIRST.timestamp() - n) for n in range(100_000, -1, -1))
        with connected(short) as client:
            await asyncio.to_thread(client.sendall, flood)
            await source.tells(FIRST)


async def test_each_datagram_is_a_time(short: Path) -> None:
    async with running("socket", path=str(short), datagram=True) as source:
        with connected(short, socket.SOCK_DGRAM) as client:
            client.send(iso(FIRST).encode())
            await source.tells(FIRST)
            client.send(b"")
            await source.refuses(Reason.NOT_A_TIME)
            client.send(b"1" * (LONGEST_LINE + 1))
            await source.refuses(Reason.TOO_LONG)
            client.send(iso(SECOND).encode() + b"\n")
            await source.tells(SECOND)


@pytest.mark.parametrize("mode", ["0660", "0600", "622"])
async def test_the_socket_has_its_mode_whatever_the_umask(short: Path, mode: str) -> None:
    before = os.umask(0o077)
    try:
        async with running("socket", path=str(short), mode=mode):
            assert stat.S_IMODE(short.stat().st_mode) == int(mode, 8)
    finally:
        os.umask(before)


@pytest.mark.parametrize("datagram", [False, True])
@pytest.mark.parametrize("stale", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
async def test_the_socket_of_a_dead_agent_is_replaced(
    short: Path, stale: int, *, datagram: bool
) -> None:
    with socket.socket(socket.AF_UNIX, stale) as dead:
        dead.bind(str(short))
    async with running("socket", path=str(short), datagram=datagram) as source:
        with connected(short, socket.SOCK_DGRAM if datagram else socket.SOCK_STREAM) as client:
            client.send(iso(FIRST).encode() + b"\n")
            await source.tells(FIRST)
    assert not short.exists()


@pytest.mark.parametrize("datagram", [False, True])
@pytest.mark.parametrize("other", [False, True])
async def test_a_socket_that_somebody_has_is_refused_and_left_alone(
    short: Path, *, datagram: bool, other: bool
) -> None:
    async with running("socket", path=str(short), datagram=datagram) as source:
        second = made("socket", path=str(short), datagram=other)
        with pytest.raises(ConfigError, match="a process listens there") as caught:
            await second.progress.start()
        assert caught.value.exit_code is ExitCode.LISTEN
        await second.progress.stop()
        with connected(short, socket.SOCK_DGRAM if datagram else socket.SOCK_STREAM) as client:
            client.send(iso(FIRST).encode() + b"\n")
            await source.tells(FIRST)


async def test_what_is_no_socket_is_not_replaced(short: Path) -> None:
    short.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        await made("socket", path=str(short)).progress.start()
    assert short.read_text() == "precious"


async def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no" / "s"
    with pytest.raises(ConfigError, match=f"{path} cannot be made .No such file") as caught:
        await made("socket", path=str(path)).progress.start()
    assert caught.value.exit_code is ExitCode.LISTEN


async def test_a_stop_leaves_a_successors_socket_alone_and_closes_connections(short: Path) -> None:
    async with running("socket", path=str(short)) as source:
        client = connected(short)
        client.sendall(iso(FIRST).encode() + b"\n")
        await source.tells(FIRST)
        short.unlink()
        successor = socket.socket(socket.AF_UNIX)
        successor.bind(str(short))
    assert short.exists()
    client.settimeout(LIMIT_S)
    assert await asyncio.to_thread(client.recv, 1) == b""
    client.close()
    successor.close()


async def test_connections_are_bounded_and_a_closed_one_makes_room(short: Path) -> None:
    async with running("socket", path=str(short)) as source:
        before = descriptors()
        clients = [connected(short) for _ in range(MOST_CONNECTIONS)]
        for client in clients:
            client.sendall(iso(FIRST).encode() + b"\n")
        await until(lambda: len(source.times) == MOST_CONNECTIONS)
        with connected(short):
            await source.refuses(Reason.UNREADABLE)
        for client in clients:
            client.close()
        await until(lambda: descriptors() == before)  # the agent's ends are closed, too
        with connected(short) as client:
            client.sendall(iso(SECOND).encode() + b"\n")
            await source.tells(SECOND)


async def test_a_socket_on_a_file_system_that_hangs_is_refused_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    path = tmp_path / "s"
    open_directory = files.open_directory

    def open_late(directory: Path) -> int:
        hangs.wait(LIMIT_S)
        return open_directory(directory)

    monkeypatch.setattr(files, "open_directory", open_late)
    monkeypatch.setattr(unix_socket, "FILE_S", 0.1)
    source = made("socket", path=str(path))
    before = threads()
    with pytest.raises(ConfigError, match=r"no answer within 0\.1 s") as caught:
        await source.progress.start()
    assert caught.value.exit_code is ExitCode.LISTEN
    await source.progress.stop()
    hangs.set()
    await until(lambda: threads() <= before)
    assert not path.exists(), "the socket that came too late is removed"


# --- a directory that belongs to the workload, and an agent that is root

SOMEBODY = 65534
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs: root: run the tests as root")
SECRET = "admin:$6$salt$hash-of-the-password:19000:0:99999:7:::"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A directory of another user, who may do there what it likes."""
    directory = tmp_path / "theirs"
    directory.mkdir()
    if os.geteuid() == 0:
        os.chown(directory, SOMEBODY, SOMEBODY)
    return directory


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    if os.geteuid() == 0:
        os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)
    return path


@pytest.mark.parametrize("kind", ["file", "file_time"])
async def test_a_link_as_progress_file_is_refused_whoever_made_it(
    theirs: Path, tmp_path: Path, kind: str
) -> None:
    secret = tmp_path / "shadow"
    secret.write_text(iso(FIRST))
    os.utime(secret, (0, FIRST.timestamp()))
    (tmp_path / "own").symlink_to(secret)
    for path in (link(theirs / "progress", secret), tmp_path / "own"):
        async with running(kind, path=str(path)) as source:
            assert "symbolic link is not followed" in await source.refuses(Reason.UNREADABLE, 2)
        assert source.times == []


@ROOT
@pytest.mark.parametrize("kind", ["file", "file_time"])
async def test_a_directory_on_the_way_may_not_be_anothers_link(
    theirs: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/shadow").write_text(iso(FIRST))
    path = link(theirs / "sub", tmp_path / "etc") / "shadow"
    async with running(kind, path=str(path)) as source:
        assert f"belongs to uid {SOMEBODY}" in await source.refuses(Reason.UNREADABLE)


@pytest.mark.parametrize("key", [None, "a", "a.b"])
@pytest.mark.parametrize(
    "content",
    [
        SECRET,
        "3141592653589793",
        '{"a": "' + SECRET + '"}',
        '{"a": {"b": ["' + SECRET + '"]}}',
        '{"a": 3141592653589793}',
        SECRET + "\0\x1b",
        "\u00e9" + SECRET + "\n" + SECRET,
    ],
)
async def test_no_refusal_shows_what_a_file_has(
    tmp_path: Path, content: str, key: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: a hard link, or a wrong path, made the log show the file's content."""
    path = tmp_path / "f"
    path.write_bytes(content.encode("latin-1"))
    async with running("file", path=str(path), key=key) as source:
        await until(lambda: sum(source.progress.refused.values()))
        shown = f"{source.progress.last_error} {caplog.text}"
    assert str(path) in shown or "the JSON has no" in shown
    for part in ("admin", "salt", "hash", "31415", "99999"):
        assert part not in shown


async def test_a_link_at_the_sockets_place_is_neither_followed_nor_removed(
    theirs: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.touch(0o600)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "s"))
    listening.close()  # what it leads to is a dead socket of ours
    for target in (precious, tmp_path / "s", tmp_path / "none"):
        path = link(theirs / f"l-{target.name}", target)
        with pytest.raises(ConfigError, match="not a socket"):
            await made("socket", path=str(path), mode="0666").progress.start()
        assert path.is_symlink()
    assert precious.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "s").exists()
    assert not (tmp_path / "none").exists()


@ROOT
async def test_a_socket_in_a_directory_behind_anothers_link_is_not_made(
    theirs: Path, tmp_path: Path
) -> None:
    (tmp_path / "etc").mkdir()
    path = link(theirs / "sub", tmp_path / "etc") / "s"
    with pytest.raises(ConfigError, match=f"belongs to uid {SOMEBODY}"):
        await made("socket", path=str(path)).progress.start()
    assert list((tmp_path / "etc").iterdir()) == []


@ROOT
async def test_a_dead_socket_of_another_user_is_left_alone(theirs: Path) -> None:
    path = theirs / "s"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.close()
    os.chown(path, SOMEBODY, SOMEBODY)
    with pytest.raises(ConfigError, match=f"there is a socket of uid {SOMEBODY}"):
        await made("socket", path=str(path)).progress.start()
    assert path.exists()


async def test_the_mode_is_set_on_nothing_but_the_socket_that_was_made(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner of the directory replaces the socket between its making and the change of its mode."""
    precious = tmp_path / "precious"
    precious.touch(0o600)
    path = theirs / "s"
    bind = os.fchmod

    def replaced(fd: int, mode: int) -> None:
        bind(fd, mode)
        path.symlink_to(precious)

    monkeypatch.setattr("agent.drivers.progress.unix_socket.os.fchmod", replaced)
    with pytest.raises(ConfigError, match="Address already in use"):
        await made("socket", path=str(path), mode="0666").progress.start()
    open_file = os.open

    def swapped(opened: Path | str, *how: Any, **more: Any) -> int:
        if Path(opened).name == path.name and path.is_socket():
            path.unlink()
            path.symlink_to(precious)
        return open_file(opened, *how, **more)

    monkeypatch.setattr("agent.drivers.progress.unix_socket.os.fchmod", bind)
    monkeypatch.setattr("agent.drivers.progress.unix_socket.os.open", swapped)
    path.unlink()
    with pytest.raises(ConfigError, match="not a socket"):
        await made("socket", path=str(path), mode="0666").progress.start()
    assert precious.stat().st_mode & 0o777 == 0o600


async def test_a_stop_removes_nothing_where_its_directory_was_replaced(
    theirs: Path, tmp_path: Path
) -> None:
    (theirs / "run").mkdir()
    async with running("socket", path=str(theirs / "run/s")):
        (theirs / "run").rename(theirs / "old")
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/s").write_text("precious")
        (theirs / "run").symlink_to(tmp_path / "etc")
    assert (tmp_path / "etc/s").read_text() == "precious"
    assert not (theirs / "old/s").exists()


# --- what every source does with what it reads


async def test_a_time_in_the_future_is_refused_and_counted(short: Path) -> None:
    async with running("socket", path=str(short)) as source:
        with connected(short) as client:
            client.sendall(f"{iso(AHEAD)}\n{iso(FIRST)}\n{iso(AHEAD)}\n".encode())
            assert "6.000 s ahead" in await source.refuses(Reason.FUTURE, 2)
    assert source.times == [FIRST]
    async with running("socket", path=str(short), max_future=6) as source:
        with connected(short) as client:
            client.sendall(iso(AHEAD).encode())
        await source.tells(AHEAD)


async def test_the_last_error_goes_when_a_time_is_taken(short: Path) -> None:
    async with running("socket", path=str(short)) as source:
        assert source.progress.last_error is None
        with connected(short) as client:
            client.sendall(b"noise\n")
            assert "noise" in await source.refuses(Reason.NOT_A_TIME)
            client.sendall(iso(FIRST).encode() + b"\n")
            await source.tells(FIRST)
            assert source.progress.last_error is None


async def test_a_reason_is_logged_when_it_changes_and_not_each_time(
    short: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "agent.drivers.progress")
    good, noise, ahead = iso(FIRST).encode(), b"noise" * 50, iso(AHEAD).encode()
    async with running("socket", path=str(short)) as source:
        with connected(short) as client:
            for line in [noise] * 9 + [ahead] * 9 + [good] * 9 + [noise, good] * 9:
                client.sendall(line + b"\n")
            await source.refuses(Reason.NOT_A_TIME, 18)
    lines = [(r.getMessage(), getattr(r, "fields", {})) for r in caplog.records]
    refused, back = "data-processed time refused", "data-processed time is read again"
    assert [line for line, _ in lines] == [refused, refused, back]
    assert [fields.get("reason") for _, fields in lines] == ["not_a_time", "future", None]
    assert all(len(fields.get("error", "")) <= LONGEST_REASON for _, fields in lines)


async def test_every_reason_has_a_count_from_the_start() -> None:
    assert made("file", path="/nowhere").progress.refused == {reason.value: 0 for reason in Reason}


async def test_a_source_may_be_stopped_twice_or_without_a_start(tmp_path: Path) -> None:
    source = made("file", path=str(tmp_path / "f"))
    await source.progress.stop()
    await source.progress.start()
    await source.progress.stop()
    await source.progress.stop()


# --- a file


async def test_a_files_modification_time_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    async with running("file_time", path=str(path)) as source:
        assert f"{path} cannot be read: No such file" in await source.refuses(Reason.UNREADABLE)
        path.touch()
        os.utime(path, (0, FIRST.timestamp()))
        await source.tells(FIRST)
        os.utime(path, (0, AHEAD.timestamp()))
        await source.refuses(Reason.FUTURE)
        os.utime(path, (0, 0))
        await source.refuses(Reason.NEVER)
        os.utime(path, (0, SECOND.timestamp()))
        await source.tells(SECOND)


@pytest.mark.parametrize(
    "content",
    [
        f"{iso(FIRST)}",
        f"noise\n{iso(FIRST)}\n\n  \n",
        f"  {int(FIRST.timestamp())}  ",
        "x" * 3 * LONGEST_TEXT + f"\n{iso(FIRST)}\n",
    ],
)
async def test_a_files_last_line_that_is_not_empty_is_the_time(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "f"
    path.write_text(content)
    async with running("file", path=str(path)) as source:
        await source.tells(FIRST)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"out": {"until": iso(FIRST)}}, indent=2),
        '{"out": {"until": 1}}\n' + json.dumps({"out": {"until": FIRST.timestamp()}}) + "\n",
        "x" * LONGEST_TEXT + "\n" + json.dumps({"out": {"until": iso(FIRST)}}),
    ],
)
async def test_a_key_finds_the_time_in_a_file_of_json_or_of_json_lines(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "f"
    path.write_text(content)
    async with running("file", path=str(path), key="out.until") as source:
        await source.tells(FIRST)


@pytest.mark.parametrize(
    ("content", "key", "reason", "says"),
    [
        (b"", None, Reason.NOT_A_TIME, "is empty"),
        (b"\n \n", None, Reason.NOT_A_TIME, "is empty"),
        (b"2026-01-31T12:0", None, Reason.NOT_A_TIME, "ISO 8601"),
        (b"\0\xff\xfe", None, Reason.NOT_A_TIME, "not text"),
        (b"1" * (LONGEST_TEXT + 1), None, Reason.TOO_LONG, "last line"),
        (b'{\n"a": 1\n}', "b", Reason.NOT_A_TIME, "the JSON has no b"),
    ],
)
async def test_a_files_bad_content_is_refused_and_a_good_one_taken_after_it(
    tmp_path: Path, content: bytes, key: str | None, reason: Reason, says: str
) -> None:
    path = tmp_path / "f"
    path.write_bytes(content)
    async with running("file", path=str(path), key=key) as source:
        assert says in await source.refuses(reason)
        path.write_text(iso(FIRST) if key is None else json.dumps({key: iso(FIRST)}))
        await source.tells(FIRST)


async def test_a_fifo_or_a_directory_is_refused_without_waiting(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path):
        async with running("file", path=str(path)) as source:
            await source.refuses(Reason.UNREADABLE, 2)


async def test_a_file_system_that_hangs_holds_one_thread_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_text(iso(FIRST))
    answers = threading.Event()
    calls = []
    open_regular = files.open_regular

    def hangs(path: Path) -> int:
        calls.append(path)
        answers.wait(LIMIT_S)
        return open_regular(path)

    monkeypatch.setattr(file, "open_regular", hangs)
    before = threads()
    async with running("file", path=str(path), limit=0.05) as source:
        assert "blocked in the kernel" in await source.refuses(Reason.TOO_SLOW, 3)
        assert len(calls) == 1
        assert threads() <= before + 1  # one of before may have ended
        await source.progress.stop()
        await source.progress.start()
        await source.refuses(Reason.TOO_SLOW, 4)
        answers.set()
        await source.tells(FIRST)


# --- a metric


class Exporter:
    """Answers every request with the same bytes, or not at all."""

    def __init__(self) -> None:
        self.answer: bytes | None = None
        self.asked = b""
        self.port = 0

    def page(self, text: str, status: str = "200 OK") -> None:
        body = text.encode()
        head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.answer = head.encode() + body

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.asked = await reader.readuntil(b"\r\n\r\n")
            if self.answer is None:
                await reader.read()
            else:
                writer.write(self.answer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the reader has seen enough
        finally:
            writer.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/metrics?all=1"


@pytest.fixture
async def exporter() -> AsyncIterator[Exporter]:
    exporter = Exporter()
    server = await asyncio.start_server(exporter.serve, "127.0.0.1", 0)
    exporter.port = server.sockets[0].getsockname()[1]
    yield exporter
    server.close()


AT = FIRST.timestamp()
PAGE = f"""# HELP last_seconds When.
# TYPE last_seconds gauge
last_seconds_total 17
last_seconds{{line="6",note="a \\"quoted\\" }} brace"}} 18
last_seconds{{note="x",line="7"}} {AT:.9e} 1769860800000
other{{line="7"}} 19
"""


async def test_the_metric_with_the_labels_is_the_time(exporter: Exporter) -> None:
    exporter.page(PAGE)
    async with running(
        "metric", url=exporter.url, metric="last_seconds", labels={"line": "7"}
    ) as source:
        await source.tells(FIRST)
        assert exporter.asked.startswith(b"GET /metrics?all=1 ")
        exporter.page(f'last_seconds{{line="7"}} {SECOND.timestamp()}')
        await source.tells(SECOND)


async def test_cookies_of_an_exporter_are_not_kept(exporter: Exporter) -> None:
    """They filled the memory, and each request had all of them, up to where the exporter refused it."""
    exporter.page(f"last_seconds {AT}")
    assert exporter.answer is not None
    exporter.answer = exporter.answer.replace(b"\r\n", b"\r\nset-cookie: a=b\r\n", 1)
    async with running("metric", url=exporter.url, metric="last_seconds") as source:
        await source.tells(FIRST)
        exporter.asked = b""
        await source.tells(FIRST)
        await until(lambda: exporter.asked)
        assert b"cookie" not in exporter.asked.lower()


async def test_a_metric_without_labels_and_without_an_end_of_line(exporter: Exporter) -> None:
    exporter.page(f"last_seconds\t{AT}")
    async with running("metric", url=exporter.url, metric="last_seconds") as source:
        await source.tells(FIRST)


@pytest.mark.parametrize(
    ("page", "reason", "says"),
    [
        (PAGE, Reason.UNREADABLE, "has 2 samples last_seconds{}, and must have one"),
        ("", Reason.UNREADABLE, "has 0 samples"),
        ("<html>last_seconds", Reason.UNREADABLE, "has 0 samples"),
        ("last_seconds_total 1", Reason.UNREADABLE, "has 0 samples"),
        ("last_seconds{", Reason.NOT_A_TIME, "cannot be read"),
        ("last_seconds NaN", Reason.NOT_A_TIME, "nan must be"),
        ("last_seconds 0", Reason.NEVER, "nothing"),
        (f"last_seconds {AT * 1000}", Reason.NOT_A_TIME, "milliseconds"),
        ("last_seconds 1\n" * 20_000, Reason.TOO_LONG, "samples of last_seconds have more"),
        ("last_seconds{a=" + "1" * 20_000 + "} 1", Reason.TOO_LONG, "a sample of last_seconds has"),
        ("x" * 100_000, Reason.TOO_LONG, "a line has more than 64 KiB"),
        ("y 1\n" * 2_000_000, Reason.TOO_LONG, "the page has more than 4096 KiB"),
    ],
)
async def test_a_page_without_one_good_sample_is_refused(
    exporter: Exporter, page: str, reason: Reason, says: str
) -> None:
    exporter.page(page)
    async with running("metric", url=exporter.url, metric="last_seconds") as source:
        assert says in await source.refuses(reason)
        exporter.page(f"last_seconds {AT}")
        await source.tells(FIRST)


async def test_an_exporter_that_fails_is_asked_again(exporter: Exporter) -> None:
    exporter.page("", "503 Service Unavailable")
    async with running("metric", url=exporter.url, metric="last_seconds") as source:
        assert "answers 503" in await source.refuses(Reason.UNREADABLE)
        exporter.answer = b"\0\1\2 this is not HTTP"
        count = source.progress.refused["unreadable"]
        await source.refuses(Reason.UNREADABLE, count + 2)
        exporter.page(f"last_seconds {AT}")
        await source.tells(FIRST)


async def test_an_exporter_that_never_answers_is_given_up_at_the_limit(exporter: Exporter) -> None:
    async with running("metric", url=exporter.url, metric="last_seconds", limit=0.05) as source:
        assert "within 0.05 s" in await source.refuses(Reason.TOO_SLOW, 3)


async def test_an_exporter_that_is_gone_is_unreadable(exporter: Exporter) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        async with running("metric", url=url, metric="last_seconds") as source:
            assert url in await source.refuses(Reason.UNREADABLE, 2)


# --- a command

Script = Callable[[str], str]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    def write(text: str) -> str:
        path = tmp_path / f"command{len(list(tmp_path.iterdir()))}"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return write


async def test_the_last_line_that_a_command_prints_is_the_time(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILOVER_SECRET", "x")
    command = script('echo "$1${FAILOVER_SECRET}"; pwd >&2; cat; echo "$2"; echo')
    async with running("command", command=[command, "noise", iso(FIRST)]) as source:
        await source.tells(FIRST)
    assert sum(source.progress.refused.values()) == 0


@pytest.mark.parametrize(
    ("text", "reason", "says"),
    [
        ("echo almost; echo 'no such table' >&2; exit 1", Reason.UNREADABLE, "1: no such table"),
        ("exit 3", Reason.UNREADABLE, "ended with 3: no error output"),
        ("kill -9 $$", Reason.UNREADABLE, "ended with -9"),
        ("echo garbage", Reason.NOT_A_TIME, "garbage"),
        ("", Reason.NOT_A_TIME, "ISO 8601"),
        ("exec cat /dev/zero", Reason.TOO_LONG, "more than 4096 bytes"),
        ("exec cat /dev/zero >&2", Reason.TOO_LONG, "more than 4096 bytes"),
    ],
)
async def test_a_command_that_fails_is_refused_and_run_again(
    script: Script, text: str, reason: Reason, says: str
) -> None:
    async with running("command", command=[script(text)]) as source:
        assert says in await source.refuses(reason)
        await source.refuses(reason, 2)
    assert not source.times


async def test_a_command_that_cannot_be_started_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "command"
    path.write_text("#!/no/such/interpreter\n")
    path.chmod(0o755)
    async with running("command", command=[str(path)]) as source:
        assert f"{path} could not be started" in await source.refuses(Reason.UNREADABLE)


def ended(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def pids(path: Path) -> list[int]:
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


async def test_a_command_that_hangs_is_killed_with_its_children(
    script: Script, tmp_path: Path
) -> None:
    started = tmp_path / "pids"
    command = script(f"trap '' TERM; sleep 1000 & echo $$ $! >> {started}; wait")
    async with running("command", command=[command], limit=0.3) as source:
        assert "killed after 0.3 s" in await source.refuses(Reason.TOO_SLOW, 2)
        await until(lambda: pids(started))
    await until(lambda: all(ended(pid) for pid in pids(started)))


async def test_what_a_command_leaves_behind_neither_delays_it_nor_lives_on(
    script: Script, tmp_path: Path
) -> None:
    started = tmp_path / "pids"
    command = script(f"sleep 1000 & echo $! >> {started}; echo {iso(FIRST)}")
    async with running("command", command=[command]) as source:
        await source.tells(FIRST)
        await until(lambda: all(ended(pid) for pid in pids(started)))


async def test_a_stop_kills_the_command_that_runs(script: Script, tmp_path: Path) -> None:
    started = tmp_path / "pids"
    command = script(f"echo $$ >> {started}; exec sleep 1000")
    async with running("command", command=[command]):
        await until(lambda: pids(started))
    await until(lambda: ended(pids(started)[0]))


# --- MQTT

Restart = Callable[[], Awaitable[None]]


class Broker:
    """A real mosquitto, on a port that was free."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines: list[str] = ["allow_anonymous true"]
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self.port = unused.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        config = self.directory / "mosquitto.conf"
        user = "root" if os.geteuid() == 0 else "mosquitto"
        config.write_text(
            "\n".join([f"listener {self.port} 127.0.0.1", f"user {user}", *self.lines, ""])
        )
        self.process = subprocess.Popen(
            [str(mosquitto()), "-c", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        await until(self._listens)

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "mosquitto has ended"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    async def publish(self, payload: str | bytes, *, retain: bool = False, **who: Any) -> None:
        async with aiomqtt.Client("127.0.0.1", self.port, timeout=LIMIT_S, **who) as client:
            await client.publish("line7/processed", payload, qos=1, retain=retain)

    def source(self, **keys: Any) -> dict[str, Any]:
        url = f"mqtt://127.0.0.1:{self.port}"
        return {"broker": url, "topic": "line7/processed", "limit": LIMIT_S, **keys}


def mosquitto() -> str | None:
    return shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    if mosquitto() is None:
        pytest.skip("needs: mosquitto: apt-get install mosquitto")
    broker = Broker(tmp_path)
    yield broker
    broker.kill()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(mqtt, "LONGEST_WAIT_S", 0.1)


async def published(broker: Broker, source: Source, time: datetime, **who: Any) -> None:
    """Publish until it has come: whether a subscription is there already cannot be seen."""
    async with asyncio.timeout(LIMIT_S):
        while not source.times or source.times[-1] != time:
            await broker.publish(iso(time), **who)
            await asyncio.sleep(0.02)


async def test_each_message_of_the_topic_is_a_time_and_garbage_ends_nothing(
    broker: Broker,
) -> None:
    await broker.start()
    async with running("mqtt", **broker.source()) as source:
        await published(broker, source, FIRST)
        for garbage in (b"", b"\xff\0", b"yesterday", b"1" * (LONGEST_TEXT + 1)):
            await broker.publish(garbage)
        await source.refuses(Reason.NOT_A_TIME, 3)
        await source.refuses(Reason.TOO_LONG)
        await broker.publish(iso(AHEAD))
        await source.refuses(Reason.FUTURE)
        await broker.publish(str(SECOND.timestamp()))
        await source.tells(SECOND)
    assert source.progress.refused["unreadable"] == 0


async def test_a_retained_message_is_the_time_at_once_and_a_key_finds_it(broker: Broker) -> None:
    await broker.start()
    await broker.publish(json.dumps({"out": [{"until": iso(FIRST)}]}), retain=True)
    async with running("mqtt", **broker.source(key="out.0.until")) as source:
        await source.tells(FIRST)


@pytest.mark.usefixtures("impatient")
async def test_a_broker_that_is_killed_and_started_again_is_found_again(broker: Broker) -> None:
    await broker.start()
    async with running("mqtt", **broker.source()) as source:
        await published(broker, source, FIRST)
        broker.kill()
        assert str(broker.port) in await source.refuses(Reason.UNREADABLE, 3)
        await broker.start()
        await published(broker, source, SECOND)
        assert source.progress.last_error is None


@pytest.mark.usefixtures("impatient")
async def test_a_broker_that_freezes_is_noticed(
    broker: Broker,
) -> None:
    await broker.start()
    async with running("mqtt", **broker.source(limit=0.5, keepalive=1)) as source:
        await published(broker, source, FIRST)
        assert broker.process is not None
        broker.process.send_signal(signal.SIGSTOP)
        await source.refuses(Reason.UNREADABLE)
        broker.process.send_signal(signal.SIGCONT)
        await published(broker, source, SECOND)


@pytest.mark.usefixtures("impatient")
async def test_a_broker_that_never_answers_leaves_no_connection_open() -> None:
    open_now: set[asyncio.StreamWriter] = set()
    met = 0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal met
        met += 1
        open_now.add(writer)
        with suppress(ConnectionError):
            while await reader.read(100):
                pass
        open_now.discard(writer)
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with running("mqtt", broker=f"mqtt://127.0.0.1:{port}", topic="t", limit=0.05) as source:
        await source.refuses(Reason.UNREADABLE, 5)
        assert met >= 5
        await until(lambda: len(open_now) <= 1)
    await until(lambda: not open_now)
    server.close()


def secret(path: Path, text: str) -> str:
    path.write_text(text + "\n")
    path.chmod(0o600)
    return str(path)


@pytest.mark.usefixtures("impatient")
async def test_a_wrong_password_is_reported_and_the_right_one_works(
    broker: Broker, tmp_path: Path
) -> None:
    accounts = tmp_path / "accounts"
    subprocess.run(["mosquitto_passwd", "-b", "-c", accounts, "me", "right"], check=True)
    accounts.chmod(0o644)
    broker.lines = ["allow_anonymous false", f"password_file {accounts}"]
    await broker.start()
    path = secret(tmp_path / "password", "wrong")
    keys = broker.source(username="me", password_file=path)
    async with running("mqtt", **keys) as source:
        told = await source.refuses(Reason.UNREADABLE, 3)
        assert "Not authorized" in told
        assert "wrong" not in told
    secret(tmp_path / "password", "right")
    async with running("mqtt", **keys) as source:
        await published(broker, source, FIRST, username="me", password="right")


@pytest.mark.usefixtures("impatient")
async def test_a_subscription_that_the_broker_refuses_is_reported() -> None:
    async def refusing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read(1000)  # CONNECT
            writer.write(bytes([0x20, 2, 0, 0]))  # CONNACK, accepted
            subscribe = await reader.read(1000)
            writer.write(bytes([0x90, 3, *subscribe[2:4], 0x80]))  # SUBACK, failure
            await reader.read()
        writer.close()

    server = await asyncio.start_server(refusing, "127.0.0.1", 0)
    url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with running("mqtt", broker=url, topic="a/b", protocol="3.1.1") as source:
        assert "subscription to a/b refused" in await source.refuses(Reason.UNREADABLE, 2)
    server.close()


@pytest.mark.usefixtures("impatient")
async def test_a_broker_cannot_fill_the_memory_with_messages_that_it_does_not_release() -> None:
    """The library keeps each message of QoS 2 until its broker releases it: 65535 of them."""
    received: list[int] = []

    async def hostile(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got = b""
        with suppress(ConnectionError):
            await reader.read(1000)  # CONNECT
            writer.write(bytes([0x20, 2, 0, 0]))  # CONNACK, accepted
            subscribe = await reader.read(1000)
            writer.write(bytes([0x90, 3, *subscribe[2:4], 1]))  # SUBACK, QoS 1
            for number in range(1, 20):
                writer.write(bytes([0x34, 8, 0, 3]) + b"a/b" + bytes([0, number]) + b"1")
                await writer.drain()
            while part := await reader.read(1000):
                got += part
        received.append(got.count(bytes([0x50, 2, 0])))  # PUBREC
        writer.close()

    server = await asyncio.start_server(hostile, "127.0.0.1", 0)
    url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    keys = {"topic": "a/b", "protocol": "3.1.1", "keepalive": 1}
    async with running("mqtt", broker=url, **keys) as source:
        await source.refuses(Reason.UNREADABLE, 2)
        await until(lambda: received)
        assert max(received) <= 1
    server.close()


def certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed one for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = directory / "tls.crt", directory / "tls.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


# paho leaves the socket of a failed handshake to the garbage collector
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
@pytest.mark.usefixtures("impatient")
async def test_with_tls_only_a_broker_that_ca_file_knows_is_believed(
    broker: Broker, tmp_path: Path
) -> None:
    public, private = certificate(tmp_path)
    broker.lines += [f"certfile {public}", f"keyfile {private}"]
    await broker.start()
    keys = broker.source(broker=f"mqtts://127.0.0.1:{broker.port}")
    async with running("mqtt", **keys) as source:
        assert "certificate" in await source.refuses(Reason.UNREADABLE)
    async with running("mqtt", **keys, ca_file=str(public)) as source:
        who = {"tls_params": aiomqtt.TLSParameters(ca_certs=str(public))}
        await published(broker, source, FIRST, **who)
    gc.collect()


async def test_a_ca_file_without_certificates_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "ca"
    path.write_text("nothing")
    source = made("mqtt", broker="mqtts://127.0.0.1:1", topic="t", ca_file=str(path))
    with pytest.raises(ConfigError, match=f"ca_file {path} must have certificates"):
        await source.progress.start()


async def test_of_more_messages_than_the_queue_holds_the_newest_stay() -> None:
    messages = [aiomqtt.Message("t", b"", 1, False, n, None) for n in range(5)]
    queue = mqtt.DropOldestQueue(2)
    for message in messages:
        queue.put_nowait(message)
    assert [queue.get_nowait(), queue.get_nowait()] == messages[3:]


async def test_waits_for_a_broker_grow_to_a_bound_with_jitter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 9:
            raise asyncio.CancelledError

    def fails(_: object) -> None:
        raise aiomqtt.MqttError("gone")

    monkeypatch.setattr(mqtt, "connected", fails)
    settings = MqttProgress(broker="mqtt://127.0.0.1:1", topic="t")
    receiver = Progress(settings, Clock(), print)
    subscriber = Subscriber(settings, receiver, chance=lambda: 0.5)
    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "sleep", sleep)
        with pytest.raises(asyncio.CancelledError):
            await subscriber.run()
    assert waits == [0.75 * wait for wait in (1, 2, 4, 8, 16, 30, 30, 30, 30)]


async def test_without_the_extra_the_start_fails_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "agent.ops.mqtt")
    monkeypatch.delattr("agent.ops.mqtt")
    monkeypatch.setitem(sys.modules, "aiomqtt", None)
    source = made("mqtt", broker="mqtt://127.0.0.1", topic="t")
    with pytest.raises(ConfigError, match=r"pip install client-failover-agent\[mqtt\]"):
        await source.progress.start()
    await source.progress.stop()


async def test_two_sources_share_nothing(tmp_path: Path, short: Path) -> None:
    path = tmp_path / "f"
    path.write_text(iso(FIRST))
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(running("file", path=str(path)))
        two = await stack.enter_async_context(running("socket", path=str(short)))
        await one.tells(FIRST)
        assert not two.times
