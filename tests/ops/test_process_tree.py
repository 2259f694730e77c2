"""The search for the processes of a tenure, when it does not end."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from agent import proctree
from agent.ops import process_tree
from agent.ops.blocking import StuckError
from agent.ops.process_tree import ProcessTree
from tests.hung import stuck_thread

PATIENCE_S = 20.0


async def test_a_search_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    tree = ProcessTree("instance.1")
    monkeypatch.setattr(tree, "find", go_on.wait)
    with pytest.raises(StuckError) as caught:
        await tree.find_in_thread(0.01)
    assert str(caught.value) == "cannot list the processes of instance.1: no result within 0.01 s"
    go_on.set()


@pytest.fixture
def strangers() -> Iterator[list[int]]:
    """Ordinary processes without a mark."""
    processes = [subprocess.Popen(["sleep", "1000"], start_new_session=True) for _ in range(6)]
    yield [process.pid for process in processes]
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, int]]:
    """Readers that block at each environment, by process id: add those that block."""
    blocked: dict[int, int] = {}
    contents, release = proctree.contents, threading.Event()

    def block(pid: int, name: str) -> bytes:
        if name == "environ" and pid in blocked:
            blocked[pid] += 1
            release.wait(PATIENCE_S)
        return contents(pid, name)

    monkeypatch.setattr(proctree, "contents", block)
    monkeypatch.setattr(process_tree, "READ_S", 0.05)
    yield blocked
    release.set()


def test_a_process_that_blocks_its_reader_costs_one_thread_for_all_trees(
    strangers: list[int], readers: dict[int, int]
) -> None:
    """Each tree lost one more thread to it: a reserved one, where no other could be started."""
    readers |= dict.fromkeys(strangers[:2], 0)
    for number in range(3):
        assert ProcessTree(f"instance.{number}", since=0).find() == set()
    assert list(readers.values()) == [1, 1]


def test_with_several_blocked_readers_a_process_with_a_stuck_thread_is_not_read(
    strangers: list[int], readers: dict[int, int]
) -> None:
    readers |= dict.fromkeys(strangers[: process_tree.MOST_READERS], 0)
    ProcessTree("instance.1", since=0).find()
    name = f"test-{os.getpid()}-{time.monotonic_ns()}"
    with stuck_thread(FAILOVER_TENURE=name) as pid, stuck_thread(FAILOVER_TENURE=name) as known:
        readers[pid] = 0
        one = proctree.identify(known)
        assert one is not None
        assert {pid for pid, _ in ProcessTree(name, since=0, known=[one]).find()} >= {known}
        assert readers[pid] == 0
    assert list(readers.values()) == [1] * process_tree.MOST_READERS + [0]
