"""What an agent reads of the answers of any server, and how it refuses what is none."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest

from agent.drivers.rest import endpoints
from agent.drivers.rest.client import RestClient
from agent.drivers.rest.exchange import Answer
from agent.errors import ServerError
from agent.model import (
    TICKS_PER_SECOND,
    GroupStatus,
    HeartbeatAnswer,
    HistoryEntry,
    Role,
    RoleOverride,
)
from agent.schema import api, codec
from agent.schema.codec import BodyError
from agent.schema.values import Shape

LIMIT_S = 30.0
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def answer(body: bytes) -> Answer:
    return Answer("test", "http://test", 200, httpx2.Headers(), body)


def one(shape: type[Shape]) -> Callable[[bytes], Any]:
    return lambda body: endpoints.decode_one(shape, answer(body))


def many(shape: type[Shape]) -> Callable[[bytes], Any]:
    return lambda body: endpoints.decode_many(shape, answer(body))


@asynccontextmanager
async def answered(body: bytes) -> AsyncIterator[RestClient]:
    """A client whose server answers every request with this body."""
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, content=body))
    client = RestClient(["http://test/clientfailover"], transport=transport)
    yield client
    await client.aclose()


def read_heartbeat(body: bytes) -> HeartbeatAnswer:
    return endpoints.decode_one(api.HeartbeatResponse, answer(body)).to_model()


read_status = one(api.GroupStatus)
read_session = one(api.ClientSession)
read_sessions = many(api.ClientSession)
read_history = many(api.HistoryEntry)


def test_what_is_not_known_is_left_out_of_a_request() -> None:
    heartbeat = codec.encode(api.HeartbeatRequest(score=100.0))
    assert json.loads(heartbeat) == {"FailoverScore": 100.0}
    release = codec.encode(api.ReleaseRequest(epoch=0, instance="i", reason="r"))
    assert json.loads(release) == {"Epoch": 0, "Instance": "i", "Reason": "r"}


async def test_a_v1_servers_groups_are_read_without_those_that_have_no_id() -> None:
    body = (
        b'[{"Id":"g","Name":null,"FailoverTimeout":null},{"Id":"h","FailoverTimeout":"90.00:00:00"},'
        b'{"Name":"none"}]'
    )
    async with answered(body) as client:
        groups = await client.groups(timeout_s=LIMIT_S)
    assert [(group.id, group.timeout_ticks) for group in groups] == [
        ("g", 60 * TICKS_PER_SECOND),
        ("h", 90 * 86_400 * TICKS_PER_SECOND),
    ]


async def test_a_group_without_an_id_is_refused() -> None:
    async with answered(b'{"Name":"n"}') as client:
        with pytest.raises(ServerError, match="a group without an Id"):
            await client.group("n", timeout_s=LIMIT_S)


def test_a_v1_servers_answers_are_read_with_what_they_leave_out_or_set_to_null() -> None:
    read = read_heartbeat(b'{"Role":"Primary","LastDataProcessedTime":null,"Extra":1}')
    assert read == HeartbeatAnswer(Role.PRIMARY)
    session = read_session(b'{"Id":"s","Heartbeat":null,"RoleOverride":null}').to_model()
    assert (session.role, session.record.override) == (Role.SECONDARY, RoleOverride.OFF)


def test_the_date_time_that_means_never_is_read_as_none() -> None:
    body = b'{"Role":1.0,"Epoch":7.0,"LastDataProcessedTime":"0001-01-01T00:00:00"}'
    assert read_heartbeat(body) == HeartbeatAnswer(Role.PRIMARY, epoch=7)


def test_the_store_of_an_answer_is_read() -> None:
    assert read_session(b'{"Id":"s","StoreId":"x"}').store_id == "x"
    assert read_session(b'{"Id":"s"}').store_id is None
    assert read_heartbeat(b'{"Role":0,"StoreId":"x"}').store_id == "x"
    assert read_status(b'{"StoreId":"x"}').store_id == "x"


def test_a_tenure_that_lasts_has_no_end() -> None:
    body = b'[{"Epoch":7,"SessionId":"s","Since":"2026-01-31T12:00:00Z","WhyStarted":"chosen"}]'
    assert [tenure.to_model() for tenure in read_history(body)] == [
        HistoryEntry(7, "s", NOON, "chosen")
    ]


def test_an_empty_object_is_a_status_without_anything() -> None:
    assert read_status(b" {} ").to_model() == GroupStatus(None, None, None)


ASKS = " (is this the address of a client failover service?)"


@pytest.mark.parametrize(
    ("read", "body", "sentence"),
    [
        (
            read_status,
            b"<!doctype html><title>Sign in</title>",
            "the answer is HTML or XML: it must be a JSON object, and begins with"
            ' "<!doctype html><title>Sign in</title>"' + ASKS,
        ),
        (read_status, b" ", "the answer is empty: it must be a JSON object" + ASKS),
        (read_status, b'{"a":1}', "none of the properties of GroupStatus" + ASKS),
        (read_status, b"7", "the answer is 7: it must be a JSON object" + ASKS),
        (
            read_status,
            b'{"Primary":7}',
            "Primary is 7: it must be a string of at most 1024 characters: the session that is primary"
            + ASKS,
        ),
        (
            read_status,
            b'{"Epoch":true}',
            "Epoch is true: it must be an integer from 0 to 9007199254740991: it grows with each"
            " tenure of a primary" + ASKS,
        ),
        (
            read_status,
            b'{"Failsafe":{"State":"Off","Revision":true}}',
            "Failsafe.Revision is true: it must be an integer from 0 to 9007199254740991: the revision of"
            " Members" + ASKS,
        ),
        (
            read_status,
            b'{"Failsafe":{}}',
            "Failsafe.State is missing: it must be one of Off, Ready, Restricted: while Restricted"
            " nobody is primary, and only Choosable may be promoted" + ASKS,
        ),
        (
            read_heartbeat,
            b'{"Epoch":7}',
            "Role is missing: it must be 0 or Secondary, 1 or Primary, 2 or PendingPrimary" + ASKS,
        ),
        (
            read_heartbeat,
            b'{"Role":3}',
            "Role: 3 is unknown: it must be 0 or Secondary, 1 or Primary, 2 or PendingPrimary"
            + ASKS,
        ),
        (
            read_heartbeat,
            b'{"Role":1,"LeaseDuration":10}',
            "LeaseDuration is 10: it must be a time-span: how long the next heartbeat is waited for"
            + ASKS,
        ),
        (
            read_session,
            b'{"Id":"s","Heartbeat":{"FailoverScore":101}}',
            "Heartbeat.FailoverScore is 101: it must be a number from 0 to 100" + ASKS,
        ),
        (
            read_session,
            b'{"Id":"s","Heartbeat":[]}',
            "Heartbeat is a list: it must be a JSON object" + ASKS,
        ),
        (read_sessions, b"{}", "the answer is an object: it must be a JSON list" + ASKS),
        (
            read_sessions,
            b'[{"Id":"s"},{}]',
            "[1].Id is missing: it must be a string: the id of the session" + ASKS,
        ),
        (read_sessions, b"[7]", "[0] is 7: it must be a JSON object" + ASKS),
        (
            read_status,
            b'{"PreviousPrimary":"x\\u0000y"}',
            'PreviousPrimary is "x\\u0000y": it must be a string of at most 1024 characters: the session of'
            " the tenure before" + ASKS,
        ),
        (
            read_history,
            b'[{"Epoch":1,"SessionId":"s","Since":"0001-01-01T00:00:00","WhyStarted":""}]',
            '[0].Since: "0001-01-01T00:00:00" is not a date-time: it must be ISO 8601, such as'
            " 2026-01-31T12:00:00Z" + ASKS,
        ),
    ],
)
def test_what_is_no_answer_is_refused_in_one_sentence(
    read: Callable[[bytes], Any], body: bytes, sentence: str
) -> None:
    with pytest.raises(ServerError) as caught:
        endpoints.decode_answer(answer(body), lambda one: read(one.body))
    assert f"answered 200 with something else: {sentence};" in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b"\xff{}",
        b"[" * 100_000,
        b'{"Primary":NaN}',
        b'{"Primary":1e999}',
        b'{"Primary":"\\ud800"}',
        b'{"Primary":',
        b"nul",
    ],
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(BodyError, match="must be"):
        read_status(body)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 994 + "]" * 994, '"\\u0000"'])
def test_an_answer_of_odd_unknown_properties_alone_is_none_of_the_group_api(value: str) -> None:
    """Python cannot decode some of these values. The caller gets a BodyError all the same."""
    with pytest.raises(BodyError):
        read_status(f'{{"X":{value}}}'.encode())


@pytest.mark.parametrize("name", ["Primary", "PendingPrimary", "PreviousPrimary", "StoreId"])
def test_a_long_name_is_refused(name: str) -> None:
    """Hooks receive it in a variable, and the kernel starts no program with a very long one."""
    with pytest.raises(BodyError, match=f"{name} "):
        read_status(json.dumps({name: "x" * 2000}).encode())
