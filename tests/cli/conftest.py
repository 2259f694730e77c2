"""The command line in this process, and a real coordinator on loopback for it to ask."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from agent.cli.main import main
from agent.coordinator.server import serving
from agent.schema.addresses import Address
from agent.schema.coordinator_settings import CoordinatorSettings

Cli = Callable[..., tuple[int, str, str]]

PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FAILOVER_"):
            monkeypatch.delenv(name)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs one command line: exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        out, err = capfd.readouterr()
        return code, out, err

    return run


def serve(settings: CoordinatorSettings) -> Iterator[str]:
    """The endpoint of a coordinator that serves in a thread until the generator is closed."""
    ready = threading.Event()
    told: dict[str, str] = {}
    stop = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def until_stopped() -> None:
        loops.append(asyncio.get_running_loop())
        async with serving(settings) as url:
            told["url"] = url
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(until_stopped()))
    thread.start()
    assert ready.wait(PATIENCE_S)
    yield f"{told['url']}/api/v1/clientfailover"
    loops[0].call_soon_threadsafe(stop.set)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """A coordinator without authentication."""
    yield from serve(CoordinatorSettings(store="memory", listen=Address("127.0.0.1", 0)))
