"""The metrics of one of several coordinators (R19): leadership, etcd, and forwarded requests."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.coordinator.forwarding import Forwarder
from agent.coordinator.leadership import Leadership

PREFIX = "failover_coordinator"


class ClusterMetrics(Collector):
    """Collects the numbers at each scrape."""

    def __init__(self, leadership: Leadership, forwarder: Forwarder) -> None:
        self._leadership = leadership
        self._forwarder = forwarder

    def collect(self) -> Iterator[Metric]:
        """Every family."""
        leadership, forwarder = self._leadership, self._forwarder
        for name, text, value in (
            (
                "shards_led",
                "Shards whose groups this coordinator decides about.",
                len(leadership.led),
            ),
            (
                "shards_without_leader",
                "Shards that no coordinator leads, as last seen in etcd.",
                len(leadership.without_leader),
            ),
            (
                "members",
                "Coordinators with a session in etcd, as last seen.",
                len(leadership.view.members),
            ),
            (
                "etcd_up",
                "Whether this coordinator has a session with etcd: 1 or 0.",
                int(leadership.fault is None),
            ),
            (
                "leadership_remaining_seconds",
                "How long this coordinator may lead without another renewal; 0: it must not.",
                leadership.remaining_s,
            ),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value)
        for name, text, value in (
            (
                "leaderships",
                "Times at which this coordinator began to lead a shard.",
                leadership.begun,
            ),
            (
                "forwarded_requests",
                "Requests sent to the leader of their group.",
                forwarder.forwarded,
            ),
            (
                "forwarding_failures",
                "Requests that could not be sent to the leader of their group.",
                forwarder.failed,
            ),
        ):
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, value)
