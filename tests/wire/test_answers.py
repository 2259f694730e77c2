"""What a caller sends, and what it reads and refuses: compared with the coordinator's own shapes."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from agent.model import (
    TICKS_PER_SECOND,
    GroupConfig,
    HeartbeatAnswer,
    HistoryEntry,
    Role,
    RoleOverride,
    SessionConfig,
)
from agent.wire import answers, shapes

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
READERS: list[tuple[type[BaseModel], Callable[[bytes], Any]]] = [
    (shapes.Version, answers.read_version),
    (shapes.GroupConfiguration, lambda body: answers.read_groups(b"[%s]" % body)),
    (shapes.ClientSession, answers.read_session),
    (shapes.ClientSession, lambda body: answers.read_sessions(b"[%s]" % body)),
    (shapes.HeartbeatResponse, answers.read_heartbeat),
    (shapes.GroupStatus, answers.read_status),
    (shapes.HistoryEntry, lambda body: answers.read_history(b"[%s]" % body)),
]

# --- what is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        GroupConfig("g", 5_000_000, "n", "d", {"a": {"b": None}}),
        GroupConfig("Gruppe ü", 90 * 86_400 * TICKS_PER_SECOND // 90),
    ],
)
def test_the_coordinator_reads_a_group_as_it_was_meant(config: GroupConfig) -> None:
    body = answers.group_body(config)
    assert shapes.GroupRequest.model_validate_json(body).to_model() == config


@pytest.mark.parametrize("config", [SessionConfig("s", "n", {"a": 1}), SessionConfig("s")])
def test_the_coordinator_reads_a_session_as_it_was_meant(config: SessionConfig) -> None:
    body = answers.session_body(config)
    assert shapes.SessionRequest.model_validate_json(body).to_model() == config


def test_the_coordinator_reads_a_heartbeat_as_it_was_meant() -> None:
    body = answers.heartbeat_body(97.5, NOON, "i", 7)
    assert shapes.HeartbeatRequest.model_validate_json(body) == shapes.HeartbeatRequest(
        FailoverScore=97.5, LastDataProcessedTime=NOON, Instance="i", Epoch=7
    )


def test_the_coordinator_reads_a_release_as_it_was_meant() -> None:
    body = answers.release_body(7, "i", 2.5, "stopping", NOON)
    assert shapes.ReleaseRequest.model_validate_json(body) == shapes.ReleaseRequest(
        Epoch=7,
        Instance="i",
        HoldOffPeriod=25_000_000,
        Reason="stopping",
        LastDataProcessedTime=NOON,
    )


def test_what_is_not_known_is_left_out() -> None:
    assert json.loads(answers.heartbeat_body(100.0, None, None, None)) == {"FailoverScore": 100.0}
    assert json.loads(answers.release_body(0, "i", None, "r", None)) == {
        "Epoch": 0,
        "Instance": "i",
        "Reason": "r",
    }


# --- what is answered ---------------------------------------------------------------------------


def test_a_v1_servers_answers_are_read_with_what_they_leave_out_or_set_to_null() -> None:
    groups = answers.read_groups(
        b'[{"Id":"g","Name":null,"FailoverTimeout":null},{"Id":"h","FailoverTimeout":"90.00:00:00"},'
        b'{"Name":"none"}]'
    )
    assert [(group.id, group.timeout_ticks) for group in groups] == [
        ("g", 60 * TICKS_PER_SECOND),
        ("h", 90 * 86_400 * TICKS_PER_SECOND),
    ]
    answer = answers.read_heartbeat(b'{"Role":"Primary","LastDataProcessedTime":null,"Extra":1}')
    assert answer == HeartbeatAnswer(Role.PRIMARY)
    session = answers.read_session(b'{"Id":"s","Heartbeat":null,"RoleOverride":null}')
    assert (session.role, session.record.override) == (Role.SECONDARY, RoleOverride.OFF)


def test_never_is_read_as_none() -> None:
    body = b'{"Role":1.0,"Epoch":7.0,"LastDataProcessedTime":"0001-01-01T00:00:00"}'
    assert answers.read_heartbeat(body) == HeartbeatAnswer(Role.PRIMARY, epoch=7)


def test_the_store_of_an_answer_is_read() -> None:
    assert answers.read_store_id(b'{"Id":"s","StoreId":"x"}') == "x"
    assert answers.read_store_id(b'{"Id":"s"}') is None
    assert answers.read_heartbeat(b'{"Role":0,"StoreId":"x"}').store_id == "x"
    assert answers.read_status(b'{"StoreId":"x"}').store_id == "x"


def test_a_tenure_that_lasts_has_no_end() -> None:
    body = b'[{"Epoch":7,"SessionId":"s","Since":"2026-01-31T12:00:00Z","WhyStarted":"chosen"}]'
    assert answers.read_history(body) == [HistoryEntry(7, "s", NOON, "chosen")]


def test_an_empty_object_is_a_status_without_anything() -> None:
    assert answers.read_status(b" {} ").primary is None


ASKS = " (is this the address of a client failover service?)"


@pytest.mark.parametrize(
    ("read", "body", "sentence"),
    [
        (
            answers.read_status,
            b"<!doctype html><title>Sign in</title>",
            "the answer is HTML or XML: it must be a JSON object, and begins with"
            ' "<!doctype html><title>Sign in</title>"' + ASKS,
        ),
        (answers.read_status, b" ", "the answer is empty: it must be a JSON object" + ASKS),
        (answers.read_status, b'{"a":1}', "none of the properties of GroupStatus"),
        (answers.read_status, b"7", "the answer is 7: it must be a JSON object" + ASKS),
        (answers.read_status, b'{"Primary":7}', "Primary is 7: it must be a string" + ASKS),
        (
            answers.read_status,
            b'{"Primary":"\\ud800"}',
            'Primary is "\ud800": it must be a string' + ASKS,
        ),
        (
            answers.read_status,
            b'{"Epoch":true}',
            "Epoch is true: it must be an integer from 0 to 9007199254740991" + ASKS,
        ),
        (answers.read_heartbeat, b'{"Epoch":7}', "Role is missing" + ASKS),
        (
            answers.read_heartbeat,
            b'{"Role":3}',
            "Role: 3 is unknown: it must be 0 or Secondary, 1 or Primary, 2 or PendingPrimary"
            + ASKS,
        ),
        (
            answers.read_heartbeat,
            b'{"Role":1,"LeaseDuration":10}',
            "LeaseDuration is 10: it must be a time-span such as 00:01:00" + ASKS,
        ),
        (
            answers.read_session,
            b'{"Id":"s","Heartbeat":{"FailoverScore":101}}',
            "Heartbeat.FailoverScore is 101: it must be a number from 0 to 100" + ASKS,
        ),
        (
            answers.read_session,
            b'{"Id":"s","Heartbeat":[]}',
            "Heartbeat is a list: it must be a JSON object" + ASKS,
        ),
        (answers.read_sessions, b"{}", "the answer is an object: it must be a JSON list" + ASKS),
        (answers.read_sessions, b'[{"Id":"s"},{}]', "[1].Id is missing" + ASKS),
        (answers.read_sessions, b"[7]", "[0] is 7: it must be a JSON object" + ASKS),
        (answers.read_group, b'{"Name":"n"}', "a group without an Id"),
        (
            answers.read_history,
            b'[{"Epoch":1,"SessionId":"s","Since":"0001-01-01T00:00:00","WhyStarted":""}]',
            '[0].Since: "0001-01-01T00:00:00" is not a date-time: it must be ISO 8601, such as'
            " 2026-01-31T12:00:00Z" + ASKS,
        ),
    ],
)
def test_what_is_no_answer_is_refused_in_one_sentence(
    read: Callable[[bytes], Any], body: bytes, sentence: str
) -> None:
    with pytest.raises(answers.AnswerError) as caught:
        read(body)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "body",
    [b"\xff{}", b"[" * 100_000, b'{"Primary":NaN}', b'{"Primary":1e999}', b'{"Primary":', b"nul"],
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(answers.AnswerError, match="must be a JSON object"):
        answers.read_status(body)


# --- both ends agree ----------------------------------------------------------------------------

SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 103),
    st.sampled_from([2**53 - 1, 2**53, 1e300, -0.0, 0.5, 7.0]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(["Primary", "secondary", "PENDINGPRIMARY", "Off"]),
    st.sampled_from(["00:00:10", "-1.02:03:04.5", "PT1M", "P1Y", "24:00:00", "99999999.00:00:00"]),
    st.sampled_from(["2026-01-31T12:00:00Z", "0001-01-01T00:00:00", "2026-02-30T00:00:00Z"]),
    st.sampled_from([[], ["a"], {}, {"a": None}]),
)


def _names(shape: type[BaseModel]) -> list[str]:
    return [*shape.model_fields, "Extra"]


def _objects(shape: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    values = SCALARS
    if shape is shapes.ClientSession:
        values = SCALARS | st.dictionaries(
            st.sampled_from(_names(shapes.SessionHeartbeat)), SCALARS, max_size=3
        )
    return st.dictionaries(st.sampled_from(_names(shape)), values)


def _good(shape: type[BaseModel]) -> dict[str, Any]:
    """What is needed, so that most draws are not refused for lack of it."""
    good = {
        "Id": "s",
        "Role": 1,
        "Version": "1",
        "Epoch": 1,
        "SessionId": "s",
        "Since": "2026-01-31T12:00:00Z",
        "WhyStarted": "chosen",
    }
    return {name: good[name] for name, info in shape.model_fields.items() if info.is_required()}


@pytest.mark.parametrize(("shape", "read"), READERS)
def test_an_answer_is_read_if_and_only_if_the_coordinator_could_have_given_it(
    shape: type[BaseModel], read: Callable[[bytes], Any]
) -> None:
    @settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
    @given(_objects(shape), st.booleans())
    def check(drawn: dict[str, Any], full: bool) -> None:  # noqa: FBT001 - hypothesis' own call
        given = _good(shape) | drawn if full else drawn
        body = json.dumps(given).encode()
        none_of_it = given and not given.keys() & shape.model_fields.keys()
        try:
            TypeAdapter(shape).validate_json(body)
        except ValidationError:
            with pytest.raises(answers.AnswerError):
                read(body)
        else:
            if not none_of_it:
                read(body)

    check()


def test_the_readers_know_every_property_of_the_shapes() -> None:
    tables: dict[type[BaseModel], Any] = {
        shapes.Version: answers._VERSION,
        shapes.GroupConfiguration: answers._GROUP,
        shapes.GroupStatus: answers._STATUS,
        shapes.ClientSession: answers._SESSION,
        shapes.SessionHeartbeat: answers._BEAT,
        shapes.HeartbeatResponse: answers._HEARTBEAT,
        shapes.HistoryEntry: answers._TENURE,
    }
    for shape, table in tables.items():
        needed = {name for name, info in shape.model_fields.items() if info.is_required()}
        assert set(table) == set(shape.model_fields), shape
        assert {name for name, known in table.items() if known.needed} == needed, shape
