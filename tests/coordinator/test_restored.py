"""A store that was put back from a copy: nobody is promoted before an operator has lifted that (R34)."""

import asyncio
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agent.cli.main import main
from agent.coordinator.restored import AT_ONCE, declare_restored
from agent.coordinator.service import Coordinator
from agent.coordinator.store.memory import MemoryStore
from agent.core.group_state import AddSession, Lift, Policy, ReceiveHeartbeat
from agent.errors import ExitCode, StoreError
from agent.model import FailsafeState, GroupConfig, GroupKey, Role, SessionConfig

from .conftest import FakeClock, Process, Stage

pytestmark = pytest.mark.long

Serve = Callable[..., Process]

KEY = GroupKey("default", "default", "g")
LEASE_S = 2.0
CONFIG = GroupConfig("g", int(LEASE_S * 10_000_000))


async def beat(coordinator: Coordinator, **more: Any) -> Role:
    heartbeat = ReceiveHeartbeat("a", 100.0, instance="a1", failsafe_url="http://a:9", **more)
    return (await coordinator.beat(KEY, heartbeat)).role


async def test_nobody_is_promoted_in_a_restored_store_before_a_lift(stage: Stage) -> None:
    first = stage.coordinator
    await first.create_group(KEY, CONFIG)
    await first.apply(KEY, AddSession(SessionConfig("a")))
    for _ in range(2):
        role = await beat(first)
    assert role is Role.PRIMARY
    await first.stop()
    assert await declare_restored(stage.store, stage.clock, stage.policy) == 1
    stage.coordinator = second = stage.build()
    await second.start()
    status = second.status(KEY)
    epoch = int(stage.clock().wall.timestamp())
    assert (status.primary, status.epoch, status.cleared) == (None, epoch, 0)
    assert status.failsafe is not None
    assert (status.failsafe.state, status.failsafe.choosable) == (FailsafeState.RESTRICTED, ())
    for _ in range(4):
        await stage.run_for(LEASE_S / 2)
        assert await beat(second, seen_epoch=1, holds=1) is Role.SECONDARY
    _, history = await second.history(KEY, 0, 10)
    assert [(entry.epoch, entry.session_id) for entry in history] == [(epoch, ""), (1, "a")]
    await second.apply(KEY, Lift(epoch, "all hosts were looked at"))
    await stage.run_for(0.2)
    assert await beat(second, seen_epoch=epoch) is Role.PRIMARY


async def test_a_group_that_the_copy_does_not_have_is_restricted_too(stage: Stage) -> None:
    """It was made after the copy, and its primary may be active. No later start forgets that."""
    await stage.coordinator.stop()
    await declare_restored(stage.store, stage.clock, stage.policy)
    await stage.restart()
    second = await stage.restart()
    await second.create_group(KEY, CONFIG)
    epoch = int(stage.clock().wall.timestamp())
    await second.apply(KEY, AddSession(SessionConfig("a")))
    await stage.run_for(LEASE_S + 0.1)
    assert await beat(second) is Role.SECONDARY
    status = second.status(KEY)
    assert (status.epoch, status.cleared) == (epoch, 0)
    await second.apply(KEY, Lift(epoch, "looked"))
    await stage.run_for(0.2)
    assert await beat(second) is Role.PRIMARY


async def test_every_group_of_a_large_store_is_declared() -> None:
    store, clock = MemoryStore(), FakeClock()
    coordinator = Coordinator(store, clock, max_groups=1000)
    await coordinator.start()
    number = 2 * AT_ONCE + 1
    names = [str(n) for n in range(number)]
    await asyncio.gather(
        *(coordinator.create_group(KEY._replace(group=name), CONFIG) for name in names)
    )
    await coordinator.stop()
    assert await declare_restored(store, clock, Policy()) == number
    records = [stored.record for stored in (await store.load()).values()]
    assert {record.epoch for record in records} == {int(clock().wall.timestamp())}


async def test_a_store_that_cannot_be_declared_is_not_served(stage: Stage) -> None:
    await stage.coordinator.create_group(KEY, CONFIG)
    stage.disk_full()
    with pytest.raises(StoreError, match="the disk is full"):
        await declare_restored(stage.store, stage.clock, stage.policy)
    assert await stage.store.is_restored(), "in case that the next start does not declare it"


def trust(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of ``failover-agent store trust``."""
    return main(["store", "trust", *map(str, arguments)]), *capsys.readouterr()


def test_a_store_that_is_not_there_cannot_be_trusted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = trust(capsys, tmp_path / "absent")
    assert code != 0
    assert "has no coordinator.db" in err
    assert not (tmp_path / "absent").exists()


async def test_serve_declares_a_restored_data_directory_until_it_is_trusted(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "/api/v1/clientfailover/groups"
    body = {"Id": "g", "FailoverTimeout": "00:00:01"}
    beat = {"FailoverScore": 100, "Instance": "a1", "FailsafeUrl": "http://a:9"}

    async def state_of(http: httpx2.AsyncClient, group: str) -> str:
        """State of a new group with one session."""
        await http.post(path, json={**body, "Id": group})
        await http.post(f"{path}/{group}/clientsessions", json={"Id": "a"})
        await http.post(f"{path}/{group}/clientsessions/a/heartbeat", json=beat)
        return str((await http.get(f"{path}/{group}/status")).json()["Failsafe"]["State"])

    def end(one: Process) -> None:
        one.process.send_signal(signal.SIGTERM)
        assert one.end()[0] == 0

    one = serve()
    async with httpx2.AsyncClient(base_url=one.url) as http:
        await http.post(path, json=body)
    end(one)
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    one = serve()
    async with httpx2.AsyncClient(base_url=one.url) as http:
        await http.post(f"{path}/g/clientsessions", json={"Id": "a"})
        for _ in range(2):
            answer = await http.post(f"{path}/g/clientsessions/a/heartbeat", json=beat)
        assert answer.json()["Role"] == 1
    end(one)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "copy").rename(tmp_path / "data")
    one = serve("--restored")
    assert any("restored store declared" in line for line in one.lines)
    end(one)
    one = serve()
    async with httpx2.AsyncClient(base_url=one.url) as http:
        status = (await http.get(f"{path}/g/status")).json()
        assert (status["Epoch"] > 2**30, status["Failsafe"]["State"]) == (True, "Restricted")
        await http.post(f"{path}/g/clientsessions", json={"Id": "b"})
        answer = await http.post(f"{path}/g/clientsessions/b/heartbeat", json=beat)
        assert answer.json()["Role"] == 0
        assert await state_of(http, "made-later") == "Restricted"
    code, _, err = trust(capsys, tmp_path / "data")
    assert (code, "in use by another coordinator" in err) == (ExitCode.DATA_DIR_LOCKED, True)
    end(one)
    for told in (
        "new groups in {} are not restricted any more",
        "{} was not declared as restored",
    ):
        code, out, _ = trust(capsys, tmp_path / "data")
        assert (code, told.format(tmp_path / "data") in out) == (0, True)
    one = serve()
    async with httpx2.AsyncClient(base_url=one.url) as http:
        assert await state_of(http, "made-at-last") == "Off"
        assert (await http.get(f"{path}/g/status")).json()["Failsafe"]["State"] == "Restricted"
