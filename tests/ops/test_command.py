"""A command whose runs leave nothing behind, also when the kernel does not let it end."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from agent.ops import command as command_module
from agent.ops.blocking import StuckError
from agent.ops.command import Command
from agent.ops.process import ExitResult

LIMIT_S = 10.0


async def test_each_stream_is_kept_up_to_one_byte_more_than_is_wanted() -> None:
    command = Command(["/bin/sh", "-c", "printf 12345; printf abc >&2; exit 3"], keep_bytes=3)
    assert await command.run() == ExitResult(code=3)
    assert (bytes(command.stdout), bytes(command.stderr)) == (b"1234", b"abc")


async def test_streams_can_be_merged_in_the_order_of_writing() -> None:
    script = "printf 1; printf 2 >&2; printf 3"
    command = Command(["/bin/sh", "-c", script], keep_bytes=9, merge_stderr=True)
    assert await command.run() == ExitResult(code=0)
    assert (bytes(command.stdout), bytes(command.stderr)) == (b"123", b"")


async def test_a_run_that_prints_too_much_is_killed() -> None:
    command = Command(["/bin/cat", "/dev/zero"], keep_bytes=9, kill_if_longer=True)
    async with asyncio.timeout(LIMIT_S):
        assert await command.run() == ExitResult(signal=9)
    assert len(command.stdout) == 10


async def test_a_cancelled_run_has_time_to_end_itself(tmp_path: Path) -> None:
    done = tmp_path / "done"
    script = f"trap 'touch {done}; exit' TERM; touch {tmp_path}/ready; while :; do sleep 0.01; done"
    command = Command(["/bin/sh", "-c", script], keep_bytes=9, grace_s=LIMIT_S)
    run = asyncio.create_task(command.run())
    async with asyncio.timeout(LIMIT_S):
        while not (tmp_path / "ready").exists():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.005)
    run.cancel()
    await asyncio.wait([run])
    assert run.cancelled()
    assert done.exists()


class Stuck:
    """Stands in for a child that the kernel lets neither run nor end."""

    def __init__(self, *_: object, on_started: Callable[..., None], **__: object) -> None:
        self.on_started = on_started
        self.end: asyncio.Future[ExitResult] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        pass

    def signal(self, number: int) -> None:
        pass

    def release(self) -> None:
        assert self.end.done()

    @property
    def ended(self) -> bool:
        return self.end.done()

    async def wait(self) -> ExitResult:
        return await asyncio.shield(self.end)


async def test_no_run_is_started_beside_one_that_cannot_be_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command_module, "DEATH_S", 0.01)
    stuck: list[Stuck] = []

    def child(*args: Any, **options: Any) -> Stuck:
        stuck.append(Stuck(*args, **options))
        return stuck[-1]

    monkeypatch.setattr(command_module, "Child", child)
    command = Command(["/bin/true"], keep_bytes=9)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(command.run(), 0.01)
    with pytest.raises(StuckError):
        await command.run()
    reading, writing = os.pipe()
    pipe: IO[bytes] = os.fdopen(reading, "rb", buffering=0)
    stuck[0].on_started(pipe, None)  # its exec returns at last
    stuck[0].end.set_result(ExitResult(signal=9))
    monkeypatch.undo()
    assert await command.run() == ExitResult(code=0)
    assert len(stuck) == 1
    assert pipe.closed
    os.close(writing)
