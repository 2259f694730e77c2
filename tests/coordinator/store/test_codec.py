"""The text that values are kept as."""

import json
from collections.abc import Callable
from datetime import UTC
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.coordinator.store.codec import decode, encode
from agent.errors import StoreError
from agent.model import (
    AccessEntry,
    AccessList,
    GroupConfig,
    GroupRecord,
    HistoryEntry,
    RoleOverride,
    SessionConfig,
    SessionRecord,
    Tenure,
    Trustee,
)

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
moments = st.datetimes(timezones=st.just(UTC))
numbers = st.integers(0, 2**63 - 1)
additional = st.none() | st.dictionaries(words, words | numbers, max_size=3).map(json.dumps)
access_lists = st.builds(
    AccessList,
    st.lists(
        st.builds(
            AccessEntry,
            st.builds(Trustee, st.integers(1, 3), words, st.none() | words),
            st.booleans(),
            st.integers(0, 31),
        ),
        max_size=3,
    ).map(tuple),
)
sessions = st.builds(
    SessionRecord,
    st.builds(SessionConfig, words, st.none() | words, additional),
    st.sampled_from(RoleOverride),
    st.none() | moments,
    numbers,
)
tenures = st.builds(Tenure, words, numbers, moments, words, st.none() | words, st.booleans())
records = st.builds(
    GroupRecord,
    st.builds(GroupConfig, words, numbers, st.none() | words, st.none() | words, additional),
    st.dictionaries(words, sessions, max_size=3).map(MappingProxyType),
    st.none() | tenures,
    st.none() | words,
    numbers,
    numbers,
    st.none() | words,
    st.none() | moments,
    st.none() | access_lists,
)
entries = st.builds(
    HistoryEntry, numbers, words, moments, words, st.none() | moments, st.none() | words
)


@settings(deadline=None)
@given(records, entries, access_lists)
def test_every_value_reads_back_as_itself(
    record: GroupRecord, entry: HistoryEntry, acl: AccessList
) -> None:
    assert decode(GroupRecord, encode(record, "g"), "g") == record
    assert decode(HistoryEntry, encode(entry, "g"), "g") == entry
    assert decode(AccessList, encode(acl, "g"), "g") == acl


def test_what_is_read_has_the_types_of_the_model_and_times_in_utc(
    make_record: Callable[[int], GroupRecord],
) -> None:
    record = decode(GroupRecord, encode(make_record(1), "g"), "g")
    assert record.holder is not None
    assert record.holder.since.utcoffset() == UTC.utcoffset(None)
    assert isinstance(record.sessions["a"], SessionRecord)
    assert record.sessions["a"].override is RoleOverride.PRIMARY
    assert record.acl is not None
    assert isinstance(record.acl.entries, tuple)


def test_a_text_without_fields_that_have_defaults_is_read() -> None:
    """The text of an older version, from before those fields."""
    text = '{"config": {"id": "g", "timeout_ticks": 10}}'
    assert decode(GroupRecord, text, "g") == GroupRecord(GroupConfig("g", 10))


def _without(text: dict[str, Any]) -> None:
    del text["config"]["id"]


def _unknown(text: dict[str, Any]) -> None:
    text["sessions"]["a"]["config"]["colour"] = "red"


def _wrong_type(text: dict[str, Any]) -> None:
    text["holder"]["epoch"] = "1"


def _bad_time(text: dict[str, Any]) -> None:
    text["holder"]["since"] = "yesterday"


def _bad_override(text: dict[str, Any]) -> None:
    text["sessions"]["b"]["override"] = "Perhaps"


@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        (_without, "config.id"),
        (_unknown, "sessions.a.config.colour"),
        (_wrong_type, "holder.epoch"),
        (_bad_time, "holder.since"),
        (_bad_override, "sessions.b.override"),
    ],
)
def test_a_text_that_is_no_record_is_refused_with_the_place(
    spoil: Callable[[dict[str, Any]], None],
    place: str,
    make_record: Callable[[int], GroupRecord],
) -> None:
    text = json.loads(encode(make_record(1), "g"))
    spoil(text)
    with pytest.raises(StoreError) as refused:
        decode(GroupRecord, json.dumps(text), "group 'pumps' in /d/coordinator.db")
    assert "group 'pumps' in /d/coordinator.db" in str(refused.value)
    assert f" {place}: " in str(refused.value)


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "7", "nul"])
def test_a_text_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(StoreError, match="group x cannot be read as AccessList"):
        decode(AccessList, text, "group x")
