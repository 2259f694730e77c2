"""What a caller of the group API sends, and how it reads what it is answered.

Plain functions and no pydantic: an agent runs for months, and reads four kinds of answers. They take
whatever a v1 server sends: unknown properties are ignored, a null property is an absent one. What an
answer must have to be one is checked, and refused in one sentence. The names of the properties are
the same as in wire/shapes.py, which the tests compare with this.

What this module refuses to know: HTTP, and what an answer means for a role.
"""

import json
import math
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from agent.model import (
    LONGEST_HOLD_OFF_S,
    TICKS_PER_SECOND,
    GroupConfig,
    GroupStatus,
    HeartbeatAnswer,
    HistoryEntry,
    Role,
    RoleOverride,
    SessionConfig,
    SessionRecord,
    SessionView,
)
from agent.wire.scalars import (
    MAX_EPOCH,
    OVERRIDE_NUMBERS,
    ROLE_NUMBERS,
    format_date_time,
    format_time_span,
    not_json,
    parse_time_span,
    read_member,
    read_optional_time,
    read_required_time,
    shown,
)

DEFAULT_TIMEOUT_TICKS = 60 * TICKS_PER_SECOND
"""00:01:00, the FailoverTimeout that v1 clients take when none is given."""

WHOLE = "the answer"


class AnswerError(ValueError):
    """A body that is not what the API answers: one sentence on the first fault."""


# --- what is sent -------------------------------------------------------------------------------


def group_body(config: GroupConfig) -> bytes:
    """The body that makes a group."""
    return _body(
        Id=config.id,
        Name=config.name,
        Description=config.description,
        FailoverTimeout=format_time_span(config.timeout_ticks),
        AdditionalData=config.additional,
    )


def session_body(config: SessionConfig) -> bytes:
    """The body that makes a session."""
    return _body(Id=config.id, Name=config.name, AdditionalData=config.additional)


def heartbeat_body(
    score: float, last_data: datetime | None, instance: str | None, seen_epoch: int | None
) -> bytes:
    """The body of a heartbeat; without ``instance`` and ``seen_epoch`` it is plain v1."""
    return _body(
        FailoverScore=score,
        LastDataProcessedTime=None if last_data is None else format_date_time(last_data),
        Instance=instance,
        Epoch=seen_epoch,
    )


def release_body(
    epoch: int,
    instance: str,
    hold_off_s: float | None,
    reason: str,
    last_data: datetime | None,
) -> bytes:
    """The body of a release of the tenure that ``instance`` held."""
    bounded_s = None if hold_off_s is None else min(hold_off_s, LONGEST_HOLD_OFF_S)
    hold_off = None if bounded_s is None else round(bounded_s * TICKS_PER_SECOND)
    return _body(
        Epoch=epoch,
        Instance=instance,
        HoldOffPeriod=None if hold_off is None else format_time_span(hold_off),
        Reason=reason,
        LastDataProcessedTime=None if last_data is None else format_date_time(last_data),
    )


def _body(**properties: Any) -> bytes:
    given = {name: value for name, value in properties.items() if value is not None}
    return json.dumps(given, ensure_ascii=False, allow_nan=False).encode()


# --- what is answered ---------------------------------------------------------------------------


def read_version(body: bytes) -> str:
    """The version that a server states. Raises AnswerError."""
    version: str = _one(body, _VERSION, "Version")["Version"]
    return version


def read_group(body: bytes) -> GroupConfig:
    """A group; without a FailoverTimeout it has v1's default.

    Raises:
        AnswerError: it is none, or has no id.
    """
    group = _group(_one(body, _GROUP, "GroupConfiguration"))
    if not group.id:
        raise AnswerError("a group without an Id")
    return group


def read_groups(body: bytes) -> list[GroupConfig]:
    """A list of groups, those without an id left out. Raises AnswerError."""
    groups = [_group(read) for read in _many(body, _GROUP)]
    return [group for group in groups if group.id]


def read_session(body: bytes) -> SessionView:
    """A session. Raises AnswerError."""
    return _session(_one(body, _SESSION, "ClientSession"))


def read_store_id(body: bytes) -> str | None:
    """The store that a session is registered in; None at a plain v1 server. Raises AnswerError."""
    store_id: str | None = _one(body, _SESSION, "ClientSession").get("StoreId")
    return store_id


def read_sessions(body: bytes) -> list[SessionView]:
    """A list of sessions. Raises AnswerError."""
    return [_session(read) for read in _many(body, _SESSION)]


def read_heartbeat(body: bytes) -> HeartbeatAnswer:
    """What a heartbeat was told. Raises AnswerError."""
    read = _one(body, _HEARTBEAT, "HeartbeatResponse")
    ticks = read.get("LeaseDuration")
    return HeartbeatAnswer(
        role=read["Role"],
        last_data=read.get("LastDataProcessedTime"),
        epoch=read.get("Epoch"),
        revision=read.get("Revision"),
        lease_s=None if ticks is None else ticks / TICKS_PER_SECOND,
        previous=read.get("PreviousPrimary"),
        store_id=read.get("StoreId"),
    )


def read_status(body: bytes) -> GroupStatus:
    """The status of a group. Raises AnswerError."""
    read = _one(body, _STATUS, "GroupStatus")
    return GroupStatus(
        primary=read.get("Primary"),
        pending=read.get("PendingPrimary"),
        last_data=read.get("LastDataProcessedTime"),
        epoch=read.get("Epoch"),
        revision=read.get("Revision"),
        primary_since=read.get("PrimarySince"),
        previous=read.get("PreviousPrimary"),
        store_id=read.get("StoreId"),
    )


def read_history(body: bytes) -> list[HistoryEntry]:
    """A list of tenures. Raises AnswerError."""
    return [
        HistoryEntry(
            epoch=read["Epoch"],
            session_id=read["SessionId"],
            since=read["Since"],
            why_started=read["WhyStarted"],
            until=read.get("Until"),
            why_ended=read.get("WhyEnded"),
        )
        for read in _many(body, _TENURE)
    ]


def _group(read: Mapping[str, Any]) -> GroupConfig:
    return GroupConfig(
        id=read.get("Id", ""),
        timeout_ticks=read.get("FailoverTimeout", DEFAULT_TIMEOUT_TICKS),
        name=read.get("Name"),
        description=read.get("Description"),
        additional=read.get("AdditionalData"),
    )


def _session(read: Mapping[str, Any]) -> SessionView:
    beat = read.get("Heartbeat", {})
    return SessionView(
        record=SessionRecord(
            config=SessionConfig(read["Id"], read.get("Name"), read.get("AdditionalData")),
            override=read.get("RoleOverride", RoleOverride.OFF),
            override_until=read.get("RoleOverrideExpirationTime"),
        ),
        role=read.get("Role", Role.SECONDARY),
        score=beat.get("FailoverScore", 0.0),
        last_data=beat.get("LastDataProcessedTime"),
        heartbeat_at=beat.get("HeartbeatTime"),
    )


# --- how it is read -----------------------------------------------------------------------------


class _Property(NamedTuple):
    """How one property is read. ``read`` raises ValueError, whose text is told after the name."""

    read: Callable[[Any], Any]
    needed: bool = False


_Shape = Mapping[str, _Property]


def _wrong(given: object, right: str) -> ValueError:
    return ValueError(f" is {shown(given)}: it must be {right}")


def _text(given: Any) -> str:
    if not isinstance(given, str) or not _is_unicode(given):
        raise _wrong(given, "a string")
    return given


def _is_unicode(text: str) -> bool:
    """No half of a surrogate pair, which JSON can escape and nothing can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _count(given: Any) -> int:
    whole = int(given) if isinstance(given, float) and given.is_integer() else given
    if isinstance(whole, bool) or not isinstance(whole, int) or not 0 <= whole <= MAX_EPOCH:
        raise _wrong(given, f"an integer from 0 to {MAX_EPOCH}")
    return whole


def _score(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 100:  # noqa: PLR2004 - v1's range
        raise _wrong(given, "a number from 0 to 100")
    return float(given)


def _truth(given: Any) -> bool:
    if not isinstance(given, bool):
        raise _wrong(given, "a boolean")
    return given


def _any_object(given: Any) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise _wrong(given, "a JSON object")
    return given


def _span(given: Any) -> int:
    if not isinstance(given, str):
        raise _wrong(given, "a time-span such as 00:01:00")
    ticks: int = _told(parse_time_span, given)
    return ticks


def _told(read: Callable[[Any], Any], given: Any) -> Any:
    try:
        return read(given)
    except ValueError as error:
        raise ValueError(f": {error}") from None


def _moment(given: Any) -> datetime | None:
    moment: datetime | None = _told(read_optional_time, given)
    return moment


def _some_moment(given: Any) -> datetime:
    moment: datetime = _told(read_required_time, given)
    return moment


def _role(given: Any) -> Role:
    role: Role = _told(lambda given: read_member(ROLE_NUMBERS, given), given)
    return role


def _override(given: Any) -> RoleOverride:
    override: RoleOverride = _told(lambda given: read_member(OVERRIDE_NUMBERS, given), given)
    return override


def _beat(given: Any) -> Mapping[str, Any]:
    return _object(given, _BEAT)


_VERSION: _Shape = {"Version": _Property(_text, needed=True)}
_GROUP: _Shape = {
    "Id": _Property(_text),
    "Name": _Property(_text),
    "Description": _Property(_text),
    "FailoverTimeout": _Property(_span),
    "AdditionalData": _Property(_any_object),
}
_STATUS: _Shape = {
    "Primary": _Property(_text),
    "PendingPrimary": _Property(_text),
    "LastDataProcessedTime": _Property(_moment),
    "Epoch": _Property(_count),
    "Revision": _Property(_count),
    "PrimarySince": _Property(_moment),
    "PreviousPrimary": _Property(_text),
    "StoreId": _Property(_text),
}
_BEAT: _Shape = {
    "FailoverScore": _Property(_score),
    "LastDataProcessedTime": _Property(_moment),
    "HeartbeatTime": _Property(_moment),
}
_SESSION: _Shape = {
    "Id": _Property(_text, needed=True),
    "Name": _Property(_text),
    "Heartbeat": _Property(_beat),
    "Role": _Property(_role),
    "HeartbeatPosted": _Property(_truth),
    "RoleOverride": _Property(_override),
    "RoleOverrideExpirationTime": _Property(_moment),
    "AdditionalData": _Property(_any_object),
    "StoreId": _Property(_text),
}
_HEARTBEAT: _Shape = {
    "Role": _Property(_role, needed=True),
    "LastDataProcessedTime": _Property(_moment),
    "Epoch": _Property(_count),
    "LeaseDuration": _Property(_span),
    "Revision": _Property(_count),
    "PreviousPrimary": _Property(_text),
    "StoreId": _Property(_text),
}
_TENURE: _Shape = {
    "Epoch": _Property(_count, needed=True),
    "SessionId": _Property(_text, needed=True),
    "Since": _Property(_some_moment, needed=True),
    "Until": _Property(_moment),
    "WhyStarted": _Property(_text, needed=True),
    "WhyEnded": _Property(_text),
}


def _one(body: bytes, shape: _Shape, name: str) -> dict[str, Any]:
    """One object. One that has nothing of the shape, and is not empty, is something else."""
    given = _parsed(body)
    try:
        read = _object(given, shape)
    except ValueError as error:
        raise _not_an_answer(str(error)) from None
    if given and not given.keys() & shape.keys():
        raise AnswerError(f"none of the properties of {name}")
    return read


def _many(body: bytes, shape: _Shape) -> list[dict[str, Any]]:
    given = _parsed(body)
    if not isinstance(given, list):
        raise _not_an_answer(f" is {shown(given)}: it must be a JSON list")
    read = []
    for place, item in enumerate(given):
        try:
            read.append(_object(item, shape))
        except ValueError as error:
            raise _not_an_answer(f".[{place}]{error}") from None
    return read


def _object(given: Any, shape: _Shape) -> dict[str, Any]:
    """The properties that are there, read. Raises ValueError as a property's ``read`` does."""
    _any_object(given)
    read: dict[str, Any] = {}
    for name, (reader, needed) in shape.items():
        value = given.get(name)
        if value is not None:
            try:
                read[name] = reader(value)
            except ValueError as error:
                raise ValueError(f".{name}{error}") from None
        elif needed:
            raise ValueError(f".{name} is missing")
    return read


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_float=_finite, parse_constant=_finite)
    except UnicodeDecodeError:
        why = "not UTF-8"
    except RecursionError:
        why = "it nests too deeply"
    except ValueError as error:
        why = str(error)
    raise _not_an_answer(f".{not_json(body, WHOLE, why)}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _not_an_answer(fault: str) -> AnswerError:
    """The error for a fault that is told after the name of what it is in."""
    text = fault[1:] if fault.startswith(".") else f"{WHOLE}{fault}"
    return AnswerError(f"{text} (is this the address of a client failover service?)")
