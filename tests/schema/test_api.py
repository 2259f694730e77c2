"""The JSON shapes: what is read, what is refused and in which words, what is written."""

import json
import random
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, TypeVar

import jsonschema_rs
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core import NotSet

from agent import model
from agent.core.timing import LONGEST_LEASE_S, SHORTEST_LEASE_S
from agent.model import TICKS_PER_SECOND, Role, RoleOverride
from agent.schema import access, api, codec, failsafe_api, scalars, values
from agent.schema.codec import BodyError
from agent.schema.values import Shape
from tests.odd_json import ODD, ODD_JSON, WRONG, with_value

TICKS = st.integers(-scalars.MAX_TICKS - 1, scalars.MAX_TICKS)
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
SPANS = [values.LeaseSpan, values.ExpirationSpan, values.HoldOffSpan]
ROUND_TRIPS = 100_000
GENERATED = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
"""A slow draw on a busy machine is no failure."""

S = TypeVar("S", bound=Shape)


def read(shape: type[S], **properties: Any) -> S:
    return codec.decode(shape, json.dumps(properties).encode())


def complaint(shape: type[Shape], body: bytes | str) -> str:
    with pytest.raises(BodyError) as caught:
        codec.decode(shape, body.encode() if isinstance(body, str) else body)
    return str(caught.value)


# --- time-spans ---------------------------------------------------------------------------------


@settings(GENERATED)
@given(TICKS)
def test_a_time_span_survives_being_written_and_read(ticks: int) -> None:
    assert scalars.parse_time_span(scalars.format_time_span(ticks)) == ticks


@pytest.mark.long
def test_100000_random_time_spans_of_every_size_survive() -> None:
    chance = random.Random(20260131)
    for _ in range(ROUND_TRIPS):
        bits = chance.randrange(64)
        ticks = chance.getrandbits(bits) * chance.choice((1, -1))
        assert scalars.parse_time_span(scalars.format_time_span(ticks)) == ticks


@pytest.mark.parametrize(
    ("text", "ticks"),
    [
        ("00:01:00", 600_000_000),
        ("0:01:00", 600_000_000),
        ("-1.2:03:04.5", -937_845_000_000),
        ("1.02:03:04.5000000", 937_845_000_000),
        ("-00:00:00.5", -5_000_000),
        ("0.00:00:01", 10_000_000),
        ("00:00:00.0000001", 1),
        ("10675199.02:48:05.4775807", 2**63 - 1),
        ("-10675199.02:48:05.4775808", -(2**63)),
        ("PT1M", 600_000_000),
        ("P1DT2H", 936_000_000_000),
        ("PT0.5S", 5_000_000),
        ("PT0,5S", 5_000_000),
        ("P2W", 12_096_000_000_000),
        ("-PT90M", -54_000_000_000),
        ("PT36H", 1_296_000_000_000),
    ],
)
def test_time_spans_are_read_in_both_forms(text: str, ticks: int) -> None:
    assert scalars.parse_time_span(text) == ticks


@pytest.mark.parametrize(
    ("ticks", "text"),
    [
        (0, "00:00:00"),
        (600_000_000, "00:01:00"),
        (937_845_000_000, "1.02:03:04.5000000"),
        (-1, "-00:00:00.0000001"),
    ],
)
def test_time_spans_are_written_in_the_constant_form(ticks: int, text: str) -> None:
    assert scalars.format_time_span(ticks) == text


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("", "must be [-][d.]hh:mm:ss"),
        ("60", "must be [-][d.]hh:mm:ss"),
        ("1:0:00", "must be [-][d.]hh:mm:ss"),
        ("001:00:00", "must be [-][d.]hh:mm:ss"),
        ("24:00:00", "must be [-][d.]hh:mm:ss"),
        ("00:60:00", "must be [-][d.]hh:mm:ss"),
        ("00:00:60", "must be [-][d.]hh:mm:ss"),
        ("00:00:00.12345678", "must be [-][d.]hh:mm:ss"),
        ("00:01:00\n", "must be [-][d.]hh:mm:ss"),
        ("\u0660\u0660:\u0660\u0661:\u0660\u0660", "must be [-][d.]hh:mm:ss"),
        ("P", "an ISO 8601 duration such as PT1M"),
        ("P1DT", "an ISO 8601 duration such as PT1M"),
        ("P1M", "count in weeks or days, such as P30D"),
        ("P1Y2DT3H", "count in weeks or days, such as P30D"),
        ("10675199.02:48:05.4775808", "to 10675199.02:48:05.4775807"),
        ("99999999.00:00:00", "to 10675199.02:48:05.4775807"),
    ],
)
def test_what_is_no_time_span_is_refused_with_what_would_be_right(text: str, right: str) -> None:
    with pytest.raises(ValueError, match=re.escape(right)):
        scalars.parse_time_span(text)


def test_more_ticks_than_a_time_span_has_are_not_written() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        scalars.format_time_span(2**63)


@pytest.mark.long
@pytest.mark.parametrize("span", SPANS, ids=lambda span: span.__name__)
@settings(GENERATED, max_examples=30)
@given(data=st.data())
def test_a_schema_pattern_admits_only_what_is_read(
    span: type[values.TimeSpan], data: st.DataObject
) -> None:
    one = data.draw(st.sampled_from(span.schema["pattern"].split("|^")))
    text = data.draw(st.from_regex(re.compile(one.strip("^$")), fullmatch=True))
    assert span.low <= span.read(text) <= span.high


@pytest.mark.parametrize("span", [values.TimeSpan, *SPANS], ids=lambda span: span.__name__)
@settings(GENERATED)
@given(data=st.data())
def test_a_schema_pattern_admits_what_is_written(
    span: type[values.TimeSpan], data: st.DataObject
) -> None:
    whole_days = 10_675_199 * 86_400 * TICKS_PER_SECOND  # the last part of a day is not described
    bounds = max(span.low, 1 - whole_days), min(span.high, whole_days - 1)
    ticks = data.draw(st.integers(*bounds) | st.sampled_from(bounds))
    text = scalars.format_time_span(ticks)
    assert re.fullmatch(span.schema["pattern"], text)


# --- date-times ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-31T12:00:00Z", NOON),
        ("2026-01-31t12:00:00z", NOON),
        ("2026-01-31T12:00:00", NOON),
        ("2026-01-31T13:30:00+01:30", NOON),
        ("2026-01-31T07:00:00-0500", NOON),
        ("2026-01-31T12:00:00.1234567Z", NOON.replace(microsecond=123456)),
        ("2026-01-31T12:00:00.123456789012Z", NOON.replace(microsecond=123456)),
        ("2026-01-31T12:00:00.5Z", NOON.replace(microsecond=500000)),
        ("9999-12-31T23:59:59-12:00", datetime.max.replace(tzinfo=UTC)),
        ("0001-01-01T00:00:00", None),
        ("0001-01-01T00:00:00Z", None),
        ("0001-01-01T00:00:00.0000000+02:00", None),
        ("0001-01-01T00:30:00+02:00", None),
    ],
)
def test_date_times_are_read_as_utc_and_the_first_moment_as_never(
    text: str, moment: datetime | None
) -> None:
    assert scalars.parse_date_time(text) == moment


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1700000000",
        "2026-01-31",
        "20260131T120000Z",
        "2026-W05-6T12:00:00Z",
        "2026-02-30T12:00:00Z",
        "2026-01-31T25:00:00Z",
        "2026-01-31T12:00:00Z\n",
        "0000-01-01T00:00:00Z",
    ],
)
def test_what_is_no_date_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="such as 2026-01-31T12:00:00Z"):
        scalars.parse_date_time(text)


@settings(GENERATED)
@given(st.datetimes(datetime(1, 1, 2), timezones=st.just(UTC)))  # noqa: DTZ001 - a bound
def test_a_date_time_survives_being_written_and_read(moment: datetime) -> None:
    text = scalars.format_date_time(moment)
    assert text.endswith("Z")
    assert scalars.parse_date_time(text) == moment


def test_a_date_time_of_another_zone_is_written_in_utc() -> None:
    there = NOON.astimezone(timezone(timedelta(hours=5)))
    assert scalars.format_date_time(there) == "2026-01-31T12:00:00Z"


def test_never_is_refused_where_a_date_time_is_needed() -> None:
    entry = {"Epoch": 1, "SessionId": "a", "WhyStarted": "sole member"}
    body = json.dumps(entry | {"Since": "0001-01-01T00:00:00"})
    assert complaint(api.HistoryEntry, body).startswith("Since: ")


# --- enumerations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_role", [2, 2.0, "PendingPrimary", "pendingprimary", "PENDINGPRIMARY"]
)
def test_roles_are_read_as_numbers_and_as_names_in_any_case(given_role: object) -> None:
    assert read(api.HeartbeatResponse, Role=given_role).role.member is Role.PENDING_PRIMARY


@pytest.mark.parametrize("given_value", [True, 2, -1, "1", "Primary ", None, [], {}, 0.5])
def test_an_unknown_override_is_refused_with_the_known_ones(given_value: object) -> None:
    sentence = complaint(api.RoleOverrideRequest, json.dumps({"Value": given_value}))
    assert sentence.startswith("Value: ")
    assert sentence.endswith("is unknown: it must be 0 or Off, 1 or Primary")


def test_every_role_has_its_v1_number_or_its_name_when_names_are_wanted() -> None:
    answers = [api.HeartbeatResponse(role=values.ROLES[role]) for role in Role]
    assert json.loads(codec.encode(answers)) == [{"Role": 0}, {"Role": 1}, {"Role": 2}]
    assert json.loads(codec.encode(answers, enum_names=True)) == [
        {"Role": "Secondary"},
        {"Role": "Primary"},
        {"Role": "PendingPrimary"},
    ]


# --- conversions --------------------------------------------------------------------------------

MEMBERS = model.MemberSet(4, (model.Member("a", "http://a:1"), model.Member("b", "http://b:1")))

VALUES: list[tuple[type[Any], Any]] = [
    (api.GroupRequest, model.GroupConfig("g", 5_000_000, "n", "d", '{"a":{"b":null}}')),
    (api.GroupRequest, model.GroupConfig("g", 600_000_000)),
    (api.GroupConfiguration, model.GroupConfig("g", 5_000_000, "n", "d", '{"a":[null]}')),
    (api.GroupStatus, model.GroupStatus("a", "b", NOON, 7, 9, NOON, "c")),
    (api.GroupStatus, model.GroupStatus(None, None, None)),
    (api.SessionRequest, model.SessionConfig("s", "n", '{"a":1}')),
    (api.HeartbeatResponse, model.HeartbeatAnswer(Role.PRIMARY, NOON, 7, 9, 2.5, "a")),
    (api.HeartbeatResponse, model.HeartbeatAnswer(Role.SECONDARY)),
    (
        api.HeartbeatResponse,
        model.HeartbeatAnswer(Role.PRIMARY, epoch=7, cleared=6, failsafe=MEMBERS),
    ),
    (
        api.HeartbeatResponse,
        model.HeartbeatAnswer(Role.PRIMARY, cleared=0, failsafe=model.MemberSet(3, off="no URL")),
    ),
    (
        api.GroupStatus,
        model.GroupStatus(
            None,
            None,
            None,
            cleared=6,
            failsafe=model.FailsafeStatus(
                model.FailsafeState.RESTRICTED,
                "a may be active",
                4,
                MEMBERS.members,
                MEMBERS.members[:1],
                model.Lapsed("a", 7, NOON),
            ),
        ),
    ),
    (
        api.GroupStatus,
        model.GroupStatus("a", None, None, failsafe=model.FailsafeStatus(model.FailsafeState.OFF)),
    ),
    (api.HistoryEntry, model.HistoryEntry(7, "a", NOON, "chosen", NOON, "released")),
    (api.HistoryEntry, model.HistoryEntry(7, "a", NOON, "chosen")),
    (
        api.ClientSession,
        model.SessionView(
            model.SessionRecord(
                model.SessionConfig("s", "n", '{"a":1}'), RoleOverride.PRIMARY, NOON
            ),
            Role.PRIMARY,
            97.5,
            NOON,
            NOON,
        ),
    ),
    (
        api.ClientSession,
        model.SessionView(model.SessionRecord(model.SessionConfig("s")), Role.SECONDARY),
    ),
    (
        access.AccessControlRequest,
        model.AccessList(
            (
                model.AccessEntry(model.Trustee(3, "admins", "t"), denied=False, rights=31),
                model.AccessEntry(model.Trustee(2, "agent"), denied=True, rights=4),
            )
        ),
    ),
    (access.AccessControlList, model.AccessList()),
]


@pytest.mark.parametrize("enum_names", [False, True])
@pytest.mark.parametrize(("shape", "value"), VALUES)
def test_a_value_survives_the_wire_and_its_json_conforms_to_the_schema(
    shape: type[Any], value: Any, *, enum_names: bool
) -> None:
    body = codec.encode(shape.from_model(value), enum_names=enum_names)
    assert codec.decode(shape, body).to_model() == value
    document = {"components": {"schemas": codec.component_schemas()}}
    reference = {"$ref": f"#/components/schemas/{shape.__name__}"}
    jsonschema_rs.validator_for(document | reference, validate_formats=True).validate(
        json.loads(body)
    )


def test_a_request_that_the_server_will_refuse_can_be_sent_so_that_its_sentence_is_shown() -> None:
    group = model.GroupConfig("a/b", 1, "x" * 2000, additional='{"x":"%s"}' % ("y" * 20_000))
    sentence = complaint(api.GroupRequest, codec.encode(api.GroupRequest.from_model(group)))
    assert "it must be" in sentence
    session = api.SessionRequest.from_model(model.SessionConfig("a/b", "x" * 2000))
    assert complaint(api.SessionRequest, codec.encode(session)).startswith("Id is ")


def test_null_properties_are_left_out_but_not_inside_additional_data() -> None:
    group = model.GroupConfig("g", 600_000_000, additional='{"a":null}')
    body = codec.encode(api.GroupConfiguration.from_model(group))
    assert body == b'{"Id":"g","FailoverTimeout":"00:01:00","AdditionalData":{"a":null}}'


def test_a_session_without_a_heartbeat_still_has_the_heartbeat_object_that_v1_clients_read() -> (
    None
):
    view = model.SessionView(model.SessionRecord(model.SessionConfig("s")), Role.SECONDARY)
    assert json.loads(codec.encode(api.ClientSession.from_model(view))) == {
        "Id": "s",
        "Heartbeat": {"FailoverScore": 0.0},
        "Role": 0,
        "HeartbeatPosted": False,
        "RoleOverride": 0,
    }


def test_an_override_is_answered_with_its_end() -> None:
    record = model.SessionRecord(model.SessionConfig("s"), RoleOverride.PRIMARY, NOON)
    assert codec.encode(api.RoleOverrideResponse.from_model(record)) == (
        b'{"Value":1,"RoleOverrideExpirationTime":"2026-01-31T12:00:00Z"}'
    )


def test_a_heartbeat_of_the_published_client_is_read() -> None:
    body = b'{"FailoverScore":100,"LastDataProcessedTime":"0001-01-01T00:00:00","Other":{}}'
    beat = codec.decode(api.HeartbeatRequest, body)
    assert (beat.score, beat.last_data) == (100.0, None)


def test_a_heartbeat_of_our_agent_is_read_as_it_was_made() -> None:
    beat = api.HeartbeatRequest(
        score=99.5,
        last_data=NOON,
        instance="i",
        epoch=model.MAX_EPOCH,
        failsafe_url="https://host-a:8443/x",
        holds=7,
        failsafe_revision=4,
        promised=True,
    )
    assert codec.decode(api.HeartbeatRequest, codec.encode(beat)) == beat


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:1",
        "ftp://a",
        "http://",
        "http:///x",
        "http://a b",
        "http://a\n",
        "http://" + "a" * 250,
    ],
)
def test_a_failsafe_url_that_no_member_could_ask_is_refused(url: str) -> None:
    body = json.dumps({"FailoverScore": 1, "FailsafeUrl": url})
    assert complaint(api.HeartbeatRequest, body).startswith("FailsafeUrl is ")


def test_a_set_without_members_is_off() -> None:
    known = codec.decode(failsafe_api.FailsafeSet, b'{"Revision":3,"Members":[]}').to_model()
    assert known == model.MemberSet(3, off="the coordinator names no members")


# --- refusals -----------------------------------------------------------------------------------

LONG = "x" * 300


@pytest.mark.parametrize(
    ("shape", "body", "sentence"),
    [
        (
            api.HeartbeatRequest,
            "{}",
            "FailoverScore is missing: it must be a number from 0 to 100",
        ),
        (
            api.HeartbeatRequest,
            '{"FailoverScore":null}',
            "FailoverScore is null: it must be a num",
        ),
        (
            api.HeartbeatRequest,
            '{"FailoverScore":"5"}',
            'FailoverScore is "5": it must be a number',
        ),
        (
            api.HeartbeatRequest,
            '{"FailoverScore":true}',
            "FailoverScore is true: it must be a num",
        ),
        (
            api.HeartbeatRequest,
            '{"FailoverScore":100.5}',
            "FailoverScore is 100.5: it must be a n",
        ),
        (
            api.HeartbeatRequest,
            '{"FailoverScore":NaN}',
            "FailoverScore is NaN: it must be a number",
        ),
        (
            api.HeartbeatRequest,
            '{"FailoverScore":[[]]}',
            "FailoverScore is a list: it must be a nu",
        ),
        (
            api.HeartbeatRequest,
            '{"FailoverScore":1,"Epoch":9007199254740992}',
            "Epoch is 9007199254740992: it must be an integer from 0 to 9007199254740991",
        ),
        (
            api.HeartbeatRequest,
            '{"FailoverScore":1,"Epoch":-1}',
            "Epoch is -1: it must be an int",
        ),
        (
            api.HeartbeatRequest,
            json.dumps({"FailoverScore": 1, "Instance": LONG}),
            f'Instance is "{"x" * 60}" (300 characters): it must be a string of at most 128',
        ),
        (
            api.HeartbeatRequest,
            '{"FailoverScore":1,"LastDataProcessedTime":1700000000}',
            "LastDataProcessedTime: 1700000000 is not a date-time: it must be ISO 8601, such as 2026",
        ),
        (
            api.GroupRequest,
            '{"Id":"g"}',
            "FailoverTimeout is missing: it must be a time-span from 00:00:00.2000000 (0.2 s) to"
            " 24.00:00:00 (24 days), such as 00:01:00",
        ),
        (
            api.GroupRequest,
            '{"Id":"g","FailoverTimeout":60}',
            "FailoverTimeout is 60: it must be a",
        ),
        (
            api.GroupRequest,
            '{"Id":"g","FailoverTimeout":"00:00:00.1999999"}',
            "FailoverTimeout: 00:00:00.1999999 is out of range: it must be a time-span from 00:00:00.2000000",
        ),
        (
            api.GroupRequest,
            '{"Id":"g","FailoverTimeout":"P1M"}',
            'FailoverTimeout: "P1M" counts in years or months, which have no fixed length',
        ),
        (
            api.GroupRequest,
            '{"Id":"a/b","FailoverTimeout":"00:01:00"}',
            'Id is "a/b": it must be a string of 1 to 256 characters, without',
        ),
        (
            api.GroupRequest,
            '{"Id":"g","FailoverTimeout":"00:01:00","AdditionalData":{"a":[1e999]}}',
            "AdditionalData: it holds a number that is out of range: each must be finite",
        ),
        (
            api.RoleOverrideRequest,
            '{"Value":1,"ExpirationPeriod":"00:00:00"}',
            "ExpirationPeriod: 00:00:00 is out of range: it must be a time-span longer than 00:00:00",
        ),
        (
            api.ReleaseRequest,
            '{"Epoch":1,"HoldOffPeriod":"-00:00:01"}',
            "HoldOffPeriod: -00:00:01 is out of range: it must be a time-span from 00:00:00 to 1.00:00:00",
        ),
        (
            api.ReleaseRequest,
            '{"Epoch":1,"HoldOffPeriod":"1.00:00:00.0000001"}',
            "HoldOffPeriod: 1.00:00:00.0000001 is out of range: it must be a time-span from 00:00:00 to 1.00:00:00",
        ),
        (
            access.AccessControlRequest,
            '{"RoleTrusteeAccessControlEntries":[{"AccessType":1,"AccessRights":1,"Trustee":{}}]}',
            "RoleTrusteeAccessControlEntries[0].Trustee.Type is missing: it must be an integer from 1 to 3: 1",
        ),
        (
            access.AccessControlRequest,
            '{"RoleTrusteeAccessControlEntries":5}',
            "RoleTrusteeAccessControlEntries is 5: it must be a list of at most 1000 entries, of which at"
            " least one allows ManageAccessControl",
        ),
        (
            access.AccessControlRequest,
            '{"RoleTrusteeAccessControlEntries":[5]}',
            "RoleTrusteeAccessControlEntries[0] is 5: it must be a JSON object",
        ),
        (api.ReleaseRequest, "[1]", "the body is a list: it must be a JSON object"),
        (api.ReleaseRequest, "", "the body is empty: it must be a JSON object"),
        (api.ReleaseRequest, b"\xff\xfe", "the body is not JSON (not UTF-8)"),
        (
            api.ReleaseRequest,
            '{"Epoch":',
            "the body is not JSON (",
        ),
        (
            api.ReleaseRequest,
            "[" * 5000,
            "the body nests more than 200 levels deep: it must be nested less",
        ),
        (
            api.SessionRequest,
            '{"Id":"a","AdditionalData":' + '{"x":' * 63 + "1" + "}" * 64,
            "AdditionalData: it is too large: it must be an object of at most 16384 bytes, 1000 values"
            " and 62 levels",
        ),
        (
            api.SessionRequest,
            json.dumps({"Id": "a", "AdditionalData": {"x": [0] * 1000}}),
            "AdditionalData: it is too large: it must be",
        ),
        (
            api.GroupRequest,
            json.dumps(
                {"Id": "g", "FailoverTimeout": "00:01:00", "AdditionalData": {"x": "é" * 8190}}
            ),
            "AdditionalData: it is too large: it must be",
        ),
        (
            api.ReleaseRequest,
            '{"Epoch":' + "1" * 5000 + "}",
            "Epoch is out of range: it must be an integer from 0 to",
        ),
    ],
)
def test_a_refusal_names_the_property_the_given_value_and_what_is_right(
    shape: type[Shape], body: bytes | str, sentence: str
) -> None:
    assert complaint(shape, body).startswith(sentence)


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "a\n", "\x00", "\x7f", "\x9f", "x" * 257, 5])
def test_ids_that_could_not_be_addressed_are_refused(bad: object) -> None:
    assert complaint(api.SessionRequest, json.dumps({"Id": bad})).startswith("Id is ")


@pytest.mark.parametrize("good", ["a", "...", ".a", "..a", "a b", "Zürich %2F", "x" * 256, "🙂"])
def test_other_ids_are_accepted(good: str) -> None:
    assert read(api.SessionRequest, Id=good).id == good


@pytest.mark.parametrize("timeout_s", [SHORTEST_LEASE_S, 0.5, 60.0, LONGEST_LEASE_S])
def test_failover_timeouts_of_the_whole_stated_range_are_accepted(timeout_s: float) -> None:
    text = scalars.format_time_span(round(timeout_s * TICKS_PER_SECOND))
    group = read(api.GroupRequest, Id="g", FailoverTimeout=text).to_model()
    assert group.lease_s == timeout_s


def test_a_failover_timeout_over_24_days_is_refused() -> None:
    body = '{"Id":"g","FailoverTimeout":"24.00:00:00.0000001"}'
    assert "it must be a time-span from 00:00:00.2000000 (0.2 s) to 24.00:00:00" in complaint(
        api.GroupRequest, body
    )


@pytest.mark.parametrize("shape", [api.GroupRequest, api.SessionRequest])
@pytest.mark.parametrize(
    "additional",
    [
        {"x": [0] * 998},
        {"x": "é" * 8180},
        json.loads('{"x":' * 61 + "{}" + "}" * 61),
        {"n": 10**4000, "e": 1e-320, "t": "\x00\u2028", "": {"": [{}]}},
    ],
    ids=["values", "bytes", "levels", "odd"],
)
def test_additional_data_within_its_limits_is_repeated_as_it_was_given(
    shape: Any, additional: dict[str, Any]
) -> None:
    more = {"FailoverTimeout": "00:01:00"} if shape is api.GroupRequest else {}
    request = read(shape, Id="x", AdditionalData=additional, **more)
    body = codec.encode(shape.from_model(request.to_model()))
    assert json.loads(body)["AdditionalData"] == additional


def test_an_answer_may_have_more_additional_data_than_a_request() -> None:
    """Of a server without these limits: it is no reason not to join."""
    body = json.dumps({"Id": "a", "AdditionalData": {"x": ["y" * 100] * 1500}}).encode()
    assert codec.decode(api.ClientSession, body).to_model().record.config.id == "a"


# --- whatever comes -------------------------------------------------------------------------------

VALID: dict[type[Shape], dict[str, str]] = {
    api.GroupRequest: {"Id": '"g"', "FailoverTimeout": '"00:01:00"'},
    api.SessionRequest: {"Id": '"s"'},
    api.HeartbeatRequest: {"FailoverScore": "1"},
    api.RoleOverrideRequest: {"Value": "1"},
    api.ReleaseRequest: {"Epoch": "1"},
    failsafe_api.LiftRequest: {"Epoch": "1", "Reason": '"r"', "NobodyIsActive": "true"},
    access.AccessControlRequest: {
        "RoleTrusteeAccessControlEntries": '[{"AccessType":0,"AccessRights":31,"Trustee":'
        '{"Type":1,"ObjectId":"a"}}]'
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_value_is_refused_by_the_name_of_its_property(name: str) -> None:
    shape = next(shape for shape in VALID if shape.__name__ == name)
    for property_name, texts in WRONG[name].items():
        for text in texts:
            sentence = complaint(shape, with_value(VALID[shape], property_name, text))
            assert re.match(rf"{property_name}( is |: ).* must be ", sentence), (text, sentence)
    for property_name, texts in ODD[name].items():
        for text in texts:
            codec.decode(shape, with_value(VALID[shape], property_name, text).encode())


@pytest.mark.parametrize("shape", codec.REQUESTS, ids=lambda shape: shape.__name__)
def test_a_body_with_any_json_in_any_property_is_read_or_refused_with_a_sentence(
    shape: type[Any],
) -> None:
    """Also in properties that are not known, twice, and with bytes that are no UTF-8."""
    known = [field.encode_name for field in msgspec.structs.fields(shape)]

    @settings(GENERATED, max_examples=150, derandomize=True, phases=[Phase.generate])
    @given(
        properties=st.lists(st.tuples(st.sampled_from([*known, "Other"]), ODD_JSON), max_size=3),
        broken=st.sampled_from([b"", b"", b"", b"\xff", b"\x00"]),
    )
    def check(properties: list[tuple[str, str]], broken: bytes) -> None:
        given = [*VALID[shape].items(), *properties]
        body = "{" + ",".join(f'"{name}":{value}' for name, value in given) + "}"
        refusal = ""
        try:
            request = codec.decode(shape, body.encode() + broken)
        except BodyError as error:
            refusal = str(error)
        if refusal:
            assert "must" in refusal
            assert len(refusal) < 1000
            return
        value = request.to_model() if hasattr(request, "to_model") else None
        if hasattr(shape, "from_model"):
            again = codec.encode(shape.from_model(value))
            assert codec.decode(shape, again).to_model() == value

    check()


def test_an_access_control_list_has_to_leave_somebody_in_charge() -> None:
    def entry(access: int, rights: int, who: str) -> dict[str, object]:
        trustee = {"Type": 1, "ObjectId": who}
        return {"Trustee": trustee, "AccessType": access, "AccessRights": rights}

    def body(*entries: dict[str, object]) -> str:
        return json.dumps({"RoleTrusteeAccessControlEntries": entries})

    for entries in ([], [entry(0, 7, "a")], [entry(0, 31, "a"), entry(1, 8, "a")]):
        assert "nobody would keep the right" in complaint(
            access.AccessControlRequest, body(*entries)
        )
    kept = body(entry(0, 31, "a"), entry(1, 8, "a"), entry(0, 8, "b"))
    assert len(codec.decode(access.AccessControlRequest, kept.encode()).to_model().entries) == 3


def test_every_property_has_a_description_that_completes_the_sentence() -> None:
    for name, schema in codec.component_schemas().items():
        for property_name, declared in schema["properties"].items():
            assert declared.get("description", "").endswith("."), f"{name}.{property_name}"


# --- the schema tells the truth -----------------------------------------------------------------


def _operation(shape: type[Shape]) -> Any:
    content = {"schema": {"$ref": f"#/components/schemas/{shape.__name__}"}}
    post = {
        "requestBody": {"required": True, "content": {"application/json": content}},
        "responses": {"200": {"description": "read"}},
    }
    document = {
        "openapi": "3.1.0",
        "info": {"title": "requests", "version": "1"},
        "components": {"schemas": codec.component_schemas()},
        "paths": {"/": {"post": post}},
    }
    return schemathesis.openapi.from_dict(document)["/"]["POST"]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("shape", codec.REQUESTS, ids=lambda shape: shape.__name__)
def test_a_request_is_accepted_if_and_only_if_its_schema_admits_it(
    shape: type[Shape], mode: GenerationMode
) -> None:
    @settings(GENERATED, max_examples=20, phases=[Phase.generate])
    @given(case=_operation(shape).as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case[Any]) -> None:
        raw = b"" if isinstance(case.body, NotSet) else case.body
        body = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
        if mode is GenerationMode.POSITIVE:
            try:
                codec.decode(shape, body)
            except BodyError as error:
                # JSON Schema cannot say that the one who is allowed is not denied as well.
                if "nobody would keep" not in str(error) or '"AccessType": 1' not in str(body):
                    raise
        else:
            assert "must" in complaint(shape, body), body

    check()
