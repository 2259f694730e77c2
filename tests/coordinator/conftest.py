"""What the tests of the coordinator share: a clock that is set, a store that fails on demand, servers."""

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agent.coordinator.api import Api
from agent.coordinator.service import Coordinator
from agent.coordinator.store import Stored
from agent.coordinator.store.memory import MemoryStore
from agent.core.group_state import Policy
from agent.errors import StoreError
from agent.model import Instant

EPOCH = datetime(2026, 1, 31, 12, tzinfo=UTC)


class FakeClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.elapsed = 1000.0

    def __call__(self) -> Instant:
        return Instant(self.elapsed, EPOCH + timedelta(seconds=self.elapsed))


class TestStore(MemoryStore):
    """A memory store whose writes can be held up, can fail, or can succeed and seem to fail."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__()
        self.failing: Exception | None = None
        self.failing_after: BaseException | None = None
        self.failing_settle: Exception | None = None
        self.free = asyncio.Event()
        self.free.set()
        self.writes = 0

    async def _write(self, write: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        self.writes += 1
        await self.free.wait()
        if self.failing is not None:
            raise self.failing
        result = await write(*args)
        if self.failing_after is not None:
            raise self.failing_after
        return result

    async def create(self, *args: Any) -> int:
        return await self._write(super().create, *args)  # type: ignore[no-any-return]

    async def swap(self, *args: Any) -> int:
        return await self._write(super().swap, *args)  # type: ignore[no-any-return]

    async def delete(self, *args: Any) -> None:
        await self._write(super().delete, *args)

    async def save_progress(self, *args: Any) -> None:
        await self._write(super().save_progress, *args)

    async def settle(self, *args: Any) -> Stored | None:
        await self.free.wait()
        if self.failing_settle is not None:
            raise self.failing_settle
        return await super().settle(*args)


class Stage:
    """A coordinator whose time passes only in ``run_for``."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = TestStore()
        self.policy = Policy(score_hysteresis=0, minimum_hold_s=0)
        self.coordinator = self.build()

    def build(self) -> Coordinator:
        return Coordinator(self.store, self.clock, self.policy, max_groups=5)

    async def restart(self) -> Coordinator:
        await self.coordinator.stop()
        self.coordinator = self.build()
        await self.coordinator.start()
        return self.coordinator

    async def run_for(self, seconds: float) -> None:
        """Let time pass in steps that are no stall, with all that is due done at each."""
        end = self.clock.elapsed + seconds
        while self.clock.elapsed < end:
            self.clock.elapsed = min(end, self.clock.elapsed + 0.05)
            self.coordinator.run_due_changes()
            await self.settle()

    async def settle(self) -> None:
        """Until nothing is being made durable any more (or the store is held up)."""
        for _ in range(50):
            await asyncio.sleep(0)

    def disk_full(self) -> None:
        self.store.failing = StoreError("the disk is full")


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    await stage.coordinator.start()
    yield stage
    stage.store.free.set()
    await stage.coordinator.stop()


@pytest.fixture
async def http(stage: Stage) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the application around ``stage``, on the on-premises base path."""
    app = Api(stage.coordinator, stage.clock, max_body_bytes=2000)
    transport = httpx2.ASGITransport(app=app)
    base = "http://coordinator/api/v1/clientfailover/"
    async with httpx2.AsyncClient(transport=transport, base_url=base) as client:
        yield client


class Process:
    """``failover-agent serve`` as a process, on a free port."""

    def __init__(self, *arguments: str, program: Sequence[str] = ("-m", "agent")) -> None:
        command = [sys.executable, *program, "serve", "--listen", "127.0.0.1:0", *arguments]
        environ = {k: v for k, v in os.environ.items() if not k.startswith("FAILOVER_")}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
        self.lines: list[str] = []
        self.url = ""
        listening = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(listening,))
        self._reader.start()
        listening.wait(60)
        if not self.url:
            self.process.kill()
            pytest.fail(f"serve did not start: {self.end()}")

    def _read(self, listening: threading.Event) -> None:
        """All of it, always: who does not read a log stops the process that writes it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if match := re.search(r"coordinator listening url=(\S+)", line):
                self.url = match[1]
                listening.set()
        listening.set()

    def end(self) -> tuple[int, str]:
        """Wait for the end; the exit code and the log."""
        code = self.process.wait(30)
        self._reader.join(30)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code, "".join(self.lines)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start coordinators on ``tmp_path / "data"``; what still runs at the end is killed."""
    started: list[Process] = []

    def start(*arguments: str, program: Sequence[str] = ("-m", "agent")) -> Process:
        data_dir = str(tmp_path / "data")
        started.append(Process("--data-dir", data_dir, *arguments, program=program))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.end()
