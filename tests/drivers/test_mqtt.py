"""MQTT announcements: at a real broker, and at broken and hostile ones."""

import asyncio
import gc
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drivers import mqtt as driver
from agent.drivers.mqtt import Announcer, default_client_id, parse_epoch, topic_level
from agent.errors import ConfigError
from agent.model import Role
from agent.ops import mqtt as ops
from agent.ops.clock import Clock
from agent.schema.mqtt import Mqtt
from agent.schema.read import validate
from tests.mosquitto import PASSWORD, PATIENCE_S, Broker, Watcher, a_broker, watching
from tests.this_process import descriptors

SINCE = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
SESSION = "failover/line-7/sessions/host-a"
PRIMARY = "failover/line-7/primary"
STATE = "spBv1.0/STATE/plant"


@dataclass(frozen=True)
class State:
    role: Role
    epoch: int | None = None
    since: datetime = SINCE


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with a_broker(tmp_path) as broker:
        broker.start()
        yield broker


@pytest.fixture
def watcher(broker: Broker) -> Iterator[Watcher]:
    with watching(broker) as watcher:
        yield watcher


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(ops, "LONGEST_WAIT_S", 0.1)
    monkeypatch.setattr(driver, "CORRECTION_S", 0.05)


def made(session: str = "host-a", role: Role = Role.SECONDARY, **keys: Any) -> Announcer:
    settings = validate(Mqtt, {"limit": PATIENCE_S, **keys})
    return Announcer(settings, "line-7", session, clock=Clock(), first=State(role, 1))


@asynccontextmanager
async def announcing(
    session: str = "host-a", role: Role = Role.SECONDARY, **keys: Any
) -> AsyncIterator[Announcer]:
    announcer = made(session, role, **keys)
    announcer.start()
    try:
        yield announcer
    finally:
        await announcer.stop()
        # What still connects is ended by the broker's end otherwise, and paho leaves its socket open.
        for thread in threading.enumerate():
            if thread.name == "mqtt-connect":
                await asyncio.to_thread(thread.join, 1.0)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.005)


async def heard(watcher: Watcher, topic: str, **fields: Any) -> Any:
    return await asyncio.to_thread(watcher.until, topic, **fields)


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every connection that was begun, so that a test can cut it."""
    begun: list[Any] = []
    connect = ops._Client.connect

    async def noted(self: Any) -> None:
        begun.append(self)
        await connect(self)

    monkeypatch.setattr(ops._Client, "connect", noted)
    return begun


def cut(client: Any) -> None:
    """End a connection without a word, so that the broker sends the last will."""
    # as a network does it: the library can only close in order, and hides its socket
    client._client._sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_each_role_change_and_the_exit_are_published_retained(
    broker: Broker, watcher: Watcher, protocol: str
) -> None:
    async with announcing(**broker.table(protocol=protocol)) as announcer:
        born = await heard(watcher, SESSION, role="Secondary", online=True)
        assert born["since"] == "2026-01-31T12:00:00Z"
        announcer.announce(State(Role.PRIMARY, 7))
        fields = {"role": "Primary", "epoch": 7, "timestamp": born["timestamp"]}
        await heard(watcher, SESSION, **fields)
        primary = await heard(watcher, PRIMARY, session="host-a")
        assert primary == {"session": "host-a", "epoch": 7, "since": "2026-01-31T12:00:00Z"}
        announcer.announce(State(Role.SECONDARY, 7))
        await heard(watcher, SESSION, role="Secondary", epoch=7)
    left = await heard(watcher, SESSION, online=False)
    assert left["timestamp"] >= born["timestamp"]
    with watching(broker) as late:
        await heard(late, SESSION, online=False)
        await heard(late, PRIMARY, epoch=7)
        assert all(message.retained for message in late.heard)


async def test_a_lost_connection_leaves_its_will_and_is_renewed(
    broker: Broker, watcher: Watcher, clients: list[Any]
) -> None:
    async with announcing(role=Role.PRIMARY, **broker.table()):
        born = await heard(watcher, SESSION, online=True)
        await heard(watcher, PRIMARY, epoch=1)
        await until(lambda: clients)
        cut(clients[0])
        await until(lambda: len(clients) > 1)
        await until(lambda: {"online": False} in [_online(h.payload) for h in watcher.of(SESSION)])
        will = next(h.content for h in watcher.of(SESSION) if not h.content["online"])
        assert will == {"online": False, "timestamp": born["timestamp"]}
        again = await heard(watcher, SESSION, online=True, role="Primary")
        assert again["timestamp"] >= born["timestamp"]


def _online(payload: bytes) -> Any:
    return {"online": json.loads(payload)["online"]}


async def test_a_retained_message_from_before_the_connection_is_replaced_once(
    broker: Broker, watcher: Watcher
) -> None:
    watcher.publish(SESSION, b"garbage")
    async with announcing(**broker.table()) as announcer:
        announcer.announce(State(Role.PRIMARY, 2))
        await heard(watcher, PRIMARY, epoch=2)
    payloads = [heard.payload for heard in watcher.of(SESSION)[1:]]
    assert len(payloads) == len(set(payloads)) <= 3


async def test_a_will_that_comes_after_the_new_birth_is_corrected(
    broker: Broker, watcher: Watcher
) -> None:
    async with announcing(**broker.table()):
        await heard(watcher, SESSION, online=True)
        await corrected(watcher, SESSION, b'{"online": false, "timestamp": 1}', role="Secondary")


GARBAGE = [b"", b"\xff\0", b"[]", b'{"epoch": true}', b'{"epoch": "9"}', b"9" * 5000, b"[" * 4000]


async def corrected(watcher: Watcher, topic: str, garbage: bytes, **fields: Any) -> None:
    """Publish garbage while an agent is connected; the agent then has to publish ``fields``."""
    before = len(watcher.of(topic))
    watcher.publish(topic, garbage)
    await until(lambda: len(watcher.of(topic)) >= before + 2)
    await heard(watcher, topic, **fields)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_retained_garbage_is_replaced(
    broker: Broker, watcher: Watcher, garbage: bytes, protocol: str
) -> None:
    for topic in (SESSION, PRIMARY):
        watcher.publish(topic, garbage)
    async with announcing(role=Role.PRIMARY, **broker.table(protocol=protocol)):
        await heard(watcher, SESSION, role="Primary")
        await heard(watcher, PRIMARY, session="host-a", epoch=1)
        await corrected(watcher, SESSION, garbage, role="Primary")
        await corrected(watcher, PRIMARY, garbage, session="host-a", epoch=1)


async def test_with_mqtt_5_a_huge_retained_message_is_replaced_unread(
    broker: Broker, watcher: Watcher
) -> None:
    watcher.publish(PRIMARY, b"x" * (ops.LONGEST_PACKET + 9))
    async with announcing(role=Role.PRIMARY, **broker.table()):
        await heard(watcher, PRIMARY, session="host-a", epoch=1)


async def test_corrections_come_at_a_bounded_rate(
    broker: Broker, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "CORRECTION_S", PATIENCE_S)
    async with announcing(**broker.table()):
        await heard(watcher, SESSION, role="Secondary")
        for _ in range(200):
            watcher.publish(SESSION, b"garbage")
        await until(lambda: len(watcher.of(SESSION)) >= 202)
    await until(lambda: len(watcher.of(SESSION)) >= 203)
    assert len(watcher.of(SESSION)) == 203  # birth, garbage, one correction, the end


async def test_a_retained_newer_epoch_stays_and_is_logged_once(
    broker: Broker, watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    newer = {"session": "host-b", "epoch": 9, "since": "x"}
    watcher.publish(PRIMARY, json.dumps(newer).encode())
    async with announcing(role=Role.PRIMARY, **broker.table()) as announcer:
        await heard(watcher, SESSION, role="Primary")
        announcer.announce(State(Role.PRIMARY, 8))
        await heard(watcher, SESSION, epoch=8)
        assert watcher.last(PRIMARY) == newer
        announcer.announce(State(Role.PRIMARY, 9))
        await heard(watcher, PRIMARY, session="host-a", epoch=9)
    assert caplog.text.count("primary is not announced") == 1


async def test_without_epochs_the_last_announcement_wins(broker: Broker, watcher: Watcher) -> None:
    watcher.publish(PRIMARY, b'{"session": "host-b", "epoch": 9}')
    async with announcing(**broker.table()) as announcer:
        announcer.announce(State(Role.PRIMARY, None))
        await heard(watcher, PRIMARY, session="host-a", epoch=None)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_restarted_broker_receives_the_current_role(broker: Broker, protocol: str) -> None:
    """It keeps what is retained: the role of before, until the member is back."""
    broker.kill()
    broker.lines += ["persistence true", f"persistence_location {broker.directory}/"]
    broker.directory.chmod(0o777)
    broker.start()
    assert broker.process is not None
    async with announcing(role=Role.PRIMARY, **broker.table(protocol=protocol)) as announcer:
        await until(lambda: announcer.up)
        broker.send(signal.SIGTERM)
        await asyncio.to_thread(broker.process.wait, PATIENCE_S)
        assert (broker.directory / "mosquitto.db").stat().st_size > 0
        await until(lambda: not announcer.up)
        announcer.announce(State(Role.SECONDARY, 1))
        broker.start()
        with watching(broker) as watcher:
            await heard(watcher, SESSION, role="Secondary", online=True)
            await heard(watcher, PRIMARY, session="host-a")  # it names the last one


# --- Sparkplug


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_only_the_primary_announces_the_state_of_the_sparkplug_host(
    broker: Broker, watcher: Watcher, clients: list[Any], protocol: str
) -> None:
    keys = broker.table(payload="sparkplug", sparkplug_host_id="plant", protocol=protocol)
    async with announcing(**keys) as announcer:
        await until(lambda: announcer.up)
        assert not watcher.heard
        announcer.announce(State(Role.PRIMARY, 2))
        born = await heard(watcher, STATE, online=True)
        assert set(born) == {"online", "timestamp"}
        cut(clients[-1])
        await heard(watcher, STATE, online=False)
        assert watcher.of(STATE)[-1].content["timestamp"] == born["timestamp"] or len(clients) > 2
        again = await heard(watcher, STATE, online=True)
        announcer.announce(State(Role.SECONDARY, 2))
        gone = await heard(watcher, STATE, online=False)
        assert gone["timestamp"] >= again["timestamp"]
        count = len(watcher.of(STATE))
    assert len(watcher.of(STATE)) == count
    assert {message.topic for message in watcher.heard} == {STATE}


async def test_a_primary_that_is_replaced_leaves_the_next_ones_state(
    broker: Broker, watcher: Watcher, clients: list[Any]
) -> None:
    keys = broker.table(payload="sparkplug", sparkplug_host_id="plant")
    async with announcing("host-a", Role.PRIMARY, **keys) as first:
        await heard(watcher, STATE, online=True)
        # set aside, as announce() would publish its own end first, and it hears of both at once
        first._state = State(Role.SECONDARY, 1)
        other = b'{"online": true, "timestamp": 9999999999999}'
        watcher.publish(STATE, other)
        await until(lambda: len(clients) == 2)  # now without a will
    assert watcher.of(STATE)[-1].payload == other


AHEAD_MS = 9_999_999_999_999
"""The year 2286."""


def state(timestamp: int, *, online: bool = False) -> bytes:
    return json.dumps({"online": online, "timestamp": timestamp}).encode()


def believed(watcher: Watcher) -> list[dict[str, Any]]:
    """The messages that an edge node takes: none that is older than the one before."""
    taken: list[dict[str, Any]] = []
    for message in watcher.of(STATE):
        if not taken or message.content["timestamp"] >= taken[-1]["timestamp"]:
            taken.append(message.content)
    return taken


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("before", [True, False])
async def test_a_newer_offline_state_is_replaced_by_a_newer_online_state(
    broker: Broker, watcher: Watcher, clients: list[Any], *, protocol: str, before: bool
) -> None:
    """Fault 26: edge nodes stored for ever, since online was repeated with the old timestamp."""
    keys = broker.table(payload="sparkplug", sparkplug_host_id="plant", protocol=protocol)
    if before:
        watcher.publish(STATE, state(AHEAD_MS))
    async with announcing("host-a", Role.PRIMARY, **keys):
        if not before:
            await heard(watcher, STATE, online=True)
            watcher.publish(STATE, state(AHEAD_MS))
        await until(lambda: believed(watcher)[-1] == {"online": True, "timestamp": AHEAD_MS + 1})
        cut(clients[-1])  # the will has the new timestamp, too
        await until(lambda: {"online": False, "timestamp": AHEAD_MS + 1} in believed(watcher))
        await until(lambda: believed(watcher)[-1]["online"])
    await until(lambda: not believed(watcher)[-1]["online"])
    assert believed(watcher)[-1] == watcher.of(STATE)[-1].content


async def test_a_connection_lost_during_its_first_publication_is_replaced_at_once(
    broker: Broker, watcher: Watcher, clients: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def subscribe(*given: Any) -> None:
        await ops.subscribe(*given)
        if len(clients) == 1:
            broker.send(signal.SIGSTOP)  # it acknowledges no publication

    monkeypatch.setattr(driver, "subscribe", subscribe)
    async with announcing("host-a", **broker.table(limit=10 * PATIENCE_S)):
        # the broker stands still, so nothing else shows the publication that waits
        await until(lambda: clients and clients[-1]._pending_publishes)
        cut(clients[-1])
        await until(lambda: len(clients) > 1)
        broker.send(signal.SIGCONT)
        await heard(watcher, SESSION, role="Secondary")


async def test_a_member_that_saw_a_newer_state_connects_with_a_newer_timestamp(
    broker: Broker, watcher: Watcher, clients: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, received = driver.parse_state, []

    def parse_and_note(payload: bytes) -> tuple[bool, int]:
        received.append(parse(payload))
        return received[-1]

    monkeypatch.setattr(driver, "parse_state", parse_and_note)
    watcher.publish(STATE, state(AHEAD_MS))
    keys = broker.table(payload="sparkplug", sparkplug_host_id="plant")
    async with announcing("host-a", **keys) as announcer:
        await until(lambda: (False, AHEAD_MS) in received)
        announcer.announce(State(Role.PRIMARY, 2))
        await heard(watcher, STATE, online=True, timestamp=AHEAD_MS + 1)
        assert len(clients) == 2
        assert len(watcher.of(STATE)) == 2


async def test_a_peer_that_always_publishes_a_newer_state_cannot_cause_a_storm(
    broker: Broker, watcher: Watcher, clients: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "FIRST_WAIT_S", 0.1)
    monkeypatch.setattr(ops, "LONGEST_WAIT_S", 30.0)
    keys = broker.table(payload="sparkplug", sparkplug_host_id="plant")
    async with announcing("host-a", Role.PRIMARY, **keys):
        began_at = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() - began_at < 2:
            newest = max((m.content["timestamp"] for m in watcher.of(STATE)), default=AHEAD_MS)
            await asyncio.to_thread(watcher.publish, STATE, state(newest + 1))
            await asyncio.sleep(0.02)
        assert 2 <= len(clients) <= 7  # 0.2, 0.4, 0.8, ... and at least half of each


async def test_a_connection_that_lasted_resets_the_backoff(
    broker: Broker, clients: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "LONGEST_WAIT_S", 1000.0)
    monkeypatch.setattr(driver, "STEADY_S", 0.0)
    async with announcing(**broker.table()) as announcer:
        for number in range(1, 16):  # doubled each time, the delays would end far beyond the limit
            await until(lambda: len(clients) == number and announcer.up)  # noqa: B023 - awaited here
            cut(clients[-1])
            await until(lambda: not announcer.up)


async def test_a_newer_online_state_of_another_host_causes_no_reconnect(
    broker: Broker, watcher: Watcher, clients: list[Any]
) -> None:
    keys = broker.table(payload="sparkplug", sparkplug_host_id="plant")
    async with announcing("host-a", Role.PRIMARY, **keys):
        await heard(watcher, STATE, online=True)
        watcher.publish(STATE, state(AHEAD_MS, online=True))
        watcher.publish(STATE, state(AHEAD_MS))  # its will
        await heard(watcher, STATE, online=True, timestamp=AHEAD_MS + 1)
        assert len(clients) == 2, "only the will causes one"


@pytest.mark.parametrize(
    "garbage",
    [
        *GARBAGE,
        b"{}",
        b'{"timestamp": true}',
        b'{"timestamp": -1}',
        b'{"timestamp": 1e300}',
        b'{"online": false, "timestamp": 18446744073709551615}',
    ],
)
def test_a_state_that_edge_nodes_ignore_has_no_timestamp(garbage: bytes) -> None:
    assert driver.parse_state(garbage) == (False, -1)


async def test_the_groups_id_is_the_host_id_by_default(broker: Broker, watcher: Watcher) -> None:
    async with announcing("host-a", Role.PRIMARY, **broker.table(payload="sparkplug")):
        await heard(watcher, "spBv1.0/STATE/line-7", online=True)


# --- brokers that fail


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == driver.__name__]


async def test_a_dead_broker_is_logged_once_and_receives_the_newest_role_when_it_is_back(
    broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with announcing(**broker.table()) as announcer:
        await until(lambda: announcer.up)
        assert announcer.failures == 0
        broker.kill()
        await until(lambda: announcer.failures)
        assert not announcer.up
        for epoch in range(1000):
            announcer.announce(State(Role.PRIMARY, epoch))
        await asyncio.sleep(0)
        await until(lambda: "refused" in str(caplog.records[-1].__dict__.get("fields")))
        before = len(lines(caplog))
        broker.start()
        with watching(broker) as watcher:
            await heard(watcher, SESSION, role="Primary", epoch=999)
            await heard(watcher, PRIMARY, epoch=999)
            assert {h.content.get("epoch") for h in watcher.of(PRIMARY)} == {999}
    assert lines(caplog)[0] == "role is announced by MQTT"
    assert lines(caplog)[before:] == ["role is announced by MQTT"]
    assert before <= 3  # up, lost, refused


async def test_a_frozen_broker_is_noticed_and_does_not_delay_the_exit(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LEAVE_S", 0.1)
    announcer = made(**broker.table(keepalive=1) | {"limit": 0.3})
    announcer.start()
    await until(lambda: announcer.up)
    broker.send(signal.SIGSTOP)
    announcer.announce(State(Role.PRIMARY, 2))
    await until(lambda: announcer.failures)
    broker.send(signal.SIGCONT)
    await until(lambda: announcer.up)
    broker.send(signal.SIGSTOP)
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    await announcer.stop()
    assert loop.time() - began_at < PATIENCE_S / 2
    broker.send(signal.SIGCONT)


@pytest.fixture
async def unseen() -> AsyncIterator[list[Any]]:
    """What reaches the handler of the loop, where an agent stops for it. It stays empty."""
    found: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context))
    yield found
    gc.collect()
    await asyncio.sleep(0)
    assert found == []


@asynccontextmanager
async def pretending(answer: bytes) -> AsyncIterator[str]:
    """A broker that sends the same to everybody, and then nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            writer.write(answer)
            while await reader.read(1000):
                pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        bytes([0x20, 3, 0, 0, 0, 0x30, 0xFF, 0xFF, 0xFF, 0x7F]) + b"x" * 100_000,
        bytes([0x20, 3, 0, 0, 0, 0xFF, 0xFF]),
        bytes([0x20, 3, 0, 0x87, 0]),
        bytes([0x20, 0]),
        bytes([0x20, 2, 0, 0, 0xE0, 0]),
        bytes([0x20, 2, 0, 0]) + 3 * bytes([0x90, 3, 0, 9, 0]),
    ],
    ids=[
        "silent",
        "http",
        "huge packet",
        "malformed",
        "refused",
        "empty connack",
        "disconnect",
        "subacks of others",
    ],
)
async def test_a_hostile_broker_causes_no_failure(answer: bytes, unseen: list[Any]) -> None:
    async with pretending(answer) as url, announcing(broker=url, limit=0.2) as announcer:
        await until(lambda: announcer.failures)
        announcer.announce(State(Role.PRIMARY, 2))
        assert not announcer.up
    assert unseen == []


async def test_an_exit_while_a_broker_is_silent_causes_no_failure(unseen: list[Any]) -> None:
    async with pretending(b"") as url:
        before = descriptors()
        async with announcing(broker=url):
            await until(lambda: descriptors() >= before + 2)  # both ends of its connection
        await until(lambda: descriptors() == before)
    assert unseen == []


async def test_a_connection_that_is_lost_before_it_is_watched_causes_no_failure(
    broker: Broker, clients: list[Any], unseen: list[Any]
) -> None:
    async with announcing(**broker.table()) as announcer:
        await until(lambda: announcer.up)
        # only the library's own calls lose a connection between two turns of the loop
        paho = clients[0]._client
        paho._call_socket_register_write()  # as a publication does, in the same turn of the loop
        paho._sock_close()
        announcer.announce(State(Role.PRIMARY, 2))
        await until(lambda: len(clients) > 1 and announcer.up)
    assert unseen == []


async def test_a_huge_packet_is_not_kept_in_memory(clients: list[Any]) -> None:
    answer = bytes([0x20, 3, 0, 0, 0, 0x30, 0xFF, 0xFF, 0xFF, 0x7F]) + b"x" * 2_000_000
    async with pretending(answer) as url, announcing(broker=url, limit=PATIENCE_S) as announcer:
        await until(lambda: announcer.failures)
        # memory is the only effect, and the library holds it
        assert len(clients[0]._client._in_packet["packet"]) == 0


async def test_a_name_server_that_hangs_does_not_delay_the_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = asyncio.Event()
    loop = asyncio.get_running_loop()
    release: list[Any] = []

    def hangs(*_: object, **__: object) -> None:
        import threading  # noqa: PLC0415 - of this test alone

        event = threading.Event()
        release.append(event)
        loop.call_soon_threadsafe(held.set)
        event.wait(PATIENCE_S)
        raise OSError("released")

    monkeypatch.setattr(socket, "create_connection", hangs)
    async with announcing(broker="mqtt://broker.invalid"):
        await held.wait()
    release[0].set()


async def test_a_wrong_password_is_logged_once_and_never_shown(
    broker: Broker, caplog: pytest.LogCaptureFixture, clients: list[Any]
) -> None:
    broker.kill()
    broker.secure()
    broker.start()
    async with announcing(**broker.table(password="hunter2")):
        await until(lambda: len(clients) > 3)
    assert lines(caplog) == ["role is not announced by MQTT"]
    assert "Not authorized" in caplog.records[0].__dict__["fields"]["reason"]
    assert "hunter2" not in str([r.__dict__ for r in caplog.records])


async def test_changed_credentials_are_used_for_the_next_connection(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    broker.kill()
    broker.secure()
    broker.start()
    table = broker.table(password="hunter2")

    def write(text: str) -> None:
        Path(table["password_file"]).write_text(text)

    def unchanged() -> int:
        return [r.getMessage() for r in caplog.records].count("credentials not changed")

    async with announcing(**table) as announcer:
        await until(lambda: announcer.failures)
        write("two\nlines")  # what cannot be used is one line, and not used
        await until(lambda: unchanged() == 1)
        failures = announcer.failures
        await until(lambda: announcer.failures > failures + 1)
        write(PASSWORD)
        await until(lambda: announcer.up)
    assert unchanged() == 1


async def test_tls_with_a_client_certificate_and_a_password_connects(broker: Broker) -> None:
    broker.kill()
    broker.secure()
    broker.start()
    with watching(broker) as watcher:
        async with announcing(role=Role.PRIMARY, **broker.table()):
            await heard(watcher, PRIMARY, session="host-a")


async def test_a_refused_publication_is_logged(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    broker.kill()
    rights = broker.directory / "rights"
    rights.write_text("topic read #\n")
    rights.chmod(0o600)
    broker.lines.append(f"acl_file {rights}")
    broker.start()
    async with announcing(**broker.table()) as announcer:
        await until(lambda: announcer.failures)
    assert (
        f"publication to {SESSION} refused: Not authorized"
        in caplog.records[0].__dict__["fields"]["reason"]
    )


# --- settings, names


async def test_the_backoff_grows_until_a_connection_lasts() -> None:
    waits = ops.Backoff(chance=lambda: 0.5)
    failed = [waits.next_s(worked=False) for _ in range(4)]
    assert failed == sorted(failed)
    assert failed[-1] == 0.75 * ops.LONGEST_WAIT_S
    assert waits.next_s(worked=True) == 0.75 * ops.FIRST_WAIT_S


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)


@given(
    st.binary()
    | (SCALARS | st.builds(lambda value: {"epoch": value}, SCALARS)).map(
        lambda value: json.dumps(value).encode()
    )
)
def test_any_retained_payload_has_an_epoch_or_none(payload: bytes) -> None:
    assert -1 <= parse_epoch(payload) <= driver.LARGEST_EPOCH


def test_ids_are_single_levels_of_a_topic() -> None:
    assert topic_level("a+b#c%d e") == "a%2Bb%23c%25d e"


def test_a_client_id_is_unique_and_short_enough_for_every_broker() -> None:
    ids = {default_client_id(*ids) for ids in (("a", "b"), ("a", "c"), ("b", "a"))}
    assert len(ids) == 3
    assert all(len(i) == 23 and i.isalnum() and i.isascii() for i in ids)


async def test_a_ca_file_without_certificates_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ca"
    path.write_text("nothing")
    with pytest.raises(ConfigError, match=f"mqtt: ca_file {path} must have certificates"):
        made(broker="mqtts://127.0.0.1", ca_file=str(path))


async def test_a_certificate_without_its_key_is_refused(broker: Broker) -> None:
    broker.secure()
    table = broker.table()
    del table["key"]
    with pytest.raises(ConfigError, match="must be a certificate chain and its private key"):
        made(**table)


async def test_a_key_with_a_pass_phrase_is_refused_without_a_prompt(broker: Broker) -> None:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - of this test alone

    broker.secure()
    table = broker.table()
    path = Path(table["key"])
    key = serialization.load_pem_private_key(path.read_bytes(), None)  # noqa: ASYNC240 - one file
    path.write_bytes(  # noqa: ASYNC240 - one file
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"phrase"),
        )
    )
    with pytest.raises(ConfigError, match="without a pass phrase"):
        made(**table)


def test_without_the_extra_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "agent.ops.mqtt")
    monkeypatch.setitem(sys.modules, "aiomqtt", None)
    with pytest.raises(ConfigError, match=r"pip install client-failover-agent\[mqtt\]"):
        __import__("agent.ops.mqtt")
