"""The requests of one session: each posts its event, even after a fault of the server or of ours."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from agent.core.effects import Release, SendHeartbeat
from agent.core.events import (
    Event,
    HeartbeatAnswered,
    HeartbeatFailed,
    HeartbeatFailure,
    Joined,
    Left,
    Released,
    StatusRead,
    Stop,
)
from agent.core.options import FailsafeOptions
from agent.core.session import Options, Session
from agent.daemon.requests import QUICK_READS, Requests
from agent.daemon.telemetry import Stats
from agent.drivers.rest import RestClient
from agent.errors import ExitCode
from agent.model import HeartbeatAnswer, Role
from agent.ops.clock import Clock
from agent.schema.read import validate
from agent.schema.settings import AgentSettings
from tests.bad_server import PATIENCE_S, Raw, answer, served, until

BEAT_S = 0.65
"""The heartbeat interval of these requests."""

REFUSAL = {"Error": "No", "Reason": "No.", "Resolution": "Wait."}
PROBLEM = b'{"title": "Too many", "status": 429}'
EXTENDED: dict[str, dict[str, Any]] = {
    "clientsessions": {"Id": "s", "StoreId": "ours"},
    "heartbeat": {"Role": 1, "Epoch": 7, "Revision": 3, "StoreId": "ours"},
    "status": {"Primary": "s", "Epoch": 7, "Revision": 3, "StoreId": "ours"},
}
PLAIN: dict[str, dict[str, Any]] = {
    kind: {name: value for name, value in body.items() if name != "StoreId"}
    for kind, body in EXTENDED.items()
}


@dataclass
class Api(Raw):
    """A server that answers each kind of request with a document, or with its fault."""

    documents: dict[str, dict[str, Any]]
    faults: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, list[str]], Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.talk = self.serve

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, _, body = (await self.request(reader)).partition(b"\r\n\r\n")
            url = urlsplit(head.split()[1].decode())
            kind = url.path.rstrip("/").rpartition("/")[2]
            self.asked.append((kind, parse_qs(url.query), json.loads(body) if body else None))
            document = {"Id": "g", "FailoverTimeout": "00:00:03"} | self.documents.get(kind, {})
            writer.write(self.faults.get(kind) or answer(json.dumps(document).encode()))
            await writer.drain()

    def count(self, kind: str) -> int:
        return [asked[0] for asked in self.asked].count(kind)

    def last(self, kind: str) -> tuple[dict[str, list[str]], Any]:
        query, body = next(asked[1:] for asked in reversed(self.asked) if asked[0] == kind)
        return query, body


@dataclass
class Stand:
    """Requests with what they need; ``events`` has what they post."""

    requests: Requests
    session: Session
    client: RestClient
    stats: Stats
    events: list[Event]

    async def join(self) -> None:
        await self.requests.join()
        joined = self.events.pop()
        assert isinstance(joined, Joined)
        self.session.store_id = joined.store_id


def settings_for(*endpoints: str, **more: Any) -> AgentSettings:
    form = {"endpoint": list(endpoints), "group": "g", "failover_timeout": 3.0, "guard": False}
    return validate(AgentSettings, {**form, **more})


@asynccontextmanager
async def standing(
    *endpoints: str,
    store_id: str | None = None,
    failsafe: FailsafeOptions | None = None,
    **more: Any,
) -> AsyncIterator[Stand]:
    settings = settings_for(*endpoints, **more)
    session = Session(settings.timing, Options("s", store_id=store_id, failsafe=failsafe))
    client, stats, events = RestClient(settings.endpoint), Stats(), list[Event]()
    requests = Requests(
        settings,
        session,
        events.append,
        lambda: (100.0, None),
        instance="this-process",
        stats=stats,
        clock=Clock(),
    )
    requests.set_client(client)
    try:
        yield Stand(requests, session, client, stats, events)
    finally:
        await client.aclose()


@asynccontextmanager
async def at(documents: dict[str, dict[str, Any]], **more: Any) -> AsyncIterator[tuple[Api, Stand]]:
    async with serving(documents) as api, standing(api.endpoint(), **more) as stand:
        yield api, stand


@asynccontextmanager
async def serving(documents: dict[str, dict[str, Any]]) -> AsyncIterator[Api]:
    async with served(raw=(api := Api(documents))):
        yield api


RELEASE = Release(7, "stopping", 0.0)

# --- each call ends by its event ------------------------------------------------------------------

CALLS: dict[str, tuple[Callable[[Requests], Awaitable[None]], type[Event]]] = {
    "heartbeat": (lambda requests: requests.send_heartbeat(SendHeartbeat(1)), HeartbeatFailed),
    "release": (lambda requests: requests.release(RELEASE), Released),
    "leave": (lambda requests: requests.leave(lambda: None), Left),
}

FAULTS = {
    "closes": b"",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
    "500": answer(b"", "500 No"),
    "problem": answer(b'{"title": "No"}', "400 No", "application/problem+json"),
    "not the API": answer(b"<html>", "404 No", "text/html"),
    "garbage": b"garbage\r\n\r\n",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CALLS)
async def test_a_failed_request_posts_its_event(name: str, fault: str) -> None:
    call, event = CALLS[name]
    async with at(EXTENDED) as (api, stand):
        await stand.join()
        kind = "s" if name == "leave" else name
        api.faults[kind] = FAULTS[fault] or b"HTTP/1.1 200 OK\r\n"
        if not FAULTS[fault]:
            api.talk = api.says()
        await call(stand.requests)
    assert [type(event) for event in stand.events] == [event]


@pytest.mark.parametrize(
    ("name", "event"), [(name, event) for name, (_, event) in CALLS.items()] + [("join", Stop)]
)
async def test_an_internal_error_posts_the_event_and_is_raised(
    name: str, event: type[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 3: the session goes on, and the supervisor reports the failure."""
    async with at(EXTENDED) as (_, stand):
        await stand.join()

        async def fails(*_args: Any, **_options: Any) -> None:
            raise KeyError("a bug")

        method = "ensure_group" if name == "join" else name
        monkeypatch.setattr(stand.client, method, fails)
        call = CALLS[name][0] if name in CALLS else Requests.join
        with pytest.raises(KeyError):
            await call(stand.requests)
    assert [type(event) for event in stand.events] == [event]
    assert not stand.stats.in_flight
    if isinstance(stand.events[0], Stop):
        assert stand.events[0].code is ExitCode.TASK_FAILED


async def test_a_release_is_repeated_while_the_server_restarts() -> None:
    async with at(EXTENDED) as (api, stand):
        await stand.join()
        api.faults["release"] = answer(b"", "503 Starting")
        releasing = asyncio.create_task(stand.requests.release(RELEASE))
        await until(lambda: api.count("release") >= 2)
        assert not stand.events
        del api.faults["release"]
        await releasing
    assert stand.events == [Released()]


async def test_a_release_names_the_instance_that_held_the_tenure() -> None:
    async with at(EXTENDED) as (api, stand):
        await stand.join()
        await stand.requests.release(RELEASE)
        assert api.last("release")[1]["Instance"] == stand.requests.instance
        await stand.requests.release(Release(7, "demoted at the start", 0.0, instance="former"))
        assert api.last("release")[1]["Instance"] == "former"


async def test_the_previous_tenure_is_released_before_joining_if_its_store_is_known() -> None:
    async with at(EXTENDED, store_id="ours") as (api, stand):
        await stand.requests.release(Release(7, "demoted at the start", 0.0, instance="former"))
        assert api.count("release") == 1


# --- extensions -----------------------------------------------------------------------------------


async def test_a_plain_v1_server_gets_no_extension(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault 19: a strict v1 server answers 400 to unknown fields."""
    async with at(PLAIN) as (api, stand):
        await stand.join()
        monkeypatch.setattr(Session, "newest_epoch", 7)
        await stand.requests.send_heartbeat(SendHeartbeat(1))
        assert api.last("heartbeat") == ({}, {"FailoverScore": 100.0})
        following = asyncio.create_task(stand.requests.follow_status())
        await until(lambda: api.count("status") >= 2)
        following.cancel()
        assert api.last("status") == ({}, None)
        await stand.requests.release(RELEASE)
        assert api.count("release") == 0
    assert stand.events[0] == HeartbeatAnswered(1, HeartbeatAnswer(Role.PRIMARY))
    assert isinstance(stand.events[1], StatusRead)
    assert (stand.events[1].status.primary, stand.events[1].status.revision) == ("s", None)
    assert stand.events[-1] == Released()


async def test_a_server_with_a_store_id_gets_extensions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with at(EXTENDED) as (api, stand):
        await stand.join()
        monkeypatch.setattr(Session, "newest_epoch", 7)
        await stand.requests.send_heartbeat(SendHeartbeat(1))
        assert api.last("heartbeat")[1] == {
            "FailoverScore": 100.0,
            "Instance": stand.requests.instance,
            "Epoch": 7,
        }
        following = asyncio.create_task(stand.requests.follow_status())
        await until(lambda: api.count("status") >= 2)
        following.cancel()
        assert api.last("status")[0]["after"] == ["3"]


# --- another store --------------------------------------------------------------------------------

OTHERS = {kind: {**body, "StoreId": "other"} for kind, body in EXTENDED.items()}


async def test_a_heartbeat_answered_by_another_store_has_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Fault 9."""
    async with at(EXTENDED) as (api, stand):
        await stand.join()
        api.documents = OTHERS
        for beat in range(1, 4):
            await stand.requests.send_heartbeat(SendHeartbeat(beat))
    assert {event.failure for event in stand.events if isinstance(event, HeartbeatFailed)} == {
        HeartbeatFailure.OTHER_STORE
    }
    assert stand.stats.heartbeats_failed["other_store"] == 3
    assert caplog.text.count("coordinator of another store refused") == 1
    assert stand.requests.group_data is None


async def test_a_status_of_another_store_is_not_posted() -> None:
    async with at(EXTENDED) as (api, stand):
        await stand.join()
        api.documents = OTHERS
        following = asyncio.create_task(stand.requests.follow_status())
        await until(lambda: api.count("status") >= 2)
        following.cancel()
    assert not stand.events


async def test_a_start_at_another_store_only_ends_with_its_own_exit_code() -> None:
    async with serving(OTHERS) as one, serving(OTHERS) as two:
        both = (one.endpoint(), two.endpoint())
        async with standing(*both, store_id="ours", startup_timeout=1.0) as stand:
            await stand.requests.join()
    failure = stand.requests.failure
    assert failure is not None
    assert failure.exit_code is ExitCode.OTHER_STORE
    assert stand.events == [Stop(ExitCode.OTHER_STORE, str(failure))]
    assert min(api.count("clientsessions") for api in (one, two)) >= 1


async def test_a_start_finds_our_store_behind_another_one() -> None:
    async with serving(OTHERS) as other, serving(EXTENDED) as ours:
        endpoints = (other.endpoint(), ours.endpoint())
        async with standing(*endpoints, store_id="ours", startup_timeout=PATIENCE_S) as stand:
            await stand.requests.join()
            assert stand.client.endpoint == ours.endpoint()
    assert [type(event) for event in stand.events] == [Joined]


# --- the start ------------------------------------------------------------------------------------


@pytest.mark.parametrize("failsafe", [FailsafeOptions("http://192.0.2.11:5480"), None])
async def test_a_member_that_starts_behind_a_portal_goes_on_to_vote(
    failsafe: FailsafeOptions | None,
) -> None:
    """With failsafe an exit would cost the primary its vote; the coordinator's own refusal is final."""
    refused = answer(b"<html>Log in</html>", "403 Forbidden", "text/html")
    async with at(EXTENDED, failsafe=failsafe) as (api, stand):
        api.faults["groups"] = refused
        joining = asyncio.create_task(stand.requests.join())
        await until(lambda: api.count("groups") >= 2 or joining.done())
        assert joining.done() is (failsafe is None)
        if failsafe is not None:
            by_coordinator = refused.replace(b"\r\n", b"\r\nOperation-Id: 1\r\n", 1)
            api.faults["groups"] = by_coordinator
        await joining
    assert stand.requests.failure is not None
    assert stand.requests.failure.exit_code is ExitCode.NOT_AUTHORISED


async def test_startup_timeout_ends_an_attempt_that_hangs() -> None:
    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with at(EXTENDED, startup_timeout=0.2, request_timeout=0.9) as (api, stand):
        api.talk = silent
        began = time.monotonic()
        await stand.requests.join()
        assert time.monotonic() - began < 1.5
    assert stand.requests.failure is not None
    assert stand.requests.failure.exit_code is ExitCode.NO_ANSWER


async def test_joining_obeys_retry_after() -> None:
    async with at(EXTENDED) as (api, stand):
        api.faults["groups"] = b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
        joining = asyncio.create_task(stand.requests.join())
        await until(lambda: api.count("groups") == 1)
        refused_at = time.monotonic()
        del api.faults["groups"]
        await joining
        assert time.monotonic() - refused_at > 0.9
        assert api.count("groups") == 2
    assert [type(event) for event in stand.events] == [Joined]


# --- the URL of failsafe --------------------------------------------------------------------------

URL = "http://192.0.2.11:5480"
WITH_URL = {"Id": "s", "Name": "s", "Instance": "this-process", "FailsafeUrl": URL}
WITHOUT = {"Id": "s", "Name": "s"}


async def test_a_registration_has_the_url_so_that_failsafe_stays_on() -> None:
    async with at(EXTENDED, failsafe=FailsafeOptions(URL)) as (api, stand):
        await stand.join()
        assert api.last("clientsessions")[1] == WITH_URL
        await stand.join()
        assert api.last("clientsessions")[1] == WITH_URL
        assert api.count("status") == 1, "the store is known"


async def test_a_plain_v1_server_gets_no_url_in_a_registration() -> None:
    async with at(PLAIN, failsafe=FailsafeOptions(URL)) as (api, stand):
        for _ in range(2):
            await stand.join()
            assert api.last("clientsessions")[1] == WITHOUT


async def test_without_failsafe_a_registration_takes_no_other_request() -> None:
    async with at(EXTENDED) as (api, stand):
        await stand.join()
        assert (api.last("clientsessions")[1], api.count("status")) == (WITHOUT, 0)


async def test_where_the_status_may_not_be_read_the_heartbeat_brings_the_url() -> None:
    async with at(EXTENDED, failsafe=FailsafeOptions(URL)) as (api, stand):
        api.faults["status"] = answer(json.dumps(REFUSAL).encode(), "403 Forbidden")
        await stand.join()
        assert api.last("clientsessions")[1] == WITHOUT
        await stand.requests.send_heartbeat(SendHeartbeat(1))
        assert api.last("heartbeat")[1]["FailsafeUrl"] == URL


async def test_a_registration_waits_for_a_status_that_fails() -> None:
    async with at(EXTENDED, failsafe=FailsafeOptions(URL)) as (api, stand):
        api.faults["status"] = answer(json.dumps(REFUSAL).encode(), "503 Busy")
        joining = asyncio.create_task(stand.requests.join())
        await until(lambda: api.count("status") >= 2)
        assert api.count("clientsessions") == 0
        del api.faults["status"]
        await joining
        assert api.last("clientsessions")[1] == WITH_URL


# --- contact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_coordinator", [True, False])
@pytest.mark.parametrize(
    "status", ["400 Bad Request", "401 Unauthorized", "403 Forbidden", "404 Not Found", "429 Wait"]
)
@pytest.mark.parametrize("body", [json.dumps(REFUSAL).encode(), PROBLEM, b"<html>Log in</html>"])
async def test_r26_a_refusal_by_a_portal_or_a_proxy_is_no_contact(
    *, status: str, body: bytes, by_coordinator: bool
) -> None:
    """A holder that took it for contact would ask nobody, and lose the role in an outage."""
    async with at(EXTENDED) as (api, stand):
        await stand.join()
        kind = "application/problem+json" if body is PROBLEM else "application/json"
        refused = answer(body, status, kind)
        if by_coordinator:
            body = json.dumps(REFUSAL).encode()
            refused = answer(body, status).replace(b"\r\n", b"\r\nOperation-Id: 1\r\n", 1)
        api.faults["heartbeat"] = refused
        await stand.requests.send_heartbeat(SendHeartbeat(1))
    [failed] = stand.events
    assert isinstance(failed, HeartbeatFailed)
    assert failed.contact is by_coordinator


async def test_r26_a_fault_of_the_coordinator_is_no_contact() -> None:
    async with at(EXTENDED) as (api, stand):
        await stand.join()
        unavailable = answer(json.dumps(REFUSAL).encode(), "503 Service Unavailable")
        api.faults["heartbeat"] = unavailable.replace(b"\r\n", b"\r\nOperation-Id: 1\r\n", 1)
        await stand.requests.send_heartbeat(SendHeartbeat(1))
    [failed] = stand.events
    assert isinstance(failed, HeartbeatFailed)
    assert not failed.contact


# --- too many requests ----------------------------------------------------------------------------


async def test_a_429_of_a_proxy_counts_as_lost_contact(caplog: pytest.LogCaptureFixture) -> None:
    """Fault 20: the role was lost without a line in the log."""
    async with at(EXTENDED) as (api, stand):
        await stand.join()
        for body, kind in ((b"slow down", "text/plain"), (PROBLEM, "application/problem+json")):
            caplog.clear()
            api.faults["heartbeat"] = answer(body, "429 Too Many Requests", kind)
            await stand.requests.send_heartbeat(SendHeartbeat(1))
            await stand.requests.send_heartbeat(SendHeartbeat(2))
            assert caplog.text.count("heartbeat failed") == 1
            del api.faults["heartbeat"]
            await stand.requests.send_heartbeat(SendHeartbeat(3))
    assert [event.failure for event in stand.events if isinstance(event, HeartbeatFailed)] == [
        HeartbeatFailure.BACK_OFF
    ] * 4


async def test_only_the_first_429_of_the_api_counts_as_contact(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with at(EXTENDED) as (api, stand):
        await stand.join()
        api.faults["heartbeat"] = answer(json.dumps(REFUSAL).encode(), "429 Too Many Requests")
        await stand.requests.send_heartbeat(SendHeartbeat(1))
        assert "heartbeat failed" not in caplog.text
        await stand.requests.send_heartbeat(SendHeartbeat(2))
        await stand.requests.send_heartbeat(SendHeartbeat(3))
        assert caplog.text.count("heartbeat failed") == 1
        del api.faults["heartbeat"]
        with caplog.at_level(logging.INFO):
            await stand.requests.send_heartbeat(SendHeartbeat(4))
        assert "heartbeat answered again" in caplog.text


async def test_a_429_of_the_api_is_logged_at_once_if_a_lease_may_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 20: if it came late, or asked for a pause, the role was lost before the second one came."""
    monkeypatch.setattr(Session, "lease_until", 7.0)
    async with at(EXTENDED) as (api, stand):
        await stand.join()
        api.faults["heartbeat"] = answer(json.dumps(REFUSAL).encode(), "429 Too Many Requests")
        await stand.requests.send_heartbeat(SendHeartbeat(1))
    assert caplog.text.count("heartbeat failed") == 1


# --- status reads ---------------------------------------------------------------------------------


def rising(api: Api) -> None:
    """Each status has another revision."""

    class Rising(dict[str, Any]):
        def get(self, kind: str, default: Any = None) -> Any:
            return (
                {**EXTENDED["status"], "Revision": len(api.asked)} if kind == "status" else default
            )

    api.documents = Rising()


def refusing(status: str, retry_after: str = "") -> Callable[[Api], None]:
    head = f"HTTP/1.1 {status}\r\n{retry_after}Content-Length: 0\r\n\r\n".encode()

    def arrange(api: Api) -> None:
        api.faults["status"] = head

    return arrange


@pytest.mark.parametrize(
    ("arrange", "quick", "pause_s"),
    [
        (lambda _: None, 2, BEAT_S),
        (rising, QUICK_READS + 1, BEAT_S),
        (refusing("404 Gone"), 1, BEAT_S),
        (refusing("429 Slow"), 1, BEAT_S),
        (refusing("503 Busy", "Retry-After: 1\r\n"), 1, 1.0),
    ],
    ids=["unchanged", "rising", "404", "429", "Retry-After"],
)
async def test_status_reads_that_are_answered_at_once_do_not_spin(
    arrange: Callable[[Api], None], quick: int, pause_s: float
) -> None:
    """Fault 16: 890 requests a second from one agent."""
    async with at(EXTENDED) as (api, stand):
        assert stand.session.timing.heartbeat_interval_s == pytest.approx(BEAT_S)
        await stand.join()
        arrange(api)
        following = asyncio.create_task(stand.requests.follow_status())
        await until(lambda: api.count("status") > quick)
        began_s = time.monotonic()
        await until(lambda: api.count("status") > quick + 1)
        following.cancel()
        await asyncio.wait([following])
        assert time.monotonic() - began_s > 0.8 * pause_s


async def test_consecutive_changes_are_read_without_a_pause() -> None:
    async with at(EXTENDED) as (api, stand):
        await stand.join()
        rising(api)
        following = asyncio.create_task(stand.requests.follow_status())
        await until(lambda: len(stand.events) >= 4)
        following.cancel()
        began = stand.events[:4]
    assert all(isinstance(event, StatusRead) for event in began)
