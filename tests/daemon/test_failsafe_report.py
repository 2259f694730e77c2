"""What operators see of failsafe: log lines and the part of the state file."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from agent.core.effects import Release
from agent.core.failsafe_view import FailsafeView, MemberReadiness, Readiness
from agent.daemon.failsafe_report import FailsafeLog, describe_failsafe
from agent.drivers.statefile import MAX_BYTES
from agent.model import Member

NOW = 1_000.0
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
SETTLE_S = 6.5
B = MemberReadiness(Member("b", "http://b:1"), ready=True, why="promised", since=NOW, yes_at=NOW)
READY = FailsafeView(Readiness.READY, "all members answer", None, 3, (B,))
HOLDING = FailsafeView(Readiness.HOLDING, "by votes", NOW, 3, (B,))
MISSING = replace(B, ready=False, why="no answer within 1 s")
NOT_READY = FailsafeView(
    Readiness.NOT_READY, "b: no answer within 1 s", NOW - SETTLE_S, 3, (MISSING,)
)
VOTER = FailsafeView(Readiness.READY, "questions of the primary are answered")
PROMISED = FailsafeView(Readiness.PROMISED, "", promised_to="a", promised_until=NOW + 10.0)
OFF = FailsafeView(Readiness.OFF, "client session 'x' reported no FailsafeUrl")

Steps = Callable[..., list[str]]


@pytest.fixture
def steps(caplog: pytest.LogCaptureFixture) -> Steps:
    """The log lines of a fresh log after steps; the tenure ends where one is the last."""
    lines = FailsafeLog()
    caplog.set_level("INFO")

    def take(*views: FailsafeView, tenure: int | None = 7, after_s: float = 0.0) -> list[str]:
        caplog.clear()
        for view in views:
            lines.on_step(view, NOW + after_s, tenure=tenure, end="lease lost", settle_s=SETTLE_S)
        return [record.getMessage() for record in caplog.records]

    return take


def test_each_change_is_one_line(steps: Steps) -> None:
    assert steps(HOLDING, HOLDING) == ["failsafe hold begins"]
    assert steps(READY, READY, after_s=30.0) == ["failsafe hold ended", "failsafe ready"]
    assert steps(NOT_READY, NOT_READY) == ["failsafe not ready"]
    assert steps(OFF, OFF) == ["failsafe off"]
    assert steps(replace(OFF, why="another one")) == ["failsafe off"]


def test_the_end_of_a_hold_names_its_reason_and_who_has_not_voted(
    steps: Steps, caplog: pytest.LogCaptureFixture
) -> None:
    steps(HOLDING, replace(HOLDING, members=(MISSING,)))
    assert steps(VOTER, tenure=None, after_s=30.0) == ["failsafe hold ended"]
    fields: Any = caplog.records[0].__dict__
    text = json.dumps({key: str(value) for key, value in fields.items()})
    assert "demoted: lease lost" in text
    assert "b: no answer within 1 s" in text
    assert "30.0" in text


def test_a_member_that_is_not_ready_for_a_moment_is_not_logged(steps: Steps) -> None:
    moment = replace(NOT_READY, since=NOW - 0.1)
    assert steps(READY, moment, READY) == ["failsafe ready"]
    assert steps(moment, after_s=SETTLE_S) == ["failsafe not ready"]


def test_a_primary_logs_it_again_when_other_members_are_ready(steps: Steps) -> None:
    """The operator who has added a member waits for this line."""
    alone = replace(READY, members=(), revision=2)
    assert steps(alone, READY, replace(READY, revision=4)) == ["failsafe ready"] * 2
    assert steps(NOT_READY, READY) == ["failsafe not ready", "failsafe ready"]


def test_a_promise_is_logged_once_however_often_it_is_renewed(steps: Steps) -> None:
    renewed = [replace(PROMISED, promised_until=NOW + n) for n in range(10, 20)]
    assert steps(*renewed, tenure=None) == ["failsafe promise"]
    assert steps(VOTER, tenure=None) == []
    assert steps(PROMISED, tenure=None) == ["failsafe promise"]


def test_the_promise_of_a_start_is_not_logged(steps: Steps) -> None:
    assert steps(replace(PROMISED, promised_to=None), tenure=None) == []


def test_a_refused_role_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    FailsafeLog().on_release(Release(8, "", 1.0, held=True))
    assert caplog.records == []
    FailsafeLog().on_release(Release(8, "", 1.0, held=False))
    assert [record.getMessage() for record in caplog.records] == ["role refused"]


def test_moments_are_shown_by_the_wall_clock() -> None:
    described = describe_failsafe(HOLDING, NOW + 60.0, NOON)
    assert described["since"] == "2026-01-31T11:59:00Z"
    assert described["members"] == [
        {
            "session": "b",
            "url": "http://b:1",
            "ready": True,
            "why": "promised",
            "last_yes": "2026-01-31T11:59:00Z",
        }
    ]
    never = replace(HOLDING, members=(replace(B, yes_at=float("-inf")),))
    assert describe_failsafe(never, NOW, NOON)["members"][0]["last_yes"] is None


def test_a_moment_has_one_text_however_far_apart_the_clocks_are_read() -> None:
    texts = {
        json.dumps(describe_failsafe(HOLDING, NOW + us / 1e6, NOON)) for us in range(-900, 900, 7)
    }
    assert len(texts) == 1


def test_the_largest_group_fits_into_the_state_file_with_those_that_are_not_ready() -> None:
    wide = "\N{GRINNING FACE}" * 256
    ready = [replace(B, member=Member(f"{n}{wide}"[:256], "u" * 256)) for n in range(500)]
    missing = replace(ready[400], ready=False, why="w" * 200)
    members = (*ready[:400], missing, *ready[401:])
    described = describe_failsafe(replace(NOT_READY, why=wide * 9, members=members), NOW, NOON)
    assert described["members"][0]["session"] == missing.member.id
    assert described["member_count"] == 500
    assert len(json.dumps(described)) < MAX_BYTES - 16 * 1024
