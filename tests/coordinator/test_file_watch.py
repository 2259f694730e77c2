"""A change of a file is reported once, when the file no longer changes, and never twice."""

import asyncio
import os
from pathlib import Path

import pytest

from agent.coordinator.file_watch import FileWatch
from agent.files import signatures
from agent.ops.blocking import BlockingThread

EVERY_S = 0.01


class Watched:
    """Files, and the watch on them."""

    def __init__(self, folder: Path) -> None:
        self.files = [folder / "one", folder / "two"]
        for file in self.files:
            file.write_text("old")
        self.hangup = asyncio.Event()
        self.lane = BlockingThread("test")
        self.watch = FileWatch(lambda: self.files, self.lane, signatures(self.files), EVERY_S)

    async def next(self) -> bool:
        return await asyncio.wait_for(self.watch.wait(self.hangup), 10)

    async def is_quiet(self) -> bool:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(self.watch.wait(self.hangup), 20 * EVERY_S)
        return True


@pytest.fixture
async def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


async def test_a_change_is_reported_once(watched: Watched) -> None:
    assert await watched.is_quiet()
    watched.files[1].write_text("newer")
    assert await watched.next() is False
    assert await watched.is_quiet()


async def test_a_change_before_the_first_check_is_reported(watched: Watched) -> None:
    """The files were read at the start, and the groups have taken a while to load."""
    watched.files[0].write_text("newer")
    assert await watched.next() is False


async def test_a_renamed_file_of_the_same_size_and_time_is_a_change(watched: Watched) -> None:
    old = watched.files[0].stat()
    other = watched.files[0].with_name("other")
    other.write_text("new")
    os.utime(other, ns=(old.st_atime_ns, old.st_mtime_ns))
    other.rename(watched.files[0])
    assert await watched.next() is False


async def test_a_file_that_is_being_written_is_left_alone(watched: Watched) -> None:
    """It counts once it has stood still from one look to the next."""
    waiting = asyncio.create_task(watched.next())
    looks = 0
    real = watched.lane.run

    async def changing(*args: object, **more: object) -> object:
        nonlocal looks
        looks += 1
        if looks < 10:
            watched.files[0].write_text("x" * looks)
        return await real(*args, **more)  # type: ignore[arg-type]

    watched.lane.run = changing  # type: ignore[method-assign, assignment]
    assert await waiting is False
    assert looks >= 10


async def test_a_file_that_is_gone_and_back_is_a_change(watched: Watched) -> None:
    watched.files[0].unlink()
    assert await watched.next() is False
    watched.files[0].write_text("old")
    assert await watched.next() is False


async def test_a_signal_is_reported_as_such_and_covers_the_change(watched: Watched) -> None:
    watched.files[0].write_text("newer")
    watched.hangup.set()
    assert await watched.next() is True
    assert not watched.hangup.is_set()
    assert await watched.is_quiet()


async def test_without_files_only_the_signal_counts(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.files.clear()
    watched.watch = FileWatch(lambda: (), watched.lane, (), EVERY_S)
    assert await watched.is_quiet()
    watched.hangup.set()
    assert await watched.next() is True


async def test_a_disk_that_hangs_holds_nothing_up(watched: Watched) -> None:
    async def stuck(*_: object, **__: object) -> object:
        raise TimeoutError

    watched.lane.run = stuck  # type: ignore[method-assign, assignment]
    assert await watched.is_quiet()
    watched.hangup.set()
    assert await watched.next() is True


async def test_a_content_of_the_same_size_with_the_former_time_is_a_change(
    watched: Watched,
) -> None:
    old = watched.files[0].stat()
    while watched.files[0].stat().st_ctime_ns == old.st_ctime_ns:  # a kernel's clock may be coarse
        watched.files[0].write_text("new")
        os.utime(watched.files[0], ns=(old.st_atime_ns, old.st_mtime_ns))
    assert await watched.next() is False
