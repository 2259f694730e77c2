"""The agent's metrics, written for Prometheus.

Owns names, labels and help texts; docs/metrics.md is made of them. Each page is computed from one
snapshot at the moment of the scrape, in the event loop: some milliseconds at most. Labels are closed
sets or come from the configuration. Importing this module costs memory, so only an agent with a
listener does.
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
from agent.daemon.telemetry import Histogram, Snapshot, why_not_ready
from agent.model import Role
from agent.ops import logs

Labels: TypeAlias = Mapping[str, str]
Samples: TypeAlias = Iterable[tuple[Labels, float | None]]

OPENMETRICS = "application/openmetrics-text"


def page_of(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """One page of metrics, and its content type.

    Args:
        registry: what is on it.
        accept: the scraper's Accept header. OpenMetrics 1.0 if it names that, else the classic text.
    """
    if OPENMETRICS in accept.lower():
        page: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call] # theirs
        return page, openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


def register(registry: CollectorRegistry, take: Callable[[], Snapshot]) -> None:
    """Put an agent's metrics, and those of its process, into a registry.

    Args:
        registry: an own one.
        take: called at each scrape.
    """
    registry.register(AgentCollector(take))
    ProcessCollector(registry=registry)


class AgentCollector(Collector):
    """Every metric of one agent.

    What is not known has no sample: a time that never was is not 0.
    """

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take

    def collect(self) -> Iterator[Metric]:
        """Each family, of one and the same moment."""
        snap = self._take()
        yield from _of_identity(snap)
        yield from _of_lease(snap)
        yield from _of_contact(snap)
        yield from _of_hooks(snap)
        yield from _of_data(snap)
        yield from _of_health(snap)
        yield from _of_mqtt(snap)


def _of_identity(snap: Snapshot) -> Iterator[Metric]:
    yield _gauge(
        "failover_agent_build_info",
        "Version of the agent and of Python; always 1.",
        [({"version": __version__, "python": platform.python_version()}, 1)],
    )
    yield _gauge(
        "failover_agent_session_info",
        "Group and session id of this member, to join other metrics with; always 1.",
        [({"group": snap.group, "session": snap.session_id}, 1)],
    )
    yield _gauge(
        "failover_agent_endpoint_in_use",
        "1 for the endpoint that the next request goes to, 0 for the other configured ones.",
        [({"endpoint": url}, float(url == snap.endpoint)) for url in snap.endpoints],
    )


def _of_lease(snap: Snapshot) -> Iterator[Metric]:
    timing, stats = snap.timing, snap.stats
    yield _gauge(
        "failover_agent_role",
        "1 for the role at this moment, by the lease's deadline; 0 for the others.",
        [({"role": role.value}, float(role is snap.role)) for role in Role],
    )
    yield _gauge(
        "failover_agent_epoch",
        "Newest epoch seen: the tenure of this member while it holds the role. None if the server"
        " has no epochs.",
        [({}, snap.epoch)],
    )
    yield _gauge(
        "failover_agent_failover_timeout_seconds",
        "L, for how long after its last heartbeat a member is waited for.",
        [({}, timing.lease_s)],
    )
    yield _gauge(
        "failover_agent_budget_seconds",
        "How L is divided: renew (then demotion starts), demote (then it is done or killed), margin.",
        [
            ({"part": "renew"}, timing.renew_s),
            ({"part": "demote"}, timing.demote_s),
            ({"part": "margin"}, timing.margin_s),
        ],
    )
    yield _gauge(
        "failover_agent_lease_remaining_seconds",
        "Until somebody else may become primary; 0 without a lease.",
        [({}, max(0.0, snap.lease_until - snap.now))],
    )
    yield _gauge(
        "failover_agent_renew_remaining_seconds",
        "Until demotion starts unless a heartbeat is answered; 0 without a lease.",
        [({}, max(0.0, snap.renew_by - snap.now))],
    )
    yield _counter(
        "failover_agent_role_changes_total",
        "Changes of the role of this member, by what it was, what it became, and why.",
        [
            ({"from": before.value, "to": after.value, "cause": cause.value}, count)
            for (before, after, cause), count in stats.changes.items()
        ],
    )
    yield _gauge(
        "failover_agent_demotion_slack_seconds",
        "How much of L was left when the last demotion was done. Below 0: two members may have been"
        " active. Of a demotion by the guard only the log tells it.",
        [({}, stats.slack_s)],
    )
    yield _gauge(
        "failover_agent_demotion_slack_min_seconds",
        "The smallest slack of a demotion since the start of the agent.",
        [({}, None if stats.slack_s is None else stats.least_slack_s)],
    )


def _of_contact(snap: Snapshot) -> Iterator[Metric]:
    stats = snap.stats
    yield _gauge(
        "failover_agent_last_renewal_timestamp_seconds",
        "When the newest answered heartbeat was sent, by this host's clock, since 1970.",
        [({}, _unix(stats.renewed_at))],
    )
    yield _histogram(
        "failover_agent_heartbeat_duration_seconds",
        "From sending a heartbeat to its answer. Failed ones are not among them.",
        [({}, stats.beats)],
    )
    yield _counter(
        "failover_agent_heartbeat_failures_total",
        "Heartbeats that were not answered, or with an error.",
        [({"reason": reason}, count) for reason, count in stats.beats_failed.items()],
    )
    yield _gauge(
        "failover_agent_clock_skew_seconds",
        "How far this host's clock is ahead of the server's, by its Date header, which has whole"
        " seconds: within some tenths of a second, at a plain v1 server up to 1 s too much. Leases do"
        " not depend on it, data-processed times do.",
        [({}, stats.skew_s)],
    )


def _of_hooks(snap: Snapshot) -> Iterator[Metric]:
    stats = snap.stats
    yield _histogram(
        "failover_agent_hook_duration_seconds",
        "How long hooks took, whatever came of it.",
        [({"hook": name}, durations) for name, durations in stats.hooks.items()],
    )
    yield _counter(
        "failover_agent_hook_runs_total",
        "Hooks that have ended: ok, or failed (which includes killed ones).",
        [
            ({"hook": name, "outcome": "ok" if ok else "failed"}, count)
            for (name, ok), count in stats.hooks_ended.items()
        ],
    )
    yield _counter(
        "failover_agent_notifications_dropped_total",
        "Notification hooks that were never run, or cut short by the end of the agent.",
        [({}, snap.notifications_dropped)],
    )
    yield _counter(
        "failover_agent_notifications_failed_total",
        "Notification hooks that ended otherwise than with success.",
        [({}, snap.notifications_failed)],
    )


def _of_data(snap: Snapshot) -> Iterator[Metric]:
    yield _gauge(
        "failover_agent_data_processed_timestamp_seconds",
        "Up to when this member has processed data, since 1970.",
        [({}, _unix(snap.data))],
    )
    yield _gauge(
        "failover_agent_data_lag_seconds",
        "This host's clock minus this member's data-processed time.",
        [({}, _age_s(snap, snap.data))],
    )
    yield _gauge(
        "failover_agent_group_data_processed_timestamp_seconds",
        "Up to when the group has processed data, as a heartbeat was last told, since 1970.",
        [({}, _unix(snap.group_data))],
    )
    yield _gauge(
        "failover_agent_group_data_lag_seconds",
        "This host's clock minus the group's data-processed time. That is of the primary's clock: the"
        " difference of the two clocks is in it.",
        [({}, _age_s(snap, snap.group_data))],
    )
    yield _counter(
        "failover_agent_progress_refused_total",
        "Data-processed times that were not taken.",
        [({"reason": reason}, count) for reason, count in snap.refused.items()],
    )


def _of_health(snap: Snapshot) -> Iterator[Metric]:
    stats = snap.stats
    yield _gauge(
        "failover_agent_ready",
        "1 for a member that holds the role or could take it over, as /readyz says; else 0.",
        [({}, float(why_not_ready(snap) is None))],
    )
    yield _gauge(
        "failover_agent_score",
        "FailoverScore, 0 to 100, as heartbeats say it.",
        [({}, snap.score)],
    )
    yield _gauge(
        "failover_agent_check_up",
        "1 for a health check that passes, by its rise and fall; else 0.",
        [({"check": name}, float(up)) for name, up in snap.checks.items()],
    )
    yield _gauge(
        "failover_agent_unfit",
        "1 for what makes this host unfit to be primary; else 0.",
        [
            ({"source": source}, float(source in snap.unfit))
            for source in ("checks", "guard", "workload")
        ],
    )
    yield _counter(
        "failover_agent_stalls_total",
        "How often this process did not run for longer than its margin: late (frozen, or starved of"
        " CPU), or suspended with its host.",
        [({"kind": kind}, count) for kind, count in stats.stalls.items()],
    )
    yield _gauge(
        "failover_agent_guard_up",
        "1 while the guard answers, else 0. Not there without a guard.",
        [({}, None if snap.guard_up is None else float(snap.guard_up))],
    )
    yield _counter(
        "failover_agent_guard_restarts_total",
        "How often the guard was lost, and another one started.",
        [({}, None if snap.guard_up is None else stats.guard_lost)],
    )
    yield _gauge(
        "failover_agent_guard_fired",
        "1 if the process before this one was ended by its guard, which demoted in its place; else 0.",
        [({}, float(stats.guard_fired))],
    )
    yield _counter(
        "failover_agent_log_lines_dropped_total",
        "Log lines that were dropped because nobody reads this process's stderr.",
        [({}, logs.dropped())],
    )


def _of_mqtt(snap: Snapshot) -> Iterator[Metric]:
    there = snap.mqtt_up is not None
    yield _gauge(
        "failover_agent_mqtt_up",
        "1 while the role is announced to the MQTT broker, else 0. Not there without one.",
        [({}, float(snap.mqtt_up) if snap.mqtt_up is not None else None)],
    )
    yield _counter(
        "failover_agent_mqtt_failures_total",
        "Connections to the MQTT broker that failed or were lost.",
        [({}, snap.mqtt_failures if there else None)],
    )


# -- families ---------------------------------------------------------------------------------------


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, samples: Samples
) -> GaugeMetricFamily | CounterMetricFamily:
    for labels, value in samples:
        if value is not None:
            family.add_metric(list(labels.values()), value)
    return family


def _names(samples: Iterable[tuple[Labels, object]]) -> list[str]:
    return next(([*labels] for labels, _ in samples), [])


def _gauge(name: str, text: str, samples: list[tuple[Labels, float | None]]) -> Metric:
    return _filled(GaugeMetricFamily(name, text, labels=_names(samples)), samples)


def _counter(name: str, text: str, samples: list[tuple[Labels, float | None]]) -> Metric:
    return _filled(CounterMetricFamily(name, text, labels=_names(samples)), samples)


def _histogram(name: str, text: str, samples: list[tuple[Labels, Histogram]]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=_names(samples))
    for labels, histogram in samples:
        total, buckets = 0, []
        bounds = [*map(str, histogram.bounds_s), "+Inf"]
        for bound, count in zip(bounds, histogram.counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(list(labels.values()), buckets, histogram.sum_s)
    return family


def _unix(time: datetime | None) -> float | None:
    return time.timestamp() if time is not None else None


def _age_s(snap: Snapshot, time: datetime | None) -> float | None:
    return (snap.wall - time).total_seconds() if time is not None else None
