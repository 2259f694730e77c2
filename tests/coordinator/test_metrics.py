"""The coordinator's metrics: served by the real application, read by Prometheus' own parser."""

import asyncio
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from shutil import which
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from agent.coordinator.api import Api
from agent.coordinator.metrics import DECISIONS, FAILSAFE_EVENTS, Metrics
from agent.coordinator.service import Coordinator
from agent.coordinator.store.memory import MemoryStore
from agent.core.group_state import Policy
from agent.model import (
    TICKS_PER_SECOND,
    GroupConfig,
    GroupRecord,
    HistoryEntry,
    Tenure,
    TenureEnd,
)
from agent.ops.clock import Clock

BASE = "http://test/api/v1/clientfailover"


async def scraped(http: httpx2.AsyncClient) -> dict[tuple[str, ...], float]:
    page = (await http.get("http://test/metrics")).text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


@pytest.fixture
async def api() -> Api:
    metrics, clock = Metrics(cache_s=0), Clock()
    coordinator = Coordinator(MemoryStore(), clock.now, Policy(), meter=metrics)
    await coordinator.start()
    return Api(coordinator, clock.now, metrics=metrics)


async def test_groups_sessions_requests_and_tenures_are_counted(api: Api) -> None:
    """One group through a promotion and the end of a tenure."""
    transport = httpx2.ASGITransport(app=api)
    prefix = "failover_coordinator"
    async with httpx2.AsyncClient(transport=transport) as http:
        await http.post(f"{BASE}/groups", json={"Id": "g", "FailoverTimeout": "00:01:00"})
        await http.post(f"{BASE}/groups/g/clientsessions", json={"Id": "a"})
        await http.post(f"{BASE}/groups/g/clientsessions", json={"Id": "b"})
        before = await scraped(http)
        assert before[f"{prefix}_groups", "none"] == 1
        assert before[f"{prefix}_groups_without_primary",] == 1
        assert before[f"{prefix}_sessions", "true", "Secondary"] == 2
        for _ in range(2):
            await http.post(
                f"{BASE}/groups/g/clientsessions/a/heartbeat", json={"FailoverScore": 100}
            )
        held = await scraped(http)
        assert held[f"{prefix}_groups", "primary"] == 1
        assert held[f"{prefix}_groups", "none"] == 0
        assert held[f"{prefix}_groups_without_primary",] == 0
        assert held[f"{prefix}_sessions", "true", "Primary"] == 1
        assert held[f"{prefix}_tenures_started_total",] == 1
        assert held[f"{prefix}_requests_total", "200", "post_heartbeat"] == 2
        assert held[f"{prefix}_request_duration_seconds_count", "post_heartbeat"] == 2
        assert held[f"{prefix}_store_commit_duration_seconds_count",] >= 4
        await http.delete(f"{BASE}/groups/g/clientsessions/a")
        await http.get(f"{BASE}/nowhere")
        after = await scraped(http)
        assert after[f"{prefix}_tenures_ended_total", "deleted"] == 1
        assert after[f"{prefix}_requests_total", "404", "none"] == 1
        assert after[f"{prefix}_blocked_readers",] == 0
        assert 0 < after["process_open_fds",] <= after["process_max_fds",]
        assert after["process_resident_memory_bytes",] > 0


async def test_the_metrics_page_has_the_form_that_is_accepted(api: Api) -> None:
    transport = httpx2.ASGITransport(app=api)
    async with httpx2.AsyncClient(transport=transport) as http:
        classic = await http.get("http://test/metrics")
        assert classic.headers["content-type"].startswith("text/plain")
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        open_metrics = await http.get("http://test/metrics", headers=accept)
        assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
        assert open_metrics.text.endswith("# EOF\n")


async def test_promtool_finds_nothing_to_complain_about(api: Api) -> None:
    if which("promtool") is None:
        pytest.skip("needs: prometheus: apt-get install prometheus")
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=api)) as http:
        await http.post(f"{BASE}/groups", json={"Id": "g", "FailoverTimeout": "00:01:00"})
        page = (await http.get("http://test/metrics")).text
    assert 'failover_coordinator_requests_total{code="201",route="create_group"} 1.0' in page
    checked = await asyncio.to_thread(
        subprocess.run,
        ["promtool", "check", "metrics"],
        input=page,
        text=True,
        capture_output=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_decisions_are_counted_by_kind() -> None:
    """A role is offered, not taken up, offered to another, taken up, revoked and offered again."""
    metrics = Metrics()
    noon = datetime(2026, 1, 31, 12, tzinfo=UTC)
    free = GroupRecord(GroupConfig("g", 10 * TICKS_PER_SECOND))
    offered = replace(free, pending="a")
    other = replace(free, pending="b")
    held = replace(free, holder=Tenure("b", 1, noon, "chosen"), epoch=1)
    handing = replace(held, holder=Tenure("b", 1, noon, "chosen", revoked=True), pending="a")
    taken = replace(held, holder=Tenure("a", 2, noon, "chosen"), epoch=2)
    seen = []
    for before, after in pairwise(
        [free, offered, other, held, held, handing, handing, taken, free]
    ):
        metrics.decided(before, after, ())
        name = "failover_coordinator_decisions_total"
        value = metrics.registry.get_sample_value
        seen.append(tuple(value(name, {"kind": kind}) for kind in DECISIONS))
    assert seen == [
        (1, 0, 0),
        (2, 1, 0),
        (2, 1, 0),
        (2, 1, 0),
        (3, 1, 1),
        (3, 1, 1),
        (3, 1, 1),
        (3, 1, 1),
    ]


def test_failsafe_events_are_counted_and_a_resumed_tenure_does_not_begin_again() -> None:
    metrics, noon = Metrics(), datetime(2026, 1, 31, 12, tzinfo=UTC)
    record = GroupRecord(GroupConfig("g", 10 * TICKS_PER_SECOND), epoch=1)
    entries = [
        HistoryEntry(1, "a", noon, "chosen, resumed"),
        HistoryEntry(2, "b", noon, "chosen"),
        HistoryEntry(2, "b", noon, "chosen", noon, "bound", TenureEnd.REFUSED),
        HistoryEntry(3, "", noon, "lifted", noon, "lifted", TenureEnd.LIFTED),
        HistoryEntry(4, "", noon, "restored", noon, "restored", TenureEnd.RESTORED),
    ]
    metrics.decided(record, record, entries)
    value = metrics.registry.get_sample_value
    for kind in FAILSAFE_EVENTS:
        assert value("failover_coordinator_failsafe_events_total", {"kind": kind}) == 1
    assert value("failover_coordinator_tenures_started_total") == 1
    ended = "failover_coordinator_tenures_ended_total"
    assert value(ended, {"reason": "refused"}) == 1
    assert value(ended, {"reason": "lifted"}) is None


async def test_groups_with_failsafe_are_counted_by_state() -> None:
    metrics, clock = Metrics(cache_s=0), Clock()
    coordinator = Coordinator(MemoryStore(), clock.now, Policy(), meter=metrics)
    await coordinator.start()
    api = Api(coordinator, clock.now, metrics=metrics)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=api)) as http:
        for group, url in (("with", "http://a:1"), ("without", None)):
            await http.post(f"{BASE}/groups", json={"Id": group, "FailoverTimeout": "00:01:00"})
            sessions = f"{BASE}/groups/{group}/clientsessions"
            await http.post(sessions, json={"Id": "s"})
            body = {"FailoverScore": 97.5, "Instance": "i", "FailsafeUrl": url}
            await http.post(f"{sessions}/s/heartbeat", json=body)
        await http.get("http://test/metrics")
    await coordinator.stop()
    value = metrics.registry.get_sample_value
    name = "failover_coordinator_failsafe_groups"
    assert [value(name, {"state": state}) for state in ("off", "ready", "restricted")] == [1, 0, 0]


async def test_each_session_has_series_if_that_is_asked_for() -> None:
    metrics, clock = Metrics(sessions=True, cache_s=0), Clock()
    coordinator = Coordinator(MemoryStore(), clock.now, Policy(), meter=metrics)
    await coordinator.start()
    api = Api(coordinator, clock.now, metrics=metrics)
    strange = 'a "b" \\ü'
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=api)) as http:
        await http.post(f"{BASE}/groups", json={"Id": strange, "FailoverTimeout": "00:01:00"})
        group = f"{BASE}/groups/{quote(strange)}/clientsessions"
        for session in ("s", "t"):
            await http.post(group, json={"Id": session})
        for _ in range(2):
            await http.post(f"{group}/s/heartbeat", json={"FailoverScore": 97.5})
        pages = [
            (await http.get("http://test/metrics", headers={"Accept": accept})).text
            for accept in ("", "application/openmetrics-text; version=1.0.0")
        ]
    place = {"tenant": "default", "namespace": "default", "group": strange}
    parsers: tuple[Any, ...] = (
        text_string_to_metric_families,
        openmetrics.text_string_to_metric_families,
    )
    for page, parse in zip(pages, parsers, strict=True):
        samples = {
            (
                sample.name.removeprefix("failover_coordinator_session_"),
                *sample.labels.items(),
            ): sample.value
            for family in parse(page)
            for sample in family.samples
            if "_session_" in sample.name
        }

        def value(name: str, found: dict[Any, float] = samples, **labels: str) -> float | None:
            return found.get((name, *place.items(), *labels.items()))

        assert value("role", session="s", role="Primary") == 1
        assert value("role", session="s", role="Secondary") == 0
        assert value("role", session="t", role="Secondary") == 1
        assert value("score", session="s") == 97.5
        beat = value("heartbeat_timestamp_seconds", session="s")
        assert beat is not None
        assert abs(beat - clock.wall().timestamp()) < 60
        assert value("score", session="t") is None
        assert len(samples) == 8
    await coordinator.stop()
