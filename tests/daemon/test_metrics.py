"""The collector's metrics and the probes' verdicts, each from one snapshot."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as classic

from agent.core.effects import Cause, Publish
from agent.core.failsafe_view import FailsafeView, MemberReadiness, Readiness
from agent.core.session import Phase
from agent.core.timing import Timing
from agent.daemon import metrics
from agent.daemon.failsafe_report import FailsafeSnapshot, Outcome
from agent.daemon.telemetry import (
    CHANGES,
    REASONS,
    SKEW_SAMPLES,
    Snapshot,
    Stats,
    failure_reason,
    why_not_live,
    why_not_primary,
    why_not_ready,
    why_not_secondary,
)
from agent.errors import ExitCode, ServerError
from agent.model import Instant, Member, Role

NOW = 1_000.0
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
TIMING = Timing(10.0, 6.5, 2.5, 1.0, 2.0, 2.0)
URL = "http://a/clientfailover"


def stats() -> Stats:
    """Counters that are not 0."""
    made = Stats()
    made.loop_ran_at = NOW - 0.1
    made.record_answer(at(-1.0), at(-0.9), NOON, URL)
    made.record_hook("secondary", 0.3, ok=True)
    made.record_demotion(3.0)
    made.record_demotion(2.0)
    made.record_demotion(4.0)
    return made


def at(seconds: float) -> Instant:
    return Instant(NOW + seconds, NOON + timedelta(seconds=seconds))


def failsafe(**changed: Any) -> FailsafeSnapshot:
    """A primary that has held its role for 30 s by the vote of one member; with some changes."""
    voter = MemberReadiness(Member("host-b", "http://b:1"), ready=True, why="", since=NOW)
    view = FailsafeView(Readiness.HOLDING, "by votes", NOW - 30.0, 3, (voter,))
    return FailsafeSnapshot(
        replace(view, **changed),
        asked={Outcome.YES: 4, Outcome.NO: 1, Outcome.ERROR: 0},
        votes={Outcome.YES: 0, Outcome.NO: 2},
        refused={"not_authentic": 5},
    )


def snapshot(**changed: Any) -> Snapshot:
    """A healthy primary, half a second after its last heartbeat was sent; with some changes."""
    whole = Snapshot(
        now=NOW,
        wall=NOON,
        group="line-7",
        session_id="host-a",
        timing=TIMING,
        phase=Phase.MEMBER,
        session_role=Role.PRIMARY,
        demoting=False,
        epoch=7,
        renew_by=NOW + 6.0,
        lease_until=NOW + 9.5,
        wake_at=NOW + 1.0,
        loop_interval_s=0.5,
        unfit={},
        score=90.0,
        checks={"disk": True, "feed": False},
        data=NOON - timedelta(seconds=5),
        group_data=NOON - timedelta(seconds=8),
        endpoint=URL,
        endpoints=("http://b/clientfailover", URL),
        guard_up=True,
        mqtt_up=True,
        mqtt_failures=3,
        refused={"future": 2, "never": 0},
        notifications_dropped=1,
        notifications_failed=3,
        stats=stats(),
        failsafe=failsafe(),
    )
    return replace(whole, **changed)


def value(snap: Snapshot, name: str, **labels: str) -> float | None:
    registry = CollectorRegistry()
    metrics.register(registry, lambda: snap)
    return registry.get_sample_value(f"failover_agent_{name}", labels)


def roles(snap: Snapshot) -> dict[str, float | None]:
    return {role.value: value(snap, "role", role=role.value) for role in Role}


SECONDARY: dict[str, Any] = {
    "session_role": Role.SECONDARY,
    "renew_by": -math.inf,
    "lease_until": -math.inf,
}


# -- verdicts -----------------------------------------------------------------------------------------


def test_a_primary_is_primary_until_its_renewal_deadline() -> None:
    assert why_not_primary(snapshot(renew_by=NOW + 0.001)) is None
    assert "0.000 s ago" in str(why_not_primary(snapshot(renew_by=NOW)))
    assert why_not_primary(snapshot(**SECONDARY)) == "this member is Secondary"
    pending = snapshot(session_role=Role.PENDING_PRIMARY)
    assert why_not_primary(pending) == "this member is PendingPrimary"


def test_after_the_lease_a_member_is_no_secondary_until_it_has_demoted() -> None:
    assert why_not_secondary(snapshot(renew_by=NOW - 1)) == "this member is Primary"
    demoting = snapshot(session_role=Role.SECONDARY, demoting=True)
    assert why_not_secondary(demoting) == "the demotion is not done yet"
    assert why_not_secondary(snapshot(**SECONDARY)) is None


def test_a_starting_agent_is_no_secondary_before_its_first_demotion() -> None:
    assert why_not_secondary(snapshot(**SECONDARY, phase=Phase.STARTING)) is not None
    assert why_not_secondary(snapshot(**SECONDARY, phase=Phase.JOINING)) is None


def test_a_healthy_secondary_is_ready() -> None:
    assert why_not_ready(snapshot(**SECONDARY)) is None
    assert why_not_ready(snapshot()) is None


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"phase": Phase.JOINING}, "not joined: joining"),
        ({"unfit": {"checks": "disk: full"}}, "unfit to be primary: disk: full"),
        ({"stats": Stats()}, "no heartbeat was answered within 10 s"),
        ({"wake_at": NOW - 2}, "the session has stalled"),
    ],
)
def test_a_member_that_cannot_take_over_is_not_ready(changed: dict[str, Any], why: str) -> None:
    assert why in str(why_not_ready(snapshot(**SECONDARY | changed)))


def test_a_member_without_an_answer_for_l_is_live_and_not_ready() -> None:
    snap = snapshot(**SECONDARY)
    snap.stats.heard_at = NOW - 9.9
    assert why_not_ready(snap) is None
    snap.stats.heard_at = NOW - 10
    assert why_not_ready(snap) is not None
    assert why_not_live(snap) is None


def test_a_late_loop_is_not_live() -> None:
    snap = snapshot()
    snap.stats.loop_ran_at = NOW - 1.5
    assert why_not_live(snap) is None
    snap.stats.loop_ran_at = NOW - 1.6
    assert why_not_live(snap) == "the loop has stalled, it is 1.100 s late"


def test_an_agent_whose_heartbeat_hangs_is_not_live() -> None:
    snap = snapshot()
    snap.stats.in_flight = {1: NOW - 3.0, 2: NOW - 1.0}
    assert why_not_live(snap) is None
    snap.stats.in_flight = {1: NOW - 3.1, 2: NOW - 1.0}
    assert why_not_live(snap) == "renewal has stalled, a heartbeat hangs for 3.100 s"


def test_a_starting_agent_is_live() -> None:
    assert why_not_live(snapshot(stats=Stats(), wake_at=-math.inf)) is None


# -- metrics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", list(Role))
def test_exactly_one_role_is_1(role: Role) -> None:
    assert roles(snapshot(session_role=role)) == {r.value: float(r is role) for r in Role}


@pytest.mark.parametrize("role", [Role.PRIMARY, Role.PENDING_PRIMARY])
def test_the_role_metric_is_secondary_after_the_deadline(role: Role) -> None:
    assert roles(snapshot(session_role=role, renew_by=NOW))["Secondary"] == 1


def test_each_scrape_takes_a_new_snapshot() -> None:
    taken = [snapshot(), snapshot(renew_by=NOW)]
    registry = CollectorRegistry()
    metrics.register(registry, lambda: taken.pop(0))
    seen = [registry.get_sample_value("failover_agent_role", {"role": "Primary"}) for _ in range(2)]
    assert seen == [1, 0]


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("session_info", {"group": "line-7", "session": "host-a"}, 1),
        ("epoch", {}, 7),
        ("failover_timeout_seconds", {}, 10),
        ("budget_seconds", {"part": "margin"}, 1),
        ("lease_remaining_seconds", {}, 9.5),
        ("renew_remaining_seconds", {}, 6),
        ("last_renewal_timestamp_seconds", {}, NOON.timestamp() - 1),
        ("demotion_slack_seconds", {}, 4),
        ("demotion_slack_min_seconds", {}, 2),
        ("data_processed_timestamp_seconds", {}, NOON.timestamp() - 5),
        ("data_lag_seconds", {}, 5),
        ("group_data_lag_seconds", {}, 8),
        ("score", {}, 90),
        ("check_up", {"check": "disk"}, 1),
        ("check_up", {"check": "feed"}, 0),
        ("unfit", {"source": "guard"}, 0),
        ("guard_up", {}, 1),
        ("guard_fired", {}, 0),
        ("ready", {}, 1),
        ("endpoint_in_use", {"endpoint": URL}, 1),
        ("endpoint_in_use", {"endpoint": "http://b/clientfailover"}, 0),
        ("progress_refused_total", {"reason": "future"}, 2),
        ("notifications_dropped_total", {}, 1),
        ("notifications_failed_total", {}, 3),
        ("hook_runs_total", {"hook": "secondary", "outcome": "ok"}, 1),
        ("hook_runs_total", {"hook": "secondary", "outcome": "failed"}, 0),
        ("hook_duration_seconds_bucket", {"hook": "secondary", "le": "0.25"}, 0),
        ("hook_duration_seconds_bucket", {"hook": "secondary", "le": "0.5"}, 1),
        ("hook_duration_seconds_count", {"hook": "secondary"}, 1),
        ("heartbeat_duration_seconds_count", {}, 1),
        ("heartbeat_failures_total", {"reason": "gone"}, 0),
        ("stalls_total", {"kind": "suspended"}, 0),
        ("mqtt_up", {}, 1),
        ("mqtt_failures_total", {}, 3),
    ],
)
def test_each_metric_has_its_value(name: str, labels: dict[str, str], expected: float) -> None:
    assert value(snapshot(), name, **labels) == pytest.approx(expected)


def test_a_secondary_has_no_lease() -> None:
    snap = snapshot(**SECONDARY)
    assert value(snap, "lease_remaining_seconds") == 0
    assert value(snap, "renew_remaining_seconds") == 0


def test_an_unknown_value_has_no_sample() -> None:
    unknown = {"epoch": None, "data": None, "group_data": None, "guard_up": None, "mqtt_up": None}
    snap = snapshot(**unknown, stats=Stats())
    for name in (
        "epoch",
        "data_lag_seconds",
        "group_data_lag_seconds",
        "guard_up",
        "guard_restarts_total",
        "demotion_slack_seconds",
        "demotion_slack_min_seconds",
        "last_renewal_timestamp_seconds",
        "clock_skew_seconds",
        "mqtt_up",
        "mqtt_failures_total",
    ):
        assert value(snap, name) is None, name


def test_a_change_of_role_is_counted_by_from_to_and_cause() -> None:
    snap = snapshot()
    snap.stats.record_role_change(
        Publish(Role.PRIMARY, Role.SECONDARY, 7, Cause.LEASE_LOST, "late")
    )
    labels = {"from": "Primary", "to": "Secondary"}
    assert value(snap, "role_changes_total", **labels, cause="lease_lost") == 1
    assert value(snap, "role_changes_total", **labels, cause="revoked") == 0


def test_every_role_change_has_a_counter_from_the_start() -> None:
    assert all(
        value(snapshot(), "role_changes_total", **{"from": a, "to": b}, cause=cause) == 0
        for a, b, cause in CHANGES
    )
    assert {cause for _, _, cause in CHANGES} == set(Cause)


def test_the_number_of_series_does_not_grow_with_what_happens() -> None:
    def series(snap: Snapshot) -> int:
        collected = metrics.AgentCollector(lambda: snap).collect()
        return sum(len(family.samples) for family in collected)

    snap = snapshot()
    before = series(snap)
    for code in ExitCode:
        for status in (None, 404, 429, 500, 503):
            error = ServerError("why", exit_code=code, status=status)
            assert failure_reason(error) in REASONS
            snap.stats.heartbeats_failed[failure_reason(error)] += 1
    for change in CHANGES:
        snap.stats.record_role_change(Publish(change[0], change[1], 1, change[2], "why"))
    assert series(snap) == before


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (404, ExitCode.REFUSED, "gone"),
        (429, ExitCode.REFUSED, "back_off"),
        (503, ExitCode.REFUSED, "back_off"),
        (500, ExitCode.REFUSED, "refused"),
        (None, ExitCode.NO_ANSWER, "no_answer"),
        (None, ExitCode.NOT_THE_API, "not_the_api"),
        (None, ExitCode.INTERNAL, "other"),
    ],
)
def test_each_heartbeat_failure_has_its_reason(
    status: int | None, code: ExitCode, reason: str
) -> None:
    assert failure_reason(ServerError("why", exit_code=code, status=status)) == reason


# -- the skew -----------------------------------------------------------------------------------------


def test_the_skew_is_accurate_to_tenths_of_a_second() -> None:
    """The server truncates its Date to whole seconds."""
    made = Stats()
    for n in range(SKEW_SAMPLES):
        sent = at(2.1 * n)
        servers = sent.wall - timedelta(seconds=3)
        made.record_answer(sent, at(2.1 * n + 0.01), servers.replace(microsecond=0), URL)
    assert made.skew_s == pytest.approx(3, abs=0.3)


def test_the_skew_is_measured_again_for_another_endpoint() -> None:
    made = Stats()
    made.record_answer(at(0), at(0), NOON, URL)
    made.record_answer(at(1), at(1), NOON - timedelta(seconds=60), "http://b/clientfailover")
    assert made.skew_s == pytest.approx(61)


def test_an_overtaken_answer_does_not_set_the_renewal_time_back() -> None:
    made = Stats()
    made.record_answer(at(2), at(3), None, URL)
    made.record_answer(at(1), at(4), None, URL)
    assert (made.heard_at, made.renewed_at) == (NOW + 2, NOON + timedelta(seconds=2))
    assert made.skew_s is None


# -- the page -----------------------------------------------------------------------------------------


def page(accept: str) -> tuple[str, str]:
    registry = CollectorRegistry()
    metrics.register(registry, snapshot)
    body, content_type = metrics.build_page(registry, accept)
    return body.decode(), content_type


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain;version=0.0.4"])
def test_the_text_format_is_the_default(accept: str) -> None:
    text, content_type = page(accept)
    assert content_type.startswith("text/plain")
    names = {family.name for family in classic(text)}
    assert "failover_agent_role" in names


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
        "application/openmetrics-text;version=x;q=0.8,text/plain;version=0.0.4;q=0.2",
    ],
)
def test_openmetrics_is_sent_if_the_scraper_accepts_it(accept: str) -> None:
    text, content_type = page(accept)
    assert content_type.startswith("application/openmetrics-text")
    families = {family.name: family for family in openmetrics(text)}  # type: ignore[no-untyped-call] # theirs
    assert families["failover_agent_role_changes"].type == "counter"


def test_every_family_has_a_help_that_is_a_sentence() -> None:
    for family in metrics.AgentCollector(snapshot).collect():
        assert family.documentation.endswith(".")
        assert family.samples, family.name


# -- failsafe -----------------------------------------------------------------------------------------


def test_failsafe_has_metrics_only_if_it_is_configured() -> None:
    registry = CollectorRegistry()
    metrics.register(registry, lambda: snapshot(failsafe=None))
    assert not [family for family in registry.collect() if "failsafe" in family.name]


def test_a_hold_is_seen_with_its_length_and_its_voters() -> None:
    snap = snapshot()
    states = {one: value(snap, "failsafe_state", state=one.value) for one in Readiness}
    assert states == {one: float(one is Readiness.HOLDING) for one in Readiness}
    assert value(snap, "failsafe_hold_seconds") == 30.0
    assert value(snap, "failsafe_member_ready", member="host-b") == 1
    assert value(snap, "failsafe_questions_total", answer="no") == 1
    assert value(snap, "failsafe_votes_total", vote="no") == 2
    assert value(snap, "failsafe_refused_total", reason="not_authentic") == 5


def test_a_promise_is_seen_with_what_is_left_of_it() -> None:
    snap = snapshot(failsafe=failsafe(readiness=Readiness.PROMISED, promised_until=NOW + 7.0))
    assert value(snap, "failsafe_promise_remaining_seconds") == 7.0
    assert value(snap, "failsafe_hold_seconds") is None
    assert value(snapshot(), "failsafe_promise_remaining_seconds") == 0.0


def test_a_primary_that_holds_by_votes_is_ready_though_no_heartbeat_is_answered() -> None:
    snap = snapshot()
    snap.stats.heard_at = NOW - 3600.0
    assert why_not_ready(snap) is None
    assert why_not_ready(replace(snap, **SECONDARY)) is not None
