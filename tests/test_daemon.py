"""The daemon in this process, with a real coordinator on loopback."""

import asyncio
import errno
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agent.coordinator.server import serving
from agent.core.effects import Effect
from agent.core.events import Event, Tick
from agent.core.session import Session
from agent.daemon import main, reload
from agent.daemon.loop import Daemon
from agent.daemon.role_runner import RoleRunner
from agent.drivers.rest import RestClient
from agent.drivers.statefile import StateFile
from agent.errors import ConfigError, ExitCode, ServerError, TimingError
from agent.model import TICKS_PER_SECOND, GroupConfig, SessionConfig
from agent.ops.clock import Clock
from agent.schema.addresses import Address
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.read import validate
from agent.schema.settings import AgentSettings

PATIENCE_S = 20.0
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)

Answering = Callable[[httpx2.Request], Awaitable[httpx2.Response]]


@pytest.fixture
async def endpoint() -> AsyncIterator[str]:
    """A coordinator in this event loop."""
    settings = CoordinatorSettings(store="memory", listen=Address("127.0.0.1", 0))
    async with serving(settings) as url:
        yield f"{url}/api/v1/clientfailover"


@dataclass
class Host:
    """One agent in this event loop."""

    daemon: Daemon
    state_file: Path
    written: list[Mapping[str, Any]]
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        end_at = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end_at, f"waited in vain for {what}"
            await asyncio.sleep(0.01)

    async def until_written(self, old: int) -> Mapping[str, Any]:
        """The first written state after this many that is not Primary."""

        def others() -> list[Mapping[str, Any]]:
            return [state for state in self.written[old:] if state["role"] != "Primary"]

        await self.until(lambda: bool(others()), "the state file")
        return others()[0]

    async def until_written_primary(self) -> int:
        """How many states had been written when the newest was Primary."""
        await self.until(
            lambda: bool(self.written) and self.written[-1]["role"] == "Primary", "the state file"
        )
        return len(self.written)

    async def until_role(self, role: str) -> None:
        await self.until(lambda: self.daemon.describe()["role"] == role, role)


def settings_for(endpoint: str, **more: Any) -> AgentSettings:
    """Settings with a margin that a busy machine does not exceed."""
    quick = {"failover_timeout": 3.0, "demote": 0.5, "margin": 1.0, "guard": False}
    return validate(AgentSettings, {"endpoint": [endpoint], "group": "g", **quick, **more})


class Recorded(StateFile):
    """A state file that records each write, and whose disk can be full."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.written: list[Mapping[str, Any]] = []
        self.full = False
        self.fault: Exception | None = None
        self.asked: list[str] = []
        self.asked_before_first: list[str] | None = None

    def write(self, state: Mapping[str, Any]) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.fault is not None:
            raise self.fault
        if self.asked_before_first is None:
            self.asked_before_first = list(self.asked)
        super().write(state)
        self.written.append(json.loads(self.path.read_text()))


@asynccontextmanager
async def a_daemon(
    settings: AgentSettings,
    directory: Path,
    *,
    clock: Clock | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> AsyncIterator[tuple[Host, Recorded]]:
    state_file = Recorded(directory / "state.json")
    state_file.acquire()

    async def make_client() -> RestClient:
        return RestClient(settings.endpoint, transport=transport)

    daemon = Daemon(settings, "host-a", make_client, state_file, clock=clock)
    try:
        yield Host(daemon, state_file.path, state_file.written), state_file
    finally:
        daemon.close()
        state_file.close()


@asynccontextmanager
async def living(host: Host) -> AsyncIterator[asyncio.Task[int]]:
    """A running daemon; stopped at the end."""
    task = asyncio.create_task(host.daemon.run(host.stop))
    try:
        yield task
    finally:
        host.stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(task, return_exceptions=True)


class Faulty(httpx2.AsyncHTTPTransport):
    """A transport with injected answers: the first of ``instead`` that matches is used once."""

    def __init__(self) -> None:
        super().__init__(trust_env=False)
        self.instead: list[tuple[str, Answering]] = []
        self.asked: list[str] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        asked = f"{request.method} {request.url.path.rstrip('/').rpartition('/')[2]}"
        self.asked.append(asked)
        for fault in self.instead:
            if fault[0] == asked:
                self.instead.remove(fault)
                return await fault[1](request)
        return await super().handle_async_request(request)


def saying(status: int, reason: str = "No.") -> Answering:
    async def answer(_request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, json={"Reason": reason})

    return answer


async def unplugged(_request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("unplugged")


# -- publishing --------------------------------------------------------------------------------------


async def test_secondary_is_published_before_the_first_request(
    endpoint: str, tmp_path: Path
) -> None:
    transport = Faulty()
    async with a_daemon(settings_for(endpoint), tmp_path, transport=transport) as (
        host,
        state_file,
    ):
        state_file.asked = transport.asked
        async with living(host):
            await host.until(
                lambda: any(state["role"] == "Primary" for state in host.written), "Primary"
            )
        assert state_file.asked_before_first == []
        assert (host.written[0]["role"], host.written[0]["reason"]) == ("Secondary", "starting")
        assert host.written[0]["active_until_boottime_s"] is None
        assert (host.written[-1]["role"], host.written[-1]["reason"]) == ("Secondary", "stopped")


async def test_an_agent_that_cannot_publish_secondary_does_not_join(
    endpoint: str, tmp_path: Path
) -> None:
    async with a_daemon(settings_for(endpoint), tmp_path) as (host, state_file):
        state_file.full = True
        with pytest.raises(ConfigError, match=r"No space left on device.*--state-file") as caught:
            await host.daemon.run(host.stop)
        assert caught.value.exit_code is ExitCode.STATE_FILE


async def test_a_full_disk_after_the_start_is_logged_and_keeps_the_role(
    endpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_daemon(settings_for(endpoint), tmp_path) as (host, state_file), living(host):
        await host.until_role("Primary")
        state_file.full = True
        await host.until(lambda: "state file cannot be written" in caplog.text, "the log line")
        old = len(host.written)
        assert host.daemon.describe()["role"] == "Primary"
        state_file.full = False
        await host.until(lambda: len(host.written) > old, "the file to be written again")
        assert host.written[-1]["role"] == "Primary"


async def test_a_role_is_not_released_while_the_state_file_says_primary(
    endpoint: str, tmp_path: Path
) -> None:
    """A write that failed by an exception of no known kind counted as done. Without a hook, only it demotes."""
    transport = Faulty()
    async with a_daemon(settings_for(endpoint), tmp_path, transport=transport) as (
        host,
        state_file,
    ):
        async with living(host) as task:
            await host.until_written_primary()
            state_file.fault = MemoryError()
            host.stop.set()
            assert await task == ExitCode.TASK_FAILED
        assert host.written[-1]["role"] == "Primary"
    assert "POST heartbeat" in transport.asked
    assert "POST release" not in transport.asked


async def test_the_lease_in_the_state_file_moves_with_each_renewal(
    endpoint: str, tmp_path: Path
) -> None:
    async with a_daemon(settings_for(endpoint), tmp_path) as (host, _), living(host):
        await host.until_role("Primary")
        first = host.daemon.describe()["active_until_boottime_s"]
        await host.until(
            lambda: (host.written[-1]["active_until_boottime_s"] or 0) > first, "a renewal"
        )
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        assert host.written[-1]["active_until_boottime_s"] < now + 3.0


async def test_progress_never_goes_back_within_a_tenure_and_may_in_the_next(
    endpoint: str, tmp_path: Path
) -> None:
    elsewhere = {"time": 0.0}
    clock = Clock(boottime=lambda: time.clock_gettime(time.CLOCK_BOOTTIME) + elsewhere["time"])
    async with a_daemon(settings_for(endpoint), tmp_path, clock=clock) as (host, _), living(host):
        await host.until_role("Primary")
        epoch = host.daemon.describe()["epoch"]
        assert host.daemon.report_progress(NOON) == NOON
        assert host.daemon.report_progress(NOON - timedelta(hours=1)) == NOON
        elsewhere["time"] += 1.0  # suspended: the tenure ends, and a new one may begin
        await host.until(lambda: (host.daemon.describe()["epoch"] or 0) > epoch, "a new tenure")
        earlier = NOON - timedelta(hours=1)
        assert host.daemon.report_progress(earlier) == earlier


# -- time ---------------------------------------------------------------------------------------------


async def test_a_suspended_host_demotes_before_its_next_heartbeat(
    endpoint: str, tmp_path: Path
) -> None:
    """R2: the gap between boot time and monotonic time."""
    asleep = {"time": 0.0}
    clock = Clock(boottime=lambda: time.clock_gettime(time.CLOCK_BOOTTIME) + asleep["time"])
    async with a_daemon(settings_for(endpoint), tmp_path, clock=clock) as (host, _), living(host):
        old = await host.until_written_primary()
        asleep["time"] += 0.5
        new = await host.until_written(old)
        assert new["role"] == "Secondary"
        assert "process stalled for" in new["reason"]


async def test_a_blocked_loop_counts_as_a_lost_lease(endpoint: str, tmp_path: Path) -> None:
    """R2: late by more than the margin, and well within R."""
    settings = settings_for(endpoint, failover_timeout=10.0, margin=0.4)
    async with a_daemon(settings, tmp_path) as (host, _), living(host):
        old = await host.until_written_primary()
        time.sleep(0.8)  # noqa: ASYNC251 - that is the fault
        new = await host.until_written(old)
        assert new["role"] == "Secondary"
        assert "process stalled for" in new["reason"]


# -- servers ------------------------------------------------------------------------------------------


async def test_the_session_is_stepped_only_when_a_tick_is_due(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop iterates more often (R2). A step that changes nothing would only cost CPU at rest."""
    early: list[float] = []
    ticks = 0
    step = Session.step

    def watched(session: Session, event: Event, now: float) -> tuple[Effect, ...]:
        nonlocal ticks
        if isinstance(event, Tick):
            ticks += 1
            early.extend([session.wake_at - now] if now < session.wake_at else [])
        return step(session, event, now)

    settings = settings_for(endpoint, margin=0.1, beat=0.5)
    async with a_daemon(settings, tmp_path) as (host, _), living(host):
        await host.until_role("Primary")
        monkeypatch.setattr(Session, "step", watched)
        await host.until(lambda: ticks >= 3, "heartbeats that are due")
    assert early == []


async def test_lost_contact_and_its_return_are_one_log_line_each(
    endpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    transport = Faulty()
    async with a_daemon(settings_for(endpoint), tmp_path, transport=transport) as (host, _):
        async with living(host):
            await host.until_role("Primary")
            transport.instead = [("POST heartbeat", unplugged)] * 3
            await host.until(lambda: "answered again" in caplog.text, "contact")
        messages = [record.getMessage() for record in caplog.records]
        assert messages.count("heartbeat failed") == 1
        assert messages.count("heartbeat answered again") == 1


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("asked", ["POST groups", "POST clientsessions"])
async def test_joining_is_retried_while_the_server_is_not_ready(
    endpoint: str, tmp_path: Path, asked: str, status: int
) -> None:
    transport = Faulty()
    transport.instead = [(asked, saying(status))] * 2
    async with (
        a_daemon(settings_for(endpoint), tmp_path, transport=transport) as (host, _),
        living(host) as task,
    ):
        await host.until(
            lambda: task.done() or host.daemon.describe()["role"] == "Primary", "Primary"
        )
        host.stop.set()
        assert await task == ExitCode.OK


async def test_a_refusal_at_the_start_ends_the_agent_at_once(endpoint: str, tmp_path: Path) -> None:
    transport = Faulty()
    transport.instead = [("POST clientsessions", saying(409, "It is configured otherwise."))]
    async with a_daemon(settings_for(endpoint), tmp_path, transport=transport) as (host, _):
        async with living(host) as task:
            with pytest.raises(ServerError, match="configured otherwise") as caught:
                await task
        assert caught.value.status == 409
        assert transport.asked == ["POST groups", "POST clientsessions"]


async def test_a_stop_before_any_server_answered_ends_in_order(tmp_path: Path) -> None:
    """With startup_timeout 0 it would retry for ever."""
    settings = settings_for("http://127.0.0.1:9/clientfailover", startup_timeout=0.0)
    transport = Faulty()
    transport.instead += [("POST groups", unplugged)] * 1000
    transport.instead += [("DELETE host-a", unplugged)]
    async with a_daemon(settings, tmp_path, transport=transport) as (host, _), living(host) as task:
        await host.until(lambda: len(transport.asked) > 1, "a second attempt")
        host.stop.set()
        async with asyncio.timeout(PATIENCE_S):
            assert await task == ExitCode.OK


async def test_an_error_about_a_group_timeout_that_does_not_fit_names_the_group(
    endpoint: str, tmp_path: Path
) -> None:
    client = RestClient([endpoint])
    await client.create_group(GroupConfig("g", TICKS_PER_SECOND), timeout_s=PATIENCE_S)
    await client.aclose()
    async with a_daemon(settings_for(endpoint), tmp_path) as (host, _), living(host) as task:
        with pytest.raises(TimingError, match=r"group g has failover timeout 1 s at .*R1"):
            await task


async def test_joining_again_is_retried_after_a_refusal(endpoint: str, tmp_path: Path) -> None:
    """A coordinator in trouble must not end its running agents."""
    transport = Faulty()
    async with a_daemon(settings_for(endpoint), tmp_path, transport=transport) as (host, _):
        async with living(host) as task:
            await host.until_role("Primary")
            joined = transport.asked.count("POST clientsessions")
            transport.instead = [
                ("POST heartbeat", saying(404)),
                ("POST clientsessions", saying(409)),
            ]
            await host.until(
                lambda: transport.asked.count("POST clientsessions") >= joined + 2, "another try"
            )
            await host.until_role("Primary")
            host.stop.set()
            assert await task == ExitCode.OK
        assert transport.asked.index("POST release") < transport.asked.index("DELETE host-a")


async def test_a_session_that_somebody_else_has_made_anew_takes_its_member_back(
    endpoint: str, tmp_path: Path
) -> None:
    """Made without a name, or with another, it refused its own agent until it was deleted again."""
    transport = Faulty()
    client = RestClient([endpoint])
    async with (
        a_daemon(settings_for(endpoint), tmp_path, transport=transport) as (host, _),
        living(host) as task,
    ):
        await host.until_role("Primary")
        await client.leave("g", "host-a", timeout_s=PATIENCE_S)
        await client.join("g", SessionConfig("host-a", "Host A"), timeout_s=PATIENCE_S)
        transport.instead = [("POST heartbeat", saying(404))]
        await host.until(lambda: not transport.instead, "the agent to know that it is gone")
        del transport.asked[:]
        await host.until(lambda: "POST heartbeat" in transport.asked, "its next heartbeat")
        assert host.daemon.describe()["role"] == "Primary"
        host.stop.set()
        assert await task == ExitCode.OK
    await client.aclose()


async def test_a_group_made_anew_with_a_timeout_that_does_not_fit_ends_no_running_agent(
    endpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended with exit code 13, after which systemd does not start it again."""

    async def too_short(_request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json={"Id": "g", "FailoverTimeout": "00:00:00.2000000"})

    transport = Faulty()
    async with (
        a_daemon(settings_for(endpoint), tmp_path, transport=transport) as (host, _),
        living(host) as task,
    ):
        await host.until_role("Primary")
        transport.instead = [
            ("POST heartbeat", saying(404)),
            ("POST groups", saying(409)),
            ("GET g", too_short),
            ("POST groups", saying(409)),
            ("GET g", too_short),
        ]
        await host.until(lambda: task.done() or not transport.instead, "other tries")
        del transport.asked[:]
        await host.until(lambda: task.done() or "POST heartbeat" in transport.asked, "a heartbeat")
        await host.until_role("Primary")
        host.stop.set()
        assert await task == ExitCode.OK
    reasons = [str(record.__dict__["fields"].get("reason")) for record in caplog.records]
    assert any("group g has failover timeout 0.2 s at" in reason for reason in reasons)


# -- names --------------------------------------------------------------------------------------------


def test_agents_of_one_host_choose_distinct_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.setattr("agent.daemon.main.socket.gethostname", lambda: "edge 1/a")
    claimed = [main.lock_state_file(settings_for("http://a/clientfailover")) for _ in range(3)]
    assert [name for _, name in claimed] == ["edge 1/a", "edge 1/a-2", "edge 1/a-3"]
    assert len({state_file.path for state_file, _ in claimed}) == 3
    assert {state_file.path.parent for state_file, _ in claimed} == {tmp_path}
    claimed[1][0].close()
    again, name = main.lock_state_file(settings_for("http://a/clientfailover"))
    assert name == "edge 1/a-2"
    for state_file, _ in (*claimed, (again, name)):
        state_file.close()


@pytest.mark.parametrize(
    ("one", "other"), [("g" * 150 + "1", "g" * 150 + "2"), ("ü" * 256, "ü" * 255), ("a.b", "a%2Eb")]
)
def test_each_group_has_a_state_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: str, other: str
) -> None:
    """Long ids were cut, so two groups shared a file; of 256 letters beyond ASCII none could be made."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    both = [
        main.lock_state_file(
            settings_for("http://a/clientfailover", group=group, session_id="s" * 256)
        )[0]
        for group in (one, other)
    ]
    assert both[0].path != both[1].path
    for state_file in both:
        state_file.close()


def test_a_configured_session_id_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    settings = settings_for("http://a/clientfailover", session_id="host-a")
    state_file, name = main.lock_state_file(settings)
    assert name == "host-a"
    with pytest.raises(ConfigError) as caught:
        main.lock_state_file(settings)
    assert caught.value.exit_code is ExitCode.SESSION_IN_USE
    state_file.close()


async def test_a_demotion_without_hooks_records_its_slack(endpoint: str, tmp_path: Path) -> None:
    """Readers of the state file see it at once."""
    async with a_daemon(settings_for(endpoint), tmp_path) as (host, _), living(host) as task:
        await host.until_role("Primary")
        assert host.daemon.snapshot().stats.slack_s is None
        host.stop.set()
        await task
        slack_s = host.daemon.snapshot().stats.slack_s
    assert slack_s is not None
    assert 0 < slack_s <= 3


async def test_a_check_without_a_first_result_logs_no_warning(
    endpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    missing = {"name": "file", "type": "file_age", "path": str(tmp_path / "f"), "max_age": 60}
    settings = settings_for(endpoint, check=[missing | {"interval": 0.05}])
    async with a_daemon(settings, tmp_path) as (host, _), living(host):
        await host.until(
            lambda: len([r for r in caplog.records if r.msg == "unfit to be primary"]) == 2,
            "no result, and then a bad one",
        )
    records = [r for r in caplog.records if r.msg == "unfit to be primary"]
    assert [r.levelname for r in records] == ["INFO", "WARNING"]


async def test_requests_that_come_during_a_reload_are_one_further_reload(
    endpoint: str, tmp_path: Path
) -> None:
    """Each was a reload of its own, which takes the better part of a second: 300 took minutes."""
    settings, read = settings_for(endpoint), list[float]()

    def reread() -> AgentSettings:
        read.append(time.monotonic())
        return settings

    async with a_daemon(settings, tmp_path) as (host, _), living(host):
        await host.until_role("Primary")
        for _ in range(300):
            host.daemon.reload(reread)
        await host.until(
            lambda: all(task.get_name() != "reload" for task in asyncio.all_tasks()), "their end"
        )
        assert len(read) == 2
        assert host.daemon.describe()["role"] == "Primary"


async def test_a_reload_whose_hooks_are_on_a_dead_disk_blocks_no_later_one(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It held the lock of reloads for good, without a line."""
    settings, answered, done = settings_for(endpoint), threading.Event(), asyncio.Event()
    monkeypatch.setattr(reload, "LONGEST_LOAD_S", 0.1)
    monkeypatch.setattr(reload, "read_hooks", lambda *_: answered.wait() and {})
    caplog.set_level("INFO")

    def reasons() -> list[str]:
        fields = [record.__dict__.get("fields", {}) for record in caplog.records]
        return [str(each["reason"]) for each in fields if "reason" in each]

    async with a_daemon(settings, tmp_path) as (host, _), living(host):
        await host.until_role("Primary")
        for reason in ("the hooks were not read within 0.1 s", "still blocked in the kernel"):
            host.daemon.reload(lambda: settings)
            await host.until(lambda: any(reason in each for each in reasons()), reason)  # noqa: B023 - awaited
        answered.set()
        monkeypatch.setattr(RoleRunner, "reconfigure", lambda *_: done.set())

        def reload_again() -> bool:
            host.daemon.reload(lambda: settings)
            return done.is_set()

        await host.until(reload_again, "the disk to answer")
