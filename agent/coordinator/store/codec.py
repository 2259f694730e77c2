"""Encode the values of agent/model.py as the JSON text that every store keeps, and decode it.

Owns only the text: no file, no transaction, no meaning. Decoding is strict: it refuses an unknown key, a wrong type
or a truncated text, and the error names the place. An older text may lack fields that have a default; a newer text
never occurs, since a store with a newer schema is refused as a whole.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from agent.errors import ExitCode, StoreError
from agent.model import AccessList, GroupKey, GroupRecord, HistoryEntry, Progress
from agent.schema.scalars import parse_date_time

HISTORY_BOUND = 1_000
"""How many of a group's newest tenures are kept: years of an ordinary group, or an hour of one whose role changes
every few seconds, in about 200 KB."""

ValueT = TypeVar("ValueT", GroupRecord, HistoryEntry, AccessList)


@cache
def _adapters() -> dict[type, TypeAdapter[Any]]:
    # pydantic refuses a configuration for a standard dataclass, but accepts one for the union of
    # the dataclass and None, and applies it to nested classes
    config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")
    kinds: dict[type, Any] = {
        GroupRecord: GroupRecord | None,
        HistoryEntry: HistoryEntry | None,
        AccessList: AccessList | None,
    }
    return {kind: TypeAdapter(optional, config=config) for kind, optional in kinds.items()}


def _mapping(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):  # pydantic does not support this read-only view
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is not JSON")


def name_of(key: GroupKey) -> str:
    """How messages name a group."""
    return f"group {key.group!r} (tenant {key.tenant!r}, namespace {key.namespace!r})"


def encode(value: ValueT, where: str) -> str:
    """Encode ``value``, and check that the text decodes to the same value.

    Without this check a value that can be written but not read (an integer of 5,000 digits in
    AdditionalData, a NaN) would be acknowledged, and would then make the next start fail.

    ``where`` names the owner of the value in an error message.

    Raises:
        StoreError: the text does not decode to the same value.
    """
    adapter = _adapters()[type(value)]
    try:
        text = adapter.dump_json(value, fallback=_mapping, warnings=False)
        same = adapter.validate_json(text) == value
    except (PydanticSerializationError, ValidationError) as error:
        reason = _first(error) if isinstance(error, ValidationError) else str(error)
        raise StoreError(
            f"{where} cannot be kept as JSON: {reason}; nothing was changed",
            exit_code=ExitCode.INTERNAL,
        ) from error
    if not same:
        raise StoreError(
            f"{where} cannot be kept as JSON: something in it reads back as another value;"
            " only null, booleans, finite numbers, strings, lists and objects with string keys can be kept;"
            " nothing was changed",
            exit_code=ExitCode.INTERNAL,
        )
    return text.decode()


def decode(kind: type[ValueT], text: str, where: str) -> ValueT:
    """Decode a value of ``kind``; ``where`` names its owner in an error message.

    Raises:
        StoreError: the text is not of this kind; the message has the place in the text.
    """
    try:
        value = _adapters()[kind].validate_json(text)
    except ValidationError as error:
        raise _unreadable(kind, where, _first(error)) from error
    if not isinstance(value, kind):
        raise _unreadable(kind, where, f"it is {text}")
    return value


def decode_progress(epoch: int | str, last_data: str, where: str) -> Progress:
    """Decode progress from an epoch and a date-time in ISO 8601.

    Raises:
        StoreError: they are not a number and a date-time.
    """
    try:
        number, moment = int(epoch), parse_date_time(last_data)
    except ValueError as error:
        raise _unreadable(Progress, where, str(error)) from None
    if moment is None:
        raise _unreadable(Progress, where, "it has no time")
    return Progress(number, moment)


def upgrade_record(text: str, where: str) -> tuple[str, Progress | None]:
    """Convert a record of schemas 1 to 4 to schema 5; return it and the progress that it held.

    Up to schema 3 AdditionalData is an object, and a tenure has its data-processed time. Up to schema 4 there
    is no failsafe: every tenure but the current one is over (R24).

    Raises:
        StoreError: the text is not such a record; ``where`` names its owner.
    """
    try:
        record: Any = json.loads(text)
        for one in (record, *record.get("sessions", {}).values()):
            if isinstance(one["config"].get("additional"), dict):
                one["config"]["additional"] = _compact(one["config"]["additional"])
        holder, ended = record.get("holder") or {}, record.get("ended") or {}
        ended.pop("last_data", None)
        last_data = holder.pop("last_data", None)
        progress = decode_progress(holder["epoch"], last_data, where) if last_data else None
        record.setdefault("cleared", record.get("epoch", 0) - (1 if holder else 0))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(GroupRecord, where, f"{type(error).__name__}: {error}") from error
    return _compact(record), progress


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _unreadable(kind: type[Any], where: str, reason: str) -> StoreError:
    return StoreError(
        f"{where} cannot be read as {kind.__name__} by this version: {reason};"
        " restore the data directory from a copy, or start with an empty one; nothing was changed"
    )


def _first(error: ValidationError) -> str:
    """The first fault of a text, with its place."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the text as a whole"
    return f"{place}: {first['msg']}"
