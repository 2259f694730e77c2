"""The agent's metrics, in the formats of Prometheus.

Owns names, labels and help texts; docs/metrics.md is generated from them. Each page is computed from one
snapshot at the scrape, in the event loop: some milliseconds at most. Labels are closed sets or come from
the configuration. This module needs memory, so only an agent with a listener imports it.
"""

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import TypeAlias

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from agent import __version__
from agent.core.failsafe_view import FailsafeView, Readiness
from agent.daemon.failsafe_report import FailsafeSnapshot
from agent.daemon.telemetry import Histogram, Snapshot, why_not_ready
from agent.model import Role
from agent.ops import logs

Labels: TypeAlias = Mapping[str, str]
Samples: TypeAlias = Iterable[tuple[Labels, float | None]]

OPENMETRICS = "application/openmetrics-text"


def build_page(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Build a page of metrics; return the page and its content type.

    Args:
        registry: the metrics.
        accept: the scraper's Accept header: OpenMetrics 1.0 if it names that, else the text format.
    """
    if OPENMETRICS in accept.lower():
        # Our names need no escaping, and the default looks at each of their characters.
        escaping = openmetrics.ALLOWUTF8
        page: bytes = openmetrics.generate_latest(registry, escaping)  # type: ignore[no-untyped-call] # theirs
        return page, openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


def register(registry: CollectorRegistry, take_snapshot: Callable[[], Snapshot]) -> None:
    """Register an agent's metrics, and those of its process.

    Args:
        registry: for this agent alone.
        take_snapshot: called at each scrape.
    """
    registry.register(AgentCollector(take_snapshot))
    ProcessCollector(registry=registry)


class AgentCollector(Collector):
    """Every metric of one agent. An unknown value has no sample, rather than 0."""

    def __init__(self, take_snapshot: Callable[[], Snapshot]) -> None:
        self._take_snapshot = take_snapshot

    def collect(self) -> Iterator[Metric]:
        """Each family, all from one snapshot."""
        snap = self._take_snapshot()
        yield from _identity_families(snap)
        yield from _lease_families(snap)
        yield from _contact_families(snap)
        yield from _hook_families(snap)
        yield from _data_families(snap)
        yield from _health_families(snap)
        yield from _mqtt_families(snap)
        if snap.failsafe is not None:
            yield from _failsafe_families(snap, snap.failsafe)


def _identity_families(snap: Snapshot) -> Iterator[Metric]:
    yield _gauge(
        "failover_agent_build_info",
        "Version of the agent and of Python; always 1.",
        [({"version": __version__, "python": platform.python_version()}, 1)],
    )
    yield _gauge(
        "failover_agent_session_info",
        "Group and session id of this member, for joins with other metrics; always 1.",
        [({"group": snap.group, "session": snap.session_id}, 1)],
    )
    yield _gauge(
        "failover_agent_endpoint_in_use",
        "1 for the endpoint that the next request goes to, 0 for the other configured ones.",
        [({"endpoint": url}, float(url == snap.endpoint)) for url in snap.endpoints],
    )


def _lease_families(snap: Snapshot) -> Iterator[Metric]:
    timing, stats = snap.timing, snap.stats
    yield _gauge(
        "failover_agent_role",
        "1 for the current role, which is Secondary from the renewal deadline on; 0 for the others.",
        [({"role": role.value}, float(role is snap.role)) for role in Role],
    )
    yield _gauge(
        "failover_agent_epoch",
        "Newest epoch seen; while this member holds the role, the epoch of its tenure. Absent if the"
        " server has no epochs.",
        [({}, snap.epoch)],
    )
    yield _gauge(
        "failover_agent_failover_timeout_seconds",
        "L, the lease: how long after its last heartbeat a holder keeps the role.",
        [({}, timing.lease_s)],
    )
    yield _gauge(
        "failover_agent_budget_seconds",
        "The parts of L: renew (then demotion starts), demote (then it is done or killed), margin.",
        [
            ({"part": "renew"}, timing.renew_s),
            ({"part": "demote"}, timing.demote_s),
            ({"part": "margin"}, timing.margin_s),
        ],
    )
    yield _gauge(
        "failover_agent_lease_remaining_seconds",
        "Time until another member may become primary; 0 without a lease.",
        [({}, max(0.0, snap.lease_until - snap.now))],
    )
    yield _gauge(
        "failover_agent_renew_remaining_seconds",
        "Time until the renewal deadline, at which demotion starts; 0 without a lease.",
        [({}, max(0.0, snap.renew_by - snap.now))],
    )
    yield _counter(
        "failover_agent_role_changes_total",
        "Role changes of this member, by previous role, new role and cause.",
        [
            ({"from": before.value, "to": after.value, "cause": cause.value}, count)
            for (before, after, cause), count in stats.role_changes.items()
        ],
    )
    yield _gauge(
        "failover_agent_demotion_slack_seconds",
        "How much of L was left at the end of the last demotion. Below 0: two members may have been"
        " active. Demotions by the guard only log it.",
        [({}, stats.slack_s)],
    )
    yield _gauge(
        "failover_agent_demotion_slack_min_seconds",
        "The smallest slack of a demotion since the start of the agent.",
        [({}, None if stats.slack_s is None else stats.min_slack_s)],
    )


def _contact_families(snap: Snapshot) -> Iterator[Metric]:
    stats = snap.stats
    yield _gauge(
        "failover_agent_last_renewal_timestamp_seconds",
        "Unix time at which the newest answered heartbeat was sent, by this host's clock.",
        [({}, _unix_time(stats.renewed_at))],
    )
    yield _histogram(
        "failover_agent_heartbeat_duration_seconds",
        "Duration from sending a heartbeat to its answer, without failed ones.",
        [({}, stats.heartbeats)],
    )
    yield _counter(
        "failover_agent_heartbeat_failures_total",
        "Heartbeats without an answer, or answered with an error.",
        [({"reason": reason}, count) for reason, count in stats.heartbeats_failed.items()],
    )
    yield _gauge(
        "failover_agent_clock_skew_seconds",
        "How far this host's clock is ahead of the server's, by its Date header. That has whole"
        " seconds: accurate to some tenths of a second, at a plain v1 server up to 1 s too high. Leases"
        " do not depend on it, data-processed times do.",
        [({}, stats.skew_s)],
    )


def _hook_families(snap: Snapshot) -> Iterator[Metric]:
    stats = snap.stats
    yield _histogram(
        "failover_agent_hook_duration_seconds",
        "Duration of hooks, successful or not.",
        [({"hook": name}, durations) for name, durations in stats.hooks.items()],
    )
    yield _counter(
        "failover_agent_hook_runs_total",
        "Hooks that have ended, by outcome: ok, or failed (which includes killed ones).",
        [
            ({"hook": name, "outcome": "ok" if ok else "failed"}, count)
            for (name, ok), count in stats.hooks_ended.items()
        ],
    )
    yield _counter(
        "failover_agent_notifications_dropped_total",
        "Notification hooks that were not run, or were killed at the exit of the agent.",
        [({}, snap.notifications_dropped)],
    )
    yield _counter(
        "failover_agent_notifications_failed_total",
        "Notification hooks that have failed.",
        [({}, snap.notifications_failed)],
    )


def _data_families(snap: Snapshot) -> Iterator[Metric]:
    yield _gauge(
        "failover_agent_data_processed_timestamp_seconds",
        "This member's data-processed time, as Unix time.",
        [({}, _unix_time(snap.data))],
    )
    yield _gauge(
        "failover_agent_data_lag_seconds",
        "This host's clock minus this member's data-processed time.",
        [({}, _age_s(snap, snap.data))],
    )
    yield _gauge(
        "failover_agent_group_data_processed_timestamp_seconds",
        "The group's data-processed time in the last heartbeat's answer, as Unix time.",
        [({}, _unix_time(snap.group_data))],
    )
    yield _gauge(
        "failover_agent_group_data_lag_seconds",
        "This host's clock minus the group's data-processed time. It includes the difference to the"
        " primary's clock.",
        [({}, _age_s(snap, snap.group_data))],
    )
    yield _counter(
        "failover_agent_progress_refused_total",
        "Data-processed times that were refused, by reason.",
        [({"reason": reason}, count) for reason, count in snap.refused.items()],
    )


def _health_families(snap: Snapshot) -> Iterator[Metric]:
    stats = snap.stats
    yield _gauge(
        "failover_agent_ready",
        "1 for a member that holds the role or could take it over, as in /readyz; else 0.",
        [({}, float(why_not_ready(snap) is None))],
    )
    yield _gauge(
        "failover_agent_score",
        "FailoverScore of the heartbeats, 0 to 100.",
        [({}, snap.score)],
    )
    yield _gauge(
        "failover_agent_check_up",
        "1 for a health check that passes, by its rise and fall; else 0.",
        [({"check": name}, float(up)) for name, up in snap.checks.items()],
    )
    yield _gauge(
        "failover_agent_unfit",
        "1 for each source by which this host is unfit to be primary; else 0.",
        [
            ({"source": source}, float(source in snap.unfit))
            for source in ("checks", "guard", "workload")
        ],
    )
    yield _counter(
        "failover_agent_stalls_total",
        "Stalls of this process for longer than its margin: late (frozen, or starved of CPU), or"
        " suspended with its host.",
        [({"kind": kind}, count) for kind, count in stats.stalls.items()],
    )
    yield _gauge(
        "failover_agent_guard_up",
        "1 while the guard answers, else 0. Absent without a guard.",
        [({}, None if snap.guard_up is None else float(snap.guard_up))],
    )
    yield _counter(
        "failover_agent_guard_restarts_total",
        "Restarts of a guard that was lost.",
        [({}, None if snap.guard_up is None else stats.guard_lost)],
    )
    yield _gauge(
        "failover_agent_guard_fired",
        "1 if the guard demoted in place of the previous agent process; else 0.",
        [({}, float(stats.guard_fired))],
    )
    yield _counter(
        "failover_agent_log_lines_dropped_total",
        "Log lines that were dropped because this process's stderr is not read.",
        [({}, logs.dropped())],
    )


def _mqtt_families(snap: Snapshot) -> Iterator[Metric]:
    there = snap.mqtt_up is not None
    yield _gauge(
        "failover_agent_mqtt_up",
        "1 while the role is announced to the MQTT broker, else 0. Absent without one.",
        [({}, float(snap.mqtt_up) if snap.mqtt_up is not None else None)],
    )
    yield _counter(
        "failover_agent_mqtt_failures_total",
        "Failed or lost connections to the MQTT broker.",
        [({}, snap.mqtt_failures if there else None)],
    )


def _failsafe_families(snap: Snapshot, failsafe: FailsafeSnapshot) -> Iterator[Metric]:
    view = failsafe.view
    yield _gauge(
        "failover_agent_failsafe_state",
        "1 for the state of failsafe, 0 for the others. ready: could keep the role without the coordinator,"
        " or answers a primary; holding: keeps it that way. Absent, as all of these, unless failsafe is configured.",
        [({"state": one.value}, float(one is view.readiness)) for one in Readiness],
    )
    yield _gauge(
        "failover_agent_failsafe_member_ready",
        "At a primary, 1 for each other member whose last answer was yes; else 0.",
        [({"member": one.member.id}, float(one.ready)) for one in view.members],
    )
    yield _gauge(
        "failover_agent_failsafe_hold_seconds",
        "How long this member has been primary without the coordinator; absent while it is not.",
        [({}, snap.now - view.since if _is_holding(view) and view.since is not None else None)],
    )
    yield _gauge(
        "failover_agent_failsafe_promise_remaining_seconds",
        "How long a promise to another member still forbids this one any role; 0 without a promise.",
        [({}, max(0.0, (view.promised_until or snap.now) - snap.now))],
    )
    yield _counter(
        "failover_agent_failsafe_questions_total",
        "Questions to other members while the coordinator was in doubt, by the answer; error: no valid one"
        " in time.",
        [({"answer": one.value}, count) for one, count in failsafe.asked.items()],
    )
    yield _counter(
        "failover_agent_failsafe_votes_total",
        "Answers to the questions of other members.",
        [({"vote": one.value}, count) for one, count in failsafe.votes.items()],
    )
    yield _counter(
        "failover_agent_failsafe_refused_total",
        "Requests to the listener of failsafe that were not accepted as a member's question, by reason;"
        " no_challenge is normal for the first one of a process.",
        [({"reason": reason}, count) for reason, count in failsafe.refused.items()],
    )


def _is_holding(view: FailsafeView) -> bool:
    return view.readiness is Readiness.HOLDING


# -- families ---------------------------------------------------------------------------------------


def _add_samples(
    family: GaugeMetricFamily | CounterMetricFamily, samples: Samples
) -> GaugeMetricFamily | CounterMetricFamily:
    for labels, value in samples:
        if value is not None:
            family.add_metric(list(labels.values()), value)
    return family


def _label_names(samples: Iterable[tuple[Labels, object]]) -> list[str]:
    return next(([*labels] for labels, _ in samples), [])


def _gauge(name: str, text: str, samples: list[tuple[Labels, float | None]]) -> Metric:
    return _add_samples(GaugeMetricFamily(name, text, labels=_label_names(samples)), samples)


def _counter(name: str, text: str, samples: list[tuple[Labels, float | None]]) -> Metric:
    return _add_samples(CounterMetricFamily(name, text, labels=_label_names(samples)), samples)


def _histogram(name: str, text: str, samples: list[tuple[Labels, Histogram]]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=_label_names(samples))
    for labels, histogram in samples:
        total, buckets = 0, []
        bounds = [*map(str, histogram.bounds_s), "+Inf"]
        for bound, count in zip(bounds, histogram.counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(list(labels.values()), buckets, histogram.sum_s)
    return family


def _unix_time(time: datetime | None) -> float | None:
    return time.timestamp() if time is not None else None


def _age_s(snap: Snapshot, time: datetime | None) -> float | None:
    return (snap.wall - time).total_seconds() if time is not None else None
