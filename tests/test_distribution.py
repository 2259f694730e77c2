"""The first worker of `make test` only computes; the others take what waits before they compute."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.distribution import Distribution

FILES = ["simulation/a", "simulation/b", "integration/c", "integration/d", "ops/e", "core/f"]
LENGTH = 3
"""Tests of each file."""


class Worker:
    """It runs the tests that it was given, one after the other."""

    gateway = SimpleNamespace(id="gw")

    def __init__(self) -> None:
        self.given: list[int] = []
        self.ran: list[int] = []
        self.shutting_down = False

    def send_runtest_some(self, indices: list[int]) -> None:
        assert not self.shutting_down
        self.given += indices

    def shutdown(self) -> None:
        self.shutting_down = True

    def files(self, tests: list[str]) -> list[str]:
        return list(dict.fromkeys(tests[index].split("::")[0] for index in self.ran))


def run(files: list[str], speeds: list[int]) -> list[list[str]]:
    """Which files each worker ran; it ends a test in each turn that its speed divides."""
    tests = [f"tests/{file}.py::test_{number}" for file in files for number in range(LENGTH)]
    option = SimpleNamespace(loadscopereorder=False)
    popen = SimpleNamespace(option=option, getvalue=lambda _: [f"{len(speeds)}*popen"])
    workers = [Worker() for _ in speeds]
    distribution = Distribution(cast("Any", popen))
    for worker in workers:
        distribution.add_node(worker)
    for worker in workers:
        distribution.add_node_collection(worker, tests)
    distribution.schedule()
    for turn in range(1, 1000):
        for worker, speed in zip(workers, speeds, strict=True):
            # As in xdist, the last test begins when another one has been sent, or the end.
            if turn % speed == 0 and len(worker.given) > (0 if worker.shutting_down else 1):
                worker.ran.append(worker.given.pop(0))
                distribution.mark_test_complete(worker, worker.ran[-1])
    assert sorted(index for worker in workers for index in worker.ran) == list(range(len(tests)))
    assert all(worker.shutting_down for worker in workers)
    return [
        [file.removeprefix("tests/").removesuffix(".py") for file in worker.files(tests)]
        for worker in workers
    ]


def test_the_first_worker_only_computes() -> None:
    first, *others = run(FILES, [1, 5, 5])
    assert first == ["simulation/a", "simulation/b", "core/f"]
    assert sorted(file for other in others for file in other) == [
        "integration/c",
        "integration/d",
        "ops/e",
    ]


def test_the_others_compute_when_nothing_else_is_left() -> None:
    first, *others = run(FILES, [50, 1, 1])
    assert first == ["simulation/a"]
    assert {other[0] for other in others} == {"integration/c", "integration/d"}
    assert {file for other in others for file in other[1:]} == {
        "ops/e",
        "simulation/b",
        "core/f",
    }


@pytest.mark.parametrize("workers", [1, 2, 4, 9])
@pytest.mark.parametrize("part", ["simulation", "integration", ""])
def test_every_test_is_run_once_whatever_there_is(workers: int, part: str) -> None:
    run([file for file in FILES if part in file], [1] * workers)
