"""Stopping, reloading, forwarding and surviving by signal."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.ops.signals import (
    IGNORED,
    forwarded_signals,
    ignored_signals,
    on_hangup,
    signal_name,
    stop_signals,
)


@pytest.fixture(autouse=True)
def default_dispositions() -> Iterator[None]:
    """Undo what the starter of the tests has ignored: nohup and a shell's ``&`` ignore signals."""
    before = {number: signal.getsignal(number) for number in IGNORED}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


async def logged(caplog: pytest.LogCaptureFixture, message: str) -> logging.LogRecord:
    async with asyncio.timeout(30):
        while True:
            for record in caplog.records:
                if record.getMessage() == message:
                    return record
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_requests_a_stop(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with stop_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.wait(), 30)
    assert (await logged(caplog, "stop requested")).__dict__["fields"] == {"signal": number.name}


async def test_a_second_signal_is_logged_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(stop.wait(), 30)
        os.kill(os.getpid(), signal.SIGINT)
        assert (await logged(caplog, "already stopping")).levelno == logging.WARNING
        assert stop.is_set()


async def test_a_signal_wakes_a_loop_that_sleeps() -> None:
    with stop_signals() as stop:
        asyncio.get_running_loop().call_later(0.01, os.kill, os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(stop.wait(), 30)


async def test_the_previous_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_ordinary_signals_are_ignored_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with ignored_signals():
        for number in [*IGNORED, *IGNORED]:
            os.kill(os.getpid(), number)
    names = [record.__dict__["fields"]["signal"] for record in caplog.records]
    assert sorted(names) == sorted(map(signal_name, IGNORED))


INHERITED = """
import signal, subprocess, sys
from agent.ops.signals import ignored_signals
if sys.argv[1] == "begin":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    raise SystemExit(subprocess.run([sys.executable, __file__, "agent"]).returncode)
with ignored_signals():
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert subprocess.run(["/bin/sh", "-c", "exit 7"]).returncode == 7
print("ready")
"""


def test_what_the_parent_did_to_signals_takes_no_child_and_no_stop_away(tmp_path: Path) -> None:
    """With SIGCHLD ignored no hook had a result; with SIGTERM blocked nothing stopped the agent."""
    program = tmp_path / "begin.py"
    program.write_text(INHERITED)
    command = [sys.executable, str(program), "begin"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert result.stdout == "ready\n", result.stderr


def test_a_signal_that_the_parent_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with ignored_signals():
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_children_get_the_default_dispositions_back() -> None:
    with ignored_signals():
        status = subprocess.run(
            ["cat", "/proc/self/status"], capture_output=True, text=True, check=True
        ).stdout
    masks = dict(line.split(":", 1) for line in status.splitlines())
    ours = sum(1 << (number - 1) for number in IGNORED)
    assert (int(masks["SigIgn"], 16) | int(masks["SigBlk"], 16)) & ours == 0


async def test_signals_are_forwarded_in_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    got: asyncio.Queue[int] = asyncio.Queue()

    def send(number: int) -> bool:
        got.put_nowait(number)
        return number != signal.SIGUSR2

    with ignored_signals(), forwarded_signals(send):
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMIN + 3):
            os.kill(os.getpid(), number)
            assert await asyncio.wait_for(got.get(), 30) == number
    received = {
        record.__dict__["fields"]["signal"]: record.getMessage()
        for record in caplog.records
        if "fields" in record.__dict__
    }
    assert received == {
        "SIGUSR1": "signal forwarded to the workload",
        "SIGUSR2": "signal ignored: the workload does not run",
        "SIGRTMIN+3": "signal forwarded to the workload",
    }


async def test_each_hangup_calls_back_in_the_loop() -> None:
    calls: asyncio.Queue[None] = asyncio.Queue()
    with ignored_signals(), on_hangup(lambda: calls.put_nowait(None)):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.wait_for(calls.get(), 30)
