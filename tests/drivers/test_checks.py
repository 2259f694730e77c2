"""Health checks, by real processes, servers and files."""

import asyncio
import logging
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drivers.checks import command as command_module
from agent.drivers.checks.command import ExecCheck
from agent.drivers.checks.file_age import FileAgeCheck
from agent.drivers.checks.http import HttpCheck
from agent.drivers.checks.kind import Check, CheckFailed, Run, run_blocking
from agent.drivers.checks.process import Process, ProcessCheck
from agent.drivers.checks.prometheus import PrometheusCheck
from agent.drivers.checks.runner import Checks
from agent.drivers.checks.tcp import TcpCheck
from agent.drivers.checks.verdict import CheckResult, Health, judge
from agent.ops.blocking import BlockingThread
from agent.ops.clock import Clock
from agent.schema.formats import parse_peer
from agent.schema.read import validate
from tests.test_proctree import HEADLESS

LIMIT_S = 60
"""For what takes milliseconds, on a busy machine."""

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OFTEN_S = 0.05

Script = Callable[[str], Path]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    def write(text: str) -> Path:
        path = tmp_path / f"check{len(list(tmp_path.iterdir()))}"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.fixture(autouse=True)
def _no_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(0.002)


def is_alive(pid: int) -> bool:
    """Whether ``pid`` runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough


async def why(run: Callable[[], Awaitable[None]]) -> str | None:
    """Why one run failed, or None."""
    try:
        async with asyncio.timeout(LIMIT_S):
            await run()
    except CheckFailed as error:
        return str(error)
    return None


def tcp(name: str, **keys: Any) -> TcpCheck:
    return validate(TcpCheck, {"name": name, "address": "127.0.0.1:1", **keys})


C = TypeVar("C", bound=Check)


def patient(check: C, keys: dict[str, Any]) -> C:
    """A limit that no noise of the machine exceeds, though longer than the interval."""
    return check if "limit" in keys else replace(check, limit=LIMIT_S)


async def run_of(check: Check) -> None:
    await check.runner(Clock())()


def exec_check(*argv: object, **keys: Any) -> ExecCheck:
    keys = {"name": "a", "interval": 60.0, **keys}
    check = validate(ExecCheck, {"command": tuple(map(str, argv)), **keys})
    return patient(check, keys)


def file_check(path: Path, name: str = "a", **keys: Any) -> FileAgeCheck:
    keys = {"max_age": 3600.0, "interval": OFTEN_S, **keys}
    check = validate(FileAgeCheck, {"name": name, "path": path, **keys})
    return patient(check, keys)


@asynccontextmanager
async def running(
    *checks: Check, failover_score: float = 100.0
) -> AsyncIterator[tuple[Checks, list[Health]]]:
    told: list[Health] = []
    driver = Checks(checks, Clock(), told.append, failover_score)
    driver.start()
    try:
        yield driver, told
    finally:
        await driver.stop()


# --- score and fitness --------------------------------------------------------------------------


def results_of(checks: list[TcpCheck], ups: list[bool]) -> dict[str, CheckResult]:
    return {c.name: CheckResult(up=up, since=NOW) for c, up in zip(checks, ups, strict=True)}


WEIGHED = st.lists(
    st.tuples(
        st.floats(min_value=1e-6, max_value=1000),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=64,
)


@given(WEIGHED, st.floats(min_value=0, max_value=100))
def test_the_score_is_the_share_of_passing_weights_of_the_configured_score(
    drawn: list[tuple[float, bool, bool]], most: float
) -> None:
    checks = [tcp(f"c{n}", weight=w, required=r) for n, (w, _, r) in enumerate(drawn)]
    ups = [up for _, up, _ in drawn]
    health = judge(checks, results_of(checks, ups), most)
    share = sum(w for w, up, _ in drawn if up) / sum(w for w, _, _ in drawn)
    assert 0 <= health.score <= round(most, 2)
    assert health.score == pytest.approx(most * share, abs=0.011)
    assert (health.score == round(most, 2)) or not all(ups)
    if not any(ups) or any(required and not up for _, up, required in drawn):
        assert not health.fit
    elif share > 1e-4:
        assert health.fit


@given(WEIGHED)
def test_no_check_that_comes_up_lowers_the_score_or_ends_fitness(
    drawn: list[tuple[float, bool, bool]],
) -> None:
    checks = [tcp(f"c{n}", weight=w, required=r) for n, (w, _, r) in enumerate(drawn)]
    ups = [up for _, up, _ in drawn]
    before = judge(checks, results_of(checks, ups))
    for n in range(len(ups)):
        after = judge(checks, results_of(checks, [*ups[:n], True, *ups[n + 1 :]]))
        assert after.score >= before.score
        assert after.fit >= before.fit


def test_without_checks_a_member_is_fit_with_the_configured_score() -> None:
    health = Checks([], Clock(), lambda _: None, 70).health
    assert (health.score, health.fit) == (70, True)
    assert judge([], {}, 0).fit


def test_scores_are_rounded_to_two_decimals() -> None:
    checks = [tcp("a"), tcp("b"), tcp("c")]
    assert judge(checks, results_of(checks, [True, False, False])).score == 33.33


def test_a_required_check_that_is_down_ends_fitness_whatever_the_score() -> None:
    checks = [tcp("a", required=True), tcp("b", weight=9)]
    results = results_of(checks, [True, True])
    results["a"] = CheckResult(up=False, since=NOW, last_error="exit 1\n\x1b[31m")
    health = judge(checks, results)
    assert (health.score, health.fit) == (90, False)
    assert health.reason == "a (required): exit 1\n\x1b[31m".replace("\n\x1b", " ")


def test_a_member_is_unfit_while_one_first_result_is_missing() -> None:
    checks = [tcp("a"), tcp("b")]
    results = results_of(checks, [True, False])
    assert judge(checks, results).fit
    results["b"] = CheckResult(up=False, since=NOW, known=False)
    assert not judge(checks, results).fit


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5), st.integers(1, 5))
def test_the_first_result_decides_and_later_ones_by_rise_and_fall(
    passed: list[bool], rise: int, fall: int
) -> None:
    check = tcp("a", rise=rise, fall=fall)
    result = CheckResult(up=False, since=NOW, known=False)
    seen: list[bool] = []
    for n, ok in enumerate(passed):
        before = result
        result = result.after(check, None if ok else "down", 0.1, NOW + timedelta(seconds=n))
        seen.append(ok)
        if len(seen) == 1:
            assert result.up == ok
        elif result.up != before.up:  # it turned: by enough in a row, and not later than that
            enough = rise if result.up else fall
            assert seen[-enough:] == [result.up] * enough
            assert result.since == NOW + timedelta(seconds=n)
        else:
            enough = fall if result.up else rise
            in_a_row = seen[::-1].index(result.up) if result.up in seen else len(seen)
            assert in_a_row < enough
            assert result.since == before.since
        assert result.last_error == (None if ok else "down")


# --- the driver ---------------------------------------------------------------------------------


async def test_first_results_decide_at_once_and_until_then_the_member_is_unfit(
    tmp_path: Path,
) -> None:
    (tmp_path / "there").touch()
    up = file_check(tmp_path / "there", "up", interval=60.0, rise=9, fall=9)
    down = file_check(tmp_path / "none", "down", interval=60.0, rise=9, fall=9)
    async with running(up, down, failover_score=50) as (checks, told):
        assert not checks.health.fit
        assert "no result yet" in checks.health.reason
        await until(lambda: checks.health.fit)
        assert checks.health.score == 25
        assert "down: " in checks.health.reason
        assert "No such file" in checks.health.reason
        assert not checks.health.results["down"].up
        await until(lambda: told and told[-1].fit)


async def test_a_first_failure_is_reported_though_it_changes_no_verdict(tmp_path: Path) -> None:
    """Who asks why this member is unfit is told the cause, not that nothing is known yet."""
    down = file_check(tmp_path / "none", "down", interval=60.0)
    async with running(down) as (_, told):
        await until(lambda: bool(told))
        assert "No such file" in told[-1].reason


async def test_a_check_that_flaps_changes_by_rise_and_fall_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.touch()
    check = file_check(path, rise=2, fall=3)
    outcomes = iter([True, False, False, True, False, False, False, True, False, True, True])
    told: list[bool] = []
    ups: list[bool] = []

    async def scripted() -> None:
        if driver.health.results["a"].known:
            ups.append(driver.health.results["a"].up)
        if not next(outcomes, True):
            raise CheckFailed("down")

    monkeypatch.setattr(FileAgeCheck, "runner", lambda *_: scripted)
    driver = Checks([check], Clock(), lambda health: told.append(health.results["a"].up))
    driver.start()
    await until(lambda: len(ups) == 11)
    await driver.stop()
    assert ups == [True] * 6 + [False] * 4 + [True]
    assert told == [True, False, True]


async def test_a_change_is_reported_once_with_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "file"
    path.touch()
    async with running(file_check(path, fall=2, rise=1)) as (checks, told):
        await until(lambda: told)
        path.unlink()
        await until(lambda: len(told) == 2)
        assert (told[1].score, told[1].fit) == (0, False)
        assert checks.health.results["a"].last_error
        path.touch()
        await until(lambda: len(told) == 3)
        assert told[2].fit
        assert told[2].reason == "all checks pass"
    changes = [r.__dict__["fields"]["up"] for r in caplog.records if r.msg == "check changed"]
    assert changes == [True, False, True]


async def test_a_check_of_scope_primary_passes_unseen_until_this_member_is_primary(
    tmp_path: Path,
) -> None:
    check = file_check(tmp_path / "none", scope="primary", required=True, fall=2)
    async with running(check) as (checks, told):
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing runs"
        assert (checks.health.score, checks.health.fit) == (100, True)
        checks.set_primary(True)
        assert checks.health.fit
        await until(lambda: told)
        assert (told[0].score, told[0].fit) == (0, False)
        checks.set_primary(False)
        assert checks.health.fit
        assert checks.health.results["a"].last_error is None
        await until(lambda: len(told) == 2)
        assert told[1].fit


async def test_a_check_of_scope_primary_first_runs_after_one_interval(script: Script) -> None:
    check = exec_check(script("exit 1"), scope="primary", fall=1, interval=0.3)
    async with running(check) as (checks, told):
        loop = asyncio.get_running_loop()
        start = loop.time()
        checks.set_primary(True)
        await until(lambda: checks.health.results["a"].last_error)
        assert loop.time() - start >= 0.29
        assert told or not checks.health.fit


async def test_becoming_primary_again_at_once_never_runs_a_check_twice_at_a_time(
    script: Script, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    slow = script(
        f"echo + >> {log}; trap 'sleep 0.1; echo - >> {log}; exit' TERM; sleep 100 & wait"
    )
    check = exec_check(slow, scope="primary", interval=OFTEN_S)
    async with running(check) as (checks, _):
        checks.set_primary(True)
        await until(log.exists)
        for _ in range(3):
            checks.set_primary(False)
            checks.set_primary(True)
            await asyncio.sleep(0)
        await until(lambda: log.read_text().count("+") == 2)
        assert checks.health.results["a"].last_error is None
    assert log.read_text().split() == ["+", "-", "+", "-"]


async def test_a_slow_check_delays_no_other_one_and_never_runs_twice_at_a_time(
    script: Script, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    count = tmp_path / "count"
    runs = tmp_path / "runs"
    slow = exec_check(script(f"echo >> {count}; sleep 100"), name="slow", interval=OFTEN_S)
    quick = exec_check(script(f"echo >> {runs}"), name="quick", interval=OFTEN_S)
    async with running(slow, quick):
        await until(lambda: count.exists() and runs.exists() and runs.read_text().count("\n") >= 5)
        assert count.read_text() == "\n"


async def test_a_run_at_its_limit_fails_with_the_limit_as_reason(script: Script) -> None:
    check = exec_check(script("sleep 100"), interval=60.0, limit=0.1)
    async with running(check) as (checks, _):
        await until(lambda: checks.health.results["a"].known)
        assert checks.health.reason == "a: gave no result within 0.1 s"
        assert 0.1 <= checks.health.results["a"].duration_s < LIMIT_S


async def test_an_unexpected_exception_is_a_failure_and_the_check_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = 0

    async def broken() -> None:
        nonlocal runs
        runs += 1
        raise ZeroDivisionError

    monkeypatch.setattr(FileAgeCheck, "runner", lambda *_: broken)
    driver = Checks([file_check(tmp_path)], Clock(), lambda _: None)
    driver.start()
    await until(lambda: runs == 2)
    await driver.stop()
    assert "ZeroDivisionError" in driver.health.reason
    assert [r for r in caplog.records if r.msg == "check could not be run"]


async def test_after_stop_nothing_is_reported_and_no_run_begins(tmp_path: Path) -> None:
    check = file_check(tmp_path / "none", scope="primary")
    told: list[Health] = []
    driver = Checks([check, file_check(tmp_path, "b")], Clock(), told.append)
    driver.start()
    await driver.stop()
    await driver.stop()
    driver.set_primary(True)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing is left that could report"
    assert not told


# --- exec ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("exit 0", None),
        ("exit 3", "exit 3"),
        ("echo disk full >&2; echo more; exit 2", "exit 2: disk full"),
        ("kill -9 $$", "killed by signal 9"),
    ],
)
async def test_a_command_passes_by_exit_0_only(script: Script, text: str, says: str) -> None:
    assert await why(exec_check(script(text)).runner(Clock())) == says


async def test_a_command_that_cannot_be_started_fails(tmp_path: Path) -> None:
    assert "No such file" in str(await why(exec_check(tmp_path / "none").runner(Clock())))


@pytest.mark.parametrize("first", ["", "trap '' TERM;"], ids=["minds-term", "ignores-term"])
async def test_a_command_that_hangs_is_killed_with_its_children(
    script: Script, tmp_path: Path, first: str
) -> None:
    pids = tmp_path / "pids"
    hanging = script(f"{first} sleep 1000 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait")
    hanging.write_text(hanging.read_text().replace("wait", "while :; do sleep 0.01; done"))
    task = asyncio.create_task(run_of(exec_check(hanging)))
    await until(pids.exists)
    assert all(is_alive(int(pid)) for pid in pids.read_text().split())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not any(is_alive(int(pid)) for pid in pids.read_text().split()))


async def test_term_gives_a_command_time_to_clean_up(script: Script, tmp_path: Path) -> None:
    text = f"trap 'touch {tmp_path}/cleaned; exit' TERM; touch {tmp_path}/ready; sleep 100 & wait"
    task = asyncio.create_task(run_of(exec_check(script(text))))
    await until((tmp_path / "ready").exists)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (tmp_path / "cleaned").exists()


async def test_what_a_command_leaves_in_its_group_does_not_outlive_it(
    script: Script, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    run = exec_check(script(f"sleep 1000 & echo $! > {child}")).runner(Clock())
    assert await why(run) is None
    await until(lambda: not is_alive(int(child.read_text())))


async def test_stop_leaves_no_process_and_no_zombie(script: Script, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    text = f"echo $$ > {pid}.new; mv {pid}.new {pid}; trap '' TERM; while :; do sleep 0.01; done"
    async with running(exec_check(script(text))):
        await until(pid.exists)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


async def test_output_is_kept_up_to_its_bound_and_the_rest_drained(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "agent.drivers.checks.command")
    before = open_files()
    assert (
        await why(exec_check(script("head -c 3000000 /dev/zero | tr '\\0' x")).runner(Clock()))
        is None
    )
    (record,) = [r for r in caplog.records if r.msg == "check output"]
    assert record.__dict__["fields"]["output"] == "x" * command_module.OUTPUT_BYTES
    assert open_files() <= before


async def test_a_daemon_that_holds_the_output_holds_nobody_up(
    script: Script, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    daemon = script(f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 1000")
    run = script(f"setsid {daemon} & while ! [ -e {pid} ]; do sleep 0.01; done")
    try:
        assert await why(exec_check(run).runner(Clock())) is None
    finally:
        os.kill(int(pid.read_text()), 9)


async def test_a_command_gets_a_clean_environment(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILOVER_AGENT_SECRET", "hunter2")
    text = 'test -z "$FAILOVER_AGENT_SECRET" && test -n "$PATH" && test "$PWD" = / && ! read x'
    assert await why(exec_check(script(text)).runner(Clock())) is None


# --- http ---------------------------------------------------------------------------------------

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await answer(writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        listener.close()
        await listener.wait_closed()


def page(body: bytes = b"", status: int = 200, headers: str = "") -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(
            f"HTTP/1.1 {status} x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode()
        )
        writer.write(body)

    return answer


def http(url: str, **keys: Any) -> Run:
    return validate(HttpCheck, {"name": "a", "url": url, **keys}).runner(Clock())


@pytest.mark.parametrize(
    ("status", "keys", "says"),
    [
        (200, {}, None),
        (302, {}, None),
        (404, {}, "answers 404, must be 200-399"),
        (500, {}, "answers 500"),
        (404, {"status": 404}, None),
        (302, {"status": "200-299"}, "answers 302, must be 200-299"),
    ],
)
async def test_an_http_check_passes_by_status_and_follows_no_redirect(
    status: int, keys: dict[str, Any], says: str | None
) -> None:
    async with server(page(b"", status, "Location: /elsewhere\r\n")) as url:
        told = await why(http(url, **keys))
        assert told is None if says is None else says in str(told)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"all is ready", None),
        (b"no", "without 'ready' in the first 64 KiB"),
        (b"." * 65531 + b"ready", None),
        (b"." * 65532 + b"ready", "without 'ready'"),
    ],
)
async def test_an_http_check_looks_for_text_in_the_bounded_body(
    body: bytes, says: str | None
) -> None:
    async with server(page(body)) as url:
        told = await why(http(url, contains="ready"))
        assert told is None if says is None else says in str(told)


async def test_text_that_comes_in_pieces_is_found() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 x\r\n\r\n")
        for byte in b"is ready":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)

    async with server(answer) as url:
        assert await why(http(url, contains="ready")) is None


async def test_an_endless_body_is_read_no_further_than_its_bound() -> None:
    sent = 0

    async def answer(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 x\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            sent += 65536
            await writer.drain()

    async with server(answer) as url:
        assert "without 'ready'" in str(await why(http(url, contains="ready")))
        assert await why(http(url)) is None
    assert sent < 64 * 1024 * 1024  # what fits into the sockets' buffers


async def test_a_slow_server_is_given_up_at_the_limit() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"H")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with server(answer) as url:
        check = HttpCheck(name="a", url=url, interval=60.0, limit=0.1)
        async with running(check) as (checks, _):
            await until(lambda: checks.health.results["a"].known)
            assert "a: " in checks.health.reason
            assert not checks.health.fit


async def test_a_refused_connection_and_what_is_not_http_fail() -> None:
    async with server(page()) as url:
        pass
    assert "gives no answer" in str(await why(http(url)))

    async def banner(writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")

    async with server(banner) as url:
        assert "gives no answer" in str(await why(http(url)))


async def test_a_compressed_body_is_not_unpacked() -> None:
    async with server(page(b"\x1f\x8b", headers="Content-Encoding: gzip\r\n")) as url:
        assert "compressed" in str(await why(http(url)))


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    cert, key = tmp_path / "cert", tmp_path / "key"
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=x"
    command = ["openssl", *options.split(), "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


async def test_a_certificate_is_checked_unless_insecure(certificate: tuple[Path, Path]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await page()(writer)
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{listener.sockets[0].getsockname()[1]}/"
    try:
        assert "certificate" in str(await why(http(url)))
        assert await why(http(url, insecure_tls=True)) is None
    finally:
        listener.close()
        await listener.wait_closed()


# --- tcp ----------------------------------------------------------------------------------------


async def test_a_tcp_check_passes_while_connections_are_taken() -> None:
    listener = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    run = TcpCheck(name="a", address=parse_peer(address), limit=1.0).runner(Clock())
    assert await why(run) is None
    listener.close()
    await listener.wait_closed()
    assert f"{address} takes no connection" in str(await why(run))


# --- file_age -----------------------------------------------------------------------------------


class FakeTime:
    def __init__(self) -> None:
        self.now = 0.0
        self.wall = NOW

    def clock(self) -> Clock:
        return Clock(lambda: self.now, lambda: self.now, lambda: self.wall)

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.wall += timedelta(seconds=seconds)


async def test_a_file_is_too_old_after_its_age_and_new_when_written(tmp_path: Path) -> None:
    path, time = tmp_path / "file", FakeTime()
    run = file_check(path, max_age=60).runner(time.clock())
    assert "No such file" in str(await why(run))
    path.touch()
    os.utime(path, (NOW.timestamp(), NOW.timestamp()))
    time.passes(59)
    assert await why(run) is None
    time.passes(2)
    assert await why(run) == f"{path} is 61.0 s old, must be at most 60 s"
    os.utime(path, (time.wall.timestamp(), time.wall.timestamp()))
    assert await why(run) is None


async def test_the_age_is_never_that_of_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "young").touch()
    (tmp_path / "link").symlink_to("young")
    run = file_check(tmp_path / "link", max_age=60).runner(Clock())
    assert "symbolic link is not followed" in str(await why(run))


async def test_a_file_from_the_future_ages_by_our_own_clock(tmp_path: Path) -> None:
    path, time = tmp_path / "file", FakeTime()
    path.touch()
    os.utime(path, (NOW.timestamp() + 86400, NOW.timestamp() + 86400))
    run = file_check(path, max_age=60).runner(time.clock())
    assert await why(run) is None
    time.passes(61)
    assert "61.0 s old" in str(await why(run))


async def test_work_that_is_stuck_in_the_kernel_is_begun_once_only() -> None:
    release, begun = threading.Event(), []

    def stuck() -> None:
        begun.append(1)
        release.wait(LIMIT_S)

    lane = BlockingThread("a")
    first = asyncio.create_task(run_blocking(lane, stuck))
    await until(lambda: begun)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert "blocked in the kernel" in str(await why(lambda: run_blocking(lane, stuck)))
    release.set()
    await until(lambda: not lane.busy)
    assert await why(lambda: run_blocking(lane, stuck)) is None
    assert begun == [1, 1]


# --- process ------------------------------------------------------------------------------------


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["/bin/sleep", "1000"]) as popen:
        try:
            yield popen
        finally:
            popen.kill()


def process(**keys: Any) -> Process:
    return Process(validate(ProcessCheck, {"name": "a", **keys}))


def killed(popen: subprocess.Popen[bytes]) -> None:
    popen.kill()
    popen.wait()


async def test_a_pid_file_passes_while_its_process_runs(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    path = tmp_path / "pid"
    run = process(pid_file=path)
    assert "No such file" in str(await why(run))
    path.write_text(f"{sleeper.pid}\nmore\n")
    assert await why(run) is None
    killed(sleeper)
    assert f"process {sleeper.pid}, which does not run" in str(await why(run))


@pytest.fixture
def headless(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", HEADLESS % (tmp_path / "pid")]) as leader:
        yield leader
        leader.kill()


async def test_a_process_whose_main_thread_has_ended_runs(
    tmp_path: Path, headless: subprocess.Popen[bytes]
) -> None:
    """The kernel shows it as a zombie, though its other threads go on."""
    await until(lambda: not is_alive(headless.pid))
    assert await why(process(pid_file=tmp_path / "pid")) is None


async def test_a_zombie_does_not_run(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    (tmp_path / "pid").write_text(str(sleeper.pid))
    sleeper.kill()
    await until(lambda: not is_alive(sleeper.pid))
    assert "does not run" in str(await why(process(pid_file=tmp_path / "pid")))


async def test_the_number_of_a_thread_is_no_process(tmp_path: Path) -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    (tmp_path / "pid").write_text(str(thread.native_id))
    try:
        assert "does not run" in str(await why(process(pid_file=tmp_path / "pid")))
    finally:
        release.set()
        thread.join()


@pytest.mark.parametrize("content", ["", "x", "-1", "0", "1" * 60, "99999999999", "²"])
async def test_what_is_no_pid_file_fails(tmp_path: Path, content: str) -> None:
    (tmp_path / "pid").write_text(content)
    assert "must begin with a process number" in str(await why(process(pid_file=tmp_path / "pid")))


async def test_a_pid_file_that_leads_elsewhere_fails_and_shows_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    (tmp_path / "shadow").write_text("root:$6$salt$hash")
    for how in ("symbolic", "fifo", "hard"):
        if how == "symbolic":
            path.symlink_to("shadow")
        elif how == "fifo":
            os.mkfifo(path)
        else:
            path.hardlink_to(tmp_path / "shadow")
        told = str(await why(process(pid_file=path)))
        path.unlink()
        assert "cannot be" in told or "must begin with a process number" in told
        assert "hash" not in told


async def test_a_number_that_is_reused_while_the_file_stays_the_same_fails(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    path = tmp_path / "pid"
    path.write_text(str(sleeper.pid))
    run = process(pid_file=path)
    assert await why(run) is None
    # no test can have the kernel reuse a process id
    assert run._known is not None
    identity, started = run._known
    assert started is not None
    run._known = (identity, started - 1)  # as if an earlier process had had this number
    assert "another process by now: sleep" in str(await why(run))
    assert "another process by now: sleep" in str(await why(run))
    run._known = (identity, None)  # as if it had been seen dead
    assert "another process by now" in str(await why(run))
    os.utime(path, (1, 1))  # the file was written again: it means this process
    assert await why(run) is None


async def test_a_number_that_was_reused_before_the_first_look_is_found_by_the_name(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    (tmp_path / "pid").write_text(str(sleeper.pid))
    assert await why(process(pid_file=tmp_path / "pid", process="sleep")) is None
    told = str(await why(process(pid_file=tmp_path / "pid", process="collectord")))
    assert told.endswith("which is sleep and not collectord")


@pytest.fixture
def named(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a sleeper whose command name is the one given, and ends it."""
    begun = []

    def start(name: str) -> subprocess.Popen[bytes]:
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to("/bin/sleep")
        begun.append(subprocess.Popen([tmp_path / name, "1000"]))
        return begun[-1]

    yield start
    for popen in begun:
        killed(popen)


async def test_a_process_is_found_by_its_command_name_while_it_runs(
    named: Callable[[str], subprocess.Popen[bytes]],
) -> None:
    name = f"chk{os.getpid()}"
    run = process(process=name)
    assert await why(run) == f"no process is named {name}"
    popen = named(name)
    assert await why(run) is None
    killed(popen)
    assert await why(run) == f"no process is named {name}"


async def test_all_of_a_host_are_looked_through_only_when_the_process_is_another_one(
    named: Callable[[str], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, looks = f"one{os.getpid()}", 0
    listdir = os.listdir

    def counted(path: str) -> list[str]:
        nonlocal looks
        looks += path == "/proc"
        return listdir(path)

    monkeypatch.setattr(os, "listdir", counted)
    run = process(process=name)
    first = named(name)
    assert [await why(run) for _ in range(3)] == [None] * 3
    assert looks == 1
    killed(first)
    assert await why(run) == f"no process is named {name}"
    assert looks == 2
    named(name)
    assert [await why(run) for _ in range(3)] == [None] * 3
    assert looks == 3


async def test_a_long_command_name_is_found_though_the_kernel_cuts_it(
    named: Callable[[str], subprocess.Popen[bytes]],
) -> None:
    name = f"check-{os.getpid():08}-of-a-long-name"
    named(name)
    assert await why(process(process=name)) is None
    assert await why(process(process="check-of-another-long-name")) is not None


async def test_a_process_is_found_by_its_executable(
    named: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    popen = named(f"link{os.getpid()}")
    (tmp_path / "pid").write_text(str(popen.pid))
    exe = Path(f"/proc/{popen.pid}/exe").readlink().name  # noqa: ASYNC240 - in memory
    assert await why(process(pid_file=tmp_path / "pid", process=exe)) is None


# --- prometheus ---------------------------------------------------------------------------------

METRICS = rb"""# HELP queue_depth Depth. {not a sample}
# TYPE queue_depth gauge
queue_depth{queue="in",host="a b"} 7 1700000000000
queue_depth{queue="o\"u\\t\n",host="}"} 90
queue_depth_max 5
# TYPE jobs counter
jobs 12
nothing NaN
most +Inf
least{x="1"}	-Inf
broken{x="1" 5
"""


def metric(url: str, name: str, op: str, value: float, **labels: str) -> Run:
    keys = {"metric": name, "op": op, "value": value, "labels": labels}
    table = {"name": "a", "type": "prometheus", "url": url, **keys}
    return validate(PrometheusCheck, table).runner(Clock())


@pytest.mark.parametrize(
    ("name", "op", "value", "labels", "says"),
    [
        ("queue_depth_max", "==", 5, {}, None),
        ("queue_depth_max", "!=", 5, {}, "queue_depth_max  is 5, must be != 5"),
        ("queue_depth_max", ">", 5, {}, "must be > 5"),
        ("queue_depth_max", ">=", 5, {}, None),
        ("queue_depth_max", "<", 5, {}, "must be < 5"),
        ("queue_depth_max", "<=", 5, {}, None),
        ("queue_depth", "<", 10, {"queue": "in"}, None),
        ("queue_depth", "==", 90, {"queue": 'o"u\\t\n', "host": "}"}, None),
        ("queue_depth", "<", 10, {}, "is 90, must be < 10"),
        ("queue_depth", "<", 100, {}, None),
        ("queue_depth", "<", 10, {"queue": "none"}, "no sample queue_depth {'queue': 'none'}"),
        ("queue", "<", 10, {}, "no sample queue"),
        ("jobs", "==", 12, {}, None),
        ("nothing", "!=", 1, {}, "is nan"),
        ("nothing", "<", 1, {}, "is nan"),
        ("most", ">", 1e300, {}, None),
        ("least", "<", -1e300, {"x": "1"}, None),
        ("broken", "<", 10, {}, "broken cannot be read"),
    ],
)
async def test_a_metric_passes_if_every_matching_sample_compares(
    name: str, op: str, value: float, labels: dict[str, str], says: str | None
) -> None:
    async with server(page(METRICS)) as url:
        told = await why(metric(url, name, op, value, **labels))
        assert told is None if says is None else says in str(told)


@pytest.mark.parametrize("text", [b"m", b"m ", b"m x", b"m{", b"m{} "])
async def test_a_malformed_sample_fails(text: bytes) -> None:
    async with server(page(text)) as url:
        assert await why(metric(url, "m", ">", 0)) is not None


async def test_a_number_that_is_no_float_fails() -> None:
    async with server(page(b"m " + b"9" * 400)) as url:
        assert "cannot be read" in str(await why(metric(url, "m", ">", 0)))


async def test_a_page_that_is_too_long_fails_and_a_long_one_does_not() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 x\r\n\r\nm 1\n")
        while True:
            writer.write(b"other 1\n" * 8192)
            await writer.drain()

    async with server(endless) as url:
        assert "more than 4096 KiB" in str(await why(metric(url, "m", ">", 0)))
    async with server(page(b"other 1\n" * 400_000 + b"m 1\n")) as url:
        assert await why(metric(url, "m", ">", 0)) is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'm{x="1"} 1\n' * 30_000, "the samples of m have more than 256 KiB"),
        (b'm{x="' + b"y" * 20_000 + b'"} 1\n', "a sample of m has more than 16 KiB"),
    ],
    ids=["many", "long"],
)
async def test_too_much_of_one_metric_fails(body: bytes, reason: str) -> None:
    async with server(page(body)) as url:
        assert reason in str(await why(metric(url, "m", ">", 0)))


async def test_an_exporter_that_does_not_answer_200_fails() -> None:
    async with server(page(b"m 1\n", 302)) as url:
        assert "answers 302, must be 200" in str(await why(metric(url, "m", ">", 0)))
