"""Report an agent's failsafe to operators: in the state file, in metrics and in the log.

Values and texts only. The rules are in core/failsafe.py, the questions in daemon/failsafe.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from agent.core.effects import Release
from agent.core.failsafe_view import FailsafeView, MemberReadiness, Readiness
from agent.model import Member
from agent.ops.logs import Log
from agent.schema.scalars import format_date_time

LONGEST_WHY = 512
DESCRIBED_MEMBERS = 8
"""Bounds of failsafe's part of the state file: characters of a reason, and members, of which those that are not
ready come first."""

TENTH_US = 100_000
"""Microseconds to which moments are rounded."""

log = Log(__name__)


class Outcome(StrEnum):
    """The outcome of a question. The values are labels of metrics."""

    YES = "yes"
    NO = "no"
    ERROR = "error"
    """No valid answer came in time."""


@dataclass(frozen=True, slots=True)
class FailsafeSnapshot:
    """Failsafe at one moment, for metrics.

    Attributes:
        asked: questions of this member, without rehearsals.
        votes: answers of this member to others, without rehearsals.
        refused: requests to the listener that were not accepted as a member's question, by reason.
    """

    view: FailsafeView
    asked: Mapping[Outcome, int]
    votes: Mapping[Outcome, int]
    refused: Mapping[str, int]


class FailsafeLog:
    """Logs each change of failsafe once."""

    def __init__(self) -> None:
        self._logged = self._last = FailsafeView(Readiness.READY, "")
        self._logged_key: object = None

    def on_release(self, effect: Release) -> None:
        """Log that a tenure was refused."""
        if not effect.held:
            log.info("role refused", epoch=effect.epoch, reason="a promise to another member binds")

    def on_step(
        self, view: FailsafeView, now: float, *, tenure: int | None, end: str, settle_s: float
    ) -> None:
        """Log what has changed.

        Args:
            view: after a step of the session, at ``now``.
            now: CLOCK_BOOTTIME seconds.
            tenure: the epoch that the session holds, or None.
            end: why its last tenure ended, for people.
            settle_s: how long members have to be not ready before that is logged.
        """
        last, self._last = self._last, view
        settling = view.readiness is Readiness.NOT_READY and now - (view.since or now) < settle_s
        key = _key(view, holds=tenure is not None)
        if settling or key == self._logged_key:
            return
        before, self._logged, self._logged_key = self._logged, view, key
        if before.readiness is Readiness.HOLDING and view.readiness is not Readiness.HOLDING:
            _log_end_of_hold(before, last, now, None if tenure is not None else end)
        match view.readiness:
            case Readiness.OFF:
                log.warning("failsafe off", reason=view.why)
            case Readiness.READY if tenure is not None:
                log.info("failsafe ready", members=len(view.members), revision=view.revision)
            case Readiness.NOT_READY:
                log.warning("failsafe not ready", reason=view.why)
            case Readiness.HOLDING:
                log.warning("failsafe hold begins", epoch=tenure, members=len(view.members))
            case Readiness.PROMISED if view.promised_to is not None:
                length_s = (view.promised_until or now) - now
                log.info("failsafe promise", to=view.promised_to, length_s=length_s)
            case _:
                pass


def _log_end_of_hold(
    begin: FailsafeView, last: FailsafeView, now: float, demoted: str | None
) -> None:
    """Log that a hold has ended, and which members had not voted at its end."""
    held_s = now - (now if begin.since is None else begin.since)
    if demoted is None:
        log.info("failsafe hold ended", held_s=held_s, reason="the coordinator answers")
        return
    missing = "; ".join(f"{one.member.id}: {one.why}" for one in last.members if not one.ready)
    log.warning(
        "failsafe hold ended", held_s=held_s, reason=f"demoted: {demoted}", without=missing or None
    )


def _key(view: FailsafeView, *, holds: bool) -> tuple[object, ...]:
    """The facts whose change is logged. Single answers, and repeated questions to a voter, are not among them."""
    off = view.why if view.readiness is Readiness.OFF else None
    named: frozenset[Member] = frozenset()
    if view.readiness is Readiness.NOT_READY:
        named = frozenset(one.member for one in view.members if not one.ready)
    elif view.readiness is Readiness.READY:
        named = frozenset(one.member for one in view.members)
    return holds, view.readiness, off, named, view.promised_to


def describe_failsafe(view: FailsafeView, now: float, wall: datetime) -> dict[str, Any]:
    """Build the failsafe part of the state file and of the probe's /status.

    Args:
        view: at ``now``.
        now: CLOCK_BOOTTIME seconds.
        wall: the same moment by the wall clock.
    """

    def moment(at: float | None) -> str | None:
        if at is None or not math.isfinite(at):
            return None
        # Rounded, so that one moment always has the same text, though the clocks are read in succession.
        moved = wall + timedelta(seconds=at - now)
        tenths = round(moved.microsecond / TENTH_US)
        return format_date_time(
            moved.replace(microsecond=0) + timedelta(microseconds=tenths * TENTH_US)
        )

    shown = sorted(view.members, key=lambda one: (one.ready, one.member))[:DESCRIBED_MEMBERS]
    return {
        "state": view.readiness.value,
        "why": view.why[:LONGEST_WHY],
        "since": moment(view.since),
        "revision": view.revision,
        "member_count": len(view.members),
        "members": [_describe_member(one, moment(one.yes_at)) for one in shown],
        "promised_to": view.promised_to,
        "promised_until": moment(view.promised_until),
    }


def _describe_member(one: MemberReadiness, yes_at: str | None) -> dict[str, Any]:
    return {
        "session": one.member.id,
        "url": one.member.url,
        "ready": one.ready,
        "why": one.why,
        "last_yes": yes_at,
    }
