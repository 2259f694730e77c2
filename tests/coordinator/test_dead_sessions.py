"""R20 in the running coordinator: dead sessions are removed durably, logged and counted."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.coordinator.api import Api
from agent.coordinator.metrics import Metrics
from agent.coordinator.service import Coordinator
from agent.coordinator.store.sqlite import SqliteStore
from agent.core.group_state import AddSession, Policy, ReceiveHeartbeat
from agent.model import GroupConfig, GroupKey, SessionConfig

from .conftest import Process, Stage

KEY = GroupKey("default", "default", "g")
LEASE_S = 2.0
RETENTION_S = 100.0


class RetentionStage(Stage):
    """A coordinator that keeps dead sessions for 100 s, and at most three sessions in a group."""

    def __init__(self) -> None:
        self.metrics = Metrics(cache_s=0)
        super().__init__()

    def build(self) -> Coordinator:
        policy = Policy(0, 0, max_sessions=3, dead_session_retention_s=RETENTION_S)
        return Coordinator(self.store, self.clock, policy, meter=self.metrics)

    async def removed(self) -> dict[str, float]:
        page, _ = await self.metrics.page(self.coordinator, self.clock(), "")
        name = "failover_coordinator_dead_sessions_removed"
        return {
            sample.labels["cause"]: sample.value
            for family in text_string_to_metric_families(page.decode())
            if family.name == name
            for sample in family.samples
        }

    async def pass_time(self, seconds: float, *alive: str) -> None:
        """Time in steps that are no stall, and a heartbeat of each of ``alive`` every second."""
        for _ in range(round(seconds)):
            await self.run_for(1)
            for session_id in alive:
                await self.coordinator.beat(KEY, ReceiveHeartbeat(session_id, 100.0))

    async def kept(self) -> set[str]:
        return set((await self.store.load())[KEY].record.sessions)


@pytest.fixture
async def retention() -> AsyncIterator[RetentionStage]:
    stage = RetentionStage()
    await stage.coordinator.start()
    await stage.coordinator.create_group(KEY, GroupConfig("g", round(LEASE_S * 10_000_000)))
    for session_id in ("a", "b"):
        await stage.coordinator.add_session(KEY, AddSession(SessionConfig(session_id)))
        await stage.coordinator.beat(KEY, ReceiveHeartbeat(session_id, 100.0))
    yield stage
    await stage.coordinator.stop()


async def test_a_dead_session_is_removed_durably_with_a_log_line_and_a_count(
    retention: RetentionStage, caplog: pytest.LogCaptureFixture
) -> None:
    assert await retention.removed() == {"retention": 0, "full": 0}
    await retention.pass_time(RETENTION_S - 2, "a")
    assert await retention.kept() == {"a", "b"}
    with caplog.at_level(logging.INFO):
        await retention.pass_time(4, "a")
    assert await retention.kept() == {"a"}
    (line,) = [one for one in caplog.records if one.message == "dead session removed"]
    fields = line.__dict__["fields"]
    assert (fields["group"], fields["session"], fields["cause"]) == ("g", "b", "retention")
    assert fields["silent_s"] == pytest.approx(RETENTION_S, abs=1)
    assert await retention.removed() == {"retention": 1, "full": 0}


async def test_a_coordinator_that_is_restarted_again_and_again_forgets_the_dead_in_time(
    retention: RetentionStage,
) -> None:
    for _ in range(4):
        await retention.pass_time(RETENTION_S / 5, "a")
        assert await retention.kept() == {"a", "b"}
        await retention.restart()
    await retention.pass_time(10 * LEASE_S + 1, "a")  # it has this long to be heard again
    assert await retention.kept() == {"a"}


async def test_a_removal_that_cannot_be_made_durable_is_made_later(
    retention: RetentionStage,
) -> None:
    await retention.pass_time(RETENTION_S - 2, "a")
    retention.disk_full()
    await retention.pass_time(4, "a")
    assert len(retention.coordinator.sessions(KEY)) == 2
    assert await retention.removed() == {"retention": 0, "full": 0}
    retention.store.failing = None
    await retention.pass_time(2, "a")
    assert len(retention.coordinator.sessions(KEY)) == 1
    assert await retention.removed() == {"retention": 1, "full": 0}


async def test_a_silence_costs_two_writes_however_long_it_is(retention: RetentionStage) -> None:
    await retention.pass_time(1, "a")
    writes = retention.store.writes
    await retention.pass_time(RETENTION_S + 5, "a")
    assert retention.store.writes == writes + 2  # recorded, removed


async def test_a_new_member_joins_a_full_group_in_the_place_of_a_dead_one(
    retention: RetentionStage,
) -> None:
    await retention.coordinator.add_session(KEY, AddSession(SessionConfig("c")))
    await retention.pass_time(LEASE_S + 1, "a", "c")
    _, created = await retention.coordinator.add_session(KEY, AddSession(SessionConfig("d")))
    assert created
    assert await retention.kept() == {"a", "c", "d"}
    assert await retention.removed() == {"retention": 0, "full": 1}


async def test_the_api_has_the_silence_of_a_session_and_deletes_inactive_ones_only(
    retention: RetentionStage,
) -> None:
    await retention.pass_time(LEASE_S + 1, "a")
    transport = httpx2.ASGITransport(app=Api(retention.coordinator, retention.clock))
    base = "http://coordinator/api/v1/clientfailover/groups/g/clientsessions"
    async with httpx2.AsyncClient(transport=transport, base_url=base) as http:
        a, b = (await http.get("")).json()
        assert (a["Active"], "SilentSince" in a) == (True, False)
        assert b["Active"] is False
        assert b["SilentSince"] == b["Heartbeat"]["HeartbeatTime"]
        refused = await http.delete("/a", params={"inactive": "true"})
        assert refused.status_code == 409
        assert 'Client session "a" is active' in refused.json()["Reason"]
        assert (await http.delete("/b", params={"inactive": "yes"})).status_code == 400
        assert (await http.delete("/b", params={"inactive": "true"})).status_code == 204
        assert (await http.delete("/b", params={"inactive": "true"})).status_code == 404
        assert (await http.delete("/a", params={"inactive": "false"})).status_code == 204


@pytest.mark.long
def test_a_served_coordinator_removes_the_dead_by_its_settings(
    serve: Callable[..., Process], tmp_path: Path
) -> None:
    """Also after a restart; and it is durable."""
    served = serve("--dead-session-retention", "00:00:01")
    body = {"Id": "g", "FailoverTimeout": "00:00:00.2"}
    with httpx2.Client(base_url=f"{served.url}/api/v1/clientfailover/") as http:
        assert http.post("groups", json=body).status_code == 201
        assert http.post("groups/g/clientsessions", json={"Id": "a"}).status_code == 201
    served.process.terminate()
    assert served.end()[0] == 0
    served = serve("--dead-session-retention", "00:00:01")
    until = time.monotonic() + 30
    with httpx2.Client(base_url=f"{served.url}/api/v1/clientfailover/") as http:
        while http.get("groups/g/clientsessions").json():
            assert time.monotonic() < until
            time.sleep(0.05)
    served.process.kill()
    log = served.end()[1]
    assert "dead session removed group=g session=a silent_s=2 cause=retention" in log
    store = SqliteStore.open(tmp_path / "data")
    (stored,) = asyncio.run(store.load()).values()
    asyncio.run(store.close())
    assert stored.record.sessions == {}
