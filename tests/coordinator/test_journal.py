"""The coordinator's log of role changes: rows of the transition table only."""

import logging
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from agent.coordinator.journal import log_role_changes
from agent.model import GroupConfig, GroupKey, GroupRecord, HistoryEntry, Role, Tenure

KEY = GroupKey("default", "default", "g")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
HELD = GroupRecord(GroupConfig("g", 20_000_000), holder=Tenure("a", 1, NOW, "chosen"), epoch=1)


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [record.__dict__["fields"] for record in caplog.records]


@pytest.mark.parametrize("pending", ["a", "b", None])
def test_each_change_of_role_is_one_line_with_the_role_before_and_after(
    caplog: pytest.LogCaptureFixture, pending: str | None
) -> None:
    """Also when one decision ends a tenure and chooses the same session again."""
    after = replace(HELD, holder=None, pending=pending, revision=2, previous="a")
    ended = HistoryEntry(1, "a", NOW, "chosen", NOW, "its lease ended without a heartbeat")
    with caplog.at_level(logging.INFO):
        log_role_changes(KEY, HELD, after, [ended])
    logged = lines(caplog)
    ended_tenure = ("a", Role.PRIMARY, Role.SECONDARY)
    chosen = [] if pending is None else [(pending, Role.SECONDARY, Role.PENDING_PRIMARY)]
    assert [(line["session"], line["before"], line["after"]) for line in logged] == [
        ended_tenure,
        *chosen,
    ]
    assert logged[0]["reason"] == "its lease ended without a heartbeat"
