"""A scrape of 10,000 groups holds up no heartbeat: the real server, scraped from another process.

How long the loop is held is told by its CPU time from one turn to the next, to which a busy machine adds
little. What heartbeats wait for on a quiet one is in docs/benchmarks.md.
"""

import asyncio
import gc
import itertools
import ssl
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import pytest

from agent.coordinator import api as api_module
from agent.coordinator import metrics as metrics_module
from agent.coordinator.api import Api
from agent.coordinator.limits import Admission, Reports
from agent.coordinator.metrics import Metrics
from agent.coordinator.server import GC_THRESHOLDS, bound_socket, web_server
from agent.coordinator.service import Coordinator
from agent.coordinator.store.memory import MemoryStore
from agent.core.group_state import Policy, ReceiveHeartbeat
from agent.core.timing import minimum_interval_s
from agent.model import (
    TICKS_PER_SECOND,
    GroupConfig,
    GroupKey,
    GroupRecord,
    SessionConfig,
    SessionRecord,
    Tenure,
)
from agent.ops.clock import Clock
from agent.schema.addresses import Address
from tests.mosquitto import Authority

pytestmark = pytest.mark.long

MANY = 10_000
LEASE_S = 600
MOST_HELD_S = 0.02
SCRAPES = 5
FEWEST_BEATS = 10
"""Answered in the course of a scrape, which has more than a hundred turns; at once, it has three."""

SCRAPER = """
import ssl, sys, urllib.request
url, file, authority = sys.argv[1:]
trust = ssl.create_default_context(cafile=authority)
accept = {"Accept": "application/openmetrics-text;version=1.0.0"}
print("ready", flush=True)
for _ in sys.stdin:
    with urllib.request.urlopen(urllib.request.Request(url, headers=accept), context=trust) as answer:
        page = answer.read()
    open(file, "wb").write(page)
    print("done", flush=True)
"""


@pytest.fixture(autouse=True)
def collects_as_the_program() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*GC_THRESHOLDS)
    yield
    gc.set_threshold(*before)


async def many_groups(metrics: Metrics, clock: Clock) -> Coordinator:
    """All of them with two sessions that have sent a heartbeat, and a primary that tells its progress."""
    store = MemoryStore()
    sessions = {name: SessionRecord(SessionConfig(name)) for name in ("a", "b")}
    tenure = Tenure("a", 1, clock.wall(), "chosen")
    for number in range(MANY):
        config = GroupConfig(f"g{number}", LEASE_S * TICKS_PER_SECOND)
        record = GroupRecord(config, sessions=sessions, holder=tenure, epoch=1)
        await store.create(GroupKey("default", "default", config.id), record)
    coordinator = Coordinator(store, clock.now, Policy(), meter=metrics)
    await coordinator.start()
    for group in coordinator.all_groups():
        await coordinator.beat(group.key, ReceiveHeartbeat("a", 97.5, clock.wall()))
        await coordinator.beat(group.key, ReceiveHeartbeat("b", 96.5))
    await asyncio.sleep(minimum_interval_s(LEASE_S))  # sooner, the next would be refused
    return coordinator


@dataclass
class Loop:
    """What this event loop did since ``begin``."""

    held_s: float = 0.0
    beats: int = 0

    def begin(self) -> None:
        self.held_s, self.beats = 0.0, 0

    async def turn(self) -> None:
        """Note the longest turn, in CPU time of this thread."""
        while True:
            began_s = time.thread_time()
            await asyncio.sleep(0)
            self.held_s = max(self.held_s, time.thread_time() - began_s)

    async def beat(self, port: int, trust: ssl.SSLContext | None) -> None:
        """Heartbeats of all groups over one connection, each after the answer to the one before."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust)
        try:
            for number in itertools.count():
                await self._beat_once(number % MANY, reader, writer)
                self.beats += 1
        finally:
            writer.close()

    async def _beat_once(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        body = b'{"FailoverScore":97.5}'
        path = f"/api/v1/clientfailover/groups/g{number}/clientsessions/a/heartbeat"
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert answer.startswith(b"http/1.1 200"), answer
        await reader.readexactly(int(answer.split(b"content-length: ")[1].split()[0]))


@dataclass
class Scraped:
    """A coordinator that serves in this loop, and the process that scrapes it."""

    scraper: asyncio.subprocess.Process
    page: Path
    loop: Loop

    async def scrape(self) -> float:
        """For how long the loop was held at most in the course of a scrape."""
        assert self.scraper.stdin is not None
        assert self.scraper.stdout is not None
        self.loop.begin()
        self.scraper.stdin.write(b"\n")
        assert await self.scraper.stdout.readline() == b"done\n"
        return self.loop.held_s

    async def scrapes(self) -> tuple[float, float]:
        """The medians of several scrapes: the longest turn, and the heartbeats answered meanwhile."""
        seen = [(await self.scrape(), self.loop.beats) for _ in range(SCRAPES)]
        held_s, beats = zip(*seen, strict=True)
        return median(held_s), median(beats)


@asynccontextmanager
async def scraped(folder: Path, *, sessions: bool, tls: bool) -> AsyncIterator[Scraped]:
    """A coordinator with many groups, in the middle of heartbeats."""
    authority = Authority(folder)
    served = trust = None
    if tls:
        served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        served.load_cert_chain(*authority.issue("coordinator"))
        trust = ssl.create_default_context(cafile=authority.file)
    metrics, clock, loop = Metrics(sessions=sessions, cache_s=0), Clock(), Loop()
    coordinator = await many_groups(metrics, clock)
    api = Api(coordinator, clock.now, metrics=metrics)
    page = folder / "page"
    serve = partial(
        web_server,
        admission=Admission(100, 100),
        reports=Reports(metrics, time.monotonic),
        max_body_bytes=65536,
    )
    with bound_socket(Address("127.0.0.1", 0), "--listen") as listener:
        async with serve(api, listener, served) as url:
            scraper = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", SCRAPER, f"{url}/metrics", page, authority.file),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert scraper.stdout is not None
            assert await scraper.stdout.readline() == b"ready\n"
            port = listener.getsockname()[1]
            tasks = [asyncio.create_task(loop.turn()), asyncio.create_task(loop.beat(port, trust))]
            try:
                yield Scraped(scraper, page, loop)
            finally:
                ended = [task.exception() for task in tasks if task.done()]
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                scraper.kill()
                await scraper.wait()
                assert ended == []
    await coordinator.stop()


async def test_a_scrape_of_10000_groups_holds_up_no_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the number of series does not depend on that of the groups."""
    async with scraped(tmp_path, sessions=False, tls=False) as it:
        held_s, beats = await it.scrapes()
        assert held_s < MOST_HELD_S
        assert beats >= FEWEST_BEATS
        page = it.page.read_bytes()
        assert f'failover_coordinator_groups{{state="primary"}} {MANY}.0'.encode() in page
        assert page.count(b"\n") < 500
        monkeypatch.setattr(metrics_module, "GROUPS_AT_ONCE", MANY + 1)
        at_once_s, _ = await it.scrapes()
        assert at_once_s > 2 * held_s, "what this is to find is found"


async def test_a_scrape_with_series_of_20000_sessions_over_tls_holds_up_no_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page has 12 MB: neither its making nor its sending may take long at a time."""
    async with scraped(tmp_path, sessions=True, tls=True) as it:
        held_s, beats = await it.scrapes()
        assert held_s < MOST_HELD_S
        assert beats >= FEWEST_BEATS
        page = it.page.read_bytes()
        assert page.endswith(b"# EOF\n")
        assert page.count(b"\n") < 500 + 5 * 2 * MANY
        assert page.count(b"failover_coordinator_session_score{") == 2 * MANY
        monkeypatch.setattr(api_module, "PART_BYTES", len(page))
        at_once_s, _ = await it.scrapes()
        assert at_once_s > 2 * held_s, "what this is to find is found"
