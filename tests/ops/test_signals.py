"""Stopping by signal."""

import asyncio
import logging
import os
import signal

import pytest

from agent.ops.signals import stop_signals


async def logged(caplog: pytest.LogCaptureFixture, message: str) -> logging.LogRecord:
    async with asyncio.timeout(30):
        while True:
            for record in caplog.records:
                if record.getMessage() == message:
                    return record
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_asks_for_a_stop(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with stop_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.wait(), 30)
    assert (await logged(caplog, "stop asked for")).__dict__["fields"] == {"signal": number.name}


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


async def test_the_handlers_of_before_are_back_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
