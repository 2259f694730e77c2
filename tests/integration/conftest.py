"""A stage for real processes, for each test; the processes are ended afterwards."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from .containers import Engine, built
from .stage import Coordinator, Stage


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Coordinators and agents as real processes, in a folder and a group of their own."""
    with Stage(tmp_path, request.node.name) as stage:
        yield stage


@pytest.fixture(scope="session")
def shared_coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """One that no test kills: starting one takes longer than most tests need it for."""
    with Stage(tmp_path_factory.mktemp("coordinator")) as stage:
        yield stage.serve()


@pytest.fixture
def coordinator(shared_coordinator: Coordinator, stage: Stage) -> Coordinator:
    """The shared one, as the test's own group sees it."""
    process = shared_coordinator.popen
    assert process.poll() is None, f"ended with {process.poll()}: {shared_coordinator.said()}"
    return replace(shared_coordinator, group=stage.group)


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config) -> Iterator[Engine]:
    """An engine that has the image, which is built once: that takes a minute."""
    assert pytestconfig.cache is not None
    with built(pytestconfig.cache.mkdir("container-base")) as engine:
        yield engine
