"""Names are resolved beside the loop: a resolver that hangs delays nothing else, and no exit."""

import asyncio
import gc
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from agent.ops import resolver
from agent.ops.resolver import Resolver, resolve_in_own_threads

REAL = socket.getaddrinfo
LIMIT_S = 10.0


class Names:
    """A resolver that hangs for names of ``.hangs`` until it is let go."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.go_on = threading.Event()

    def getaddrinfo(self, host: Any, *rest: Any) -> Any:
        self.asked.append(host)
        if str(host).endswith(".hangs"):
            self.go_on.wait(30)
        return REAL("127.0.0.1", *rest)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    names = Names()
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    yield names
    names.go_on.set()


async def test_a_name_that_hangs_does_not_delay_another(names: Names) -> None:
    """Fault 1: look-ups that hung in the shared executor delayed all others."""
    ours = Resolver()
    hanging = [
        asyncio.create_task(ours.getaddrinfo(f"h{number}.hangs", 80)) for number in range(20)
    ]
    async with asyncio.timeout(LIMIT_S):
        found = await ours.getaddrinfo("good", 80, type=socket.SOCK_STREAM)
    assert found == REAL("127.0.0.1", 80, type=socket.SOCK_STREAM)
    assert not any(task.done() for task in hanging)
    names.go_on.set()
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(*hanging)


async def test_the_failure_of_a_look_up_that_nobody_waits_for_is_no_failure_of_the_agent(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent stopped with 38: the caller's time was over before a dead name server was given up."""

    def fail(host: Any, *rest: Any) -> Any:
        names.getaddrinfo(host, *rest)
        raise socket.gaierror(socket.EAI_AGAIN, "no name server answers")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    reported: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    ours = Resolver()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await ours.getaddrinfo("name.hangs", 80)
    names.go_on.set()
    await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})  # retrieves no error
    with pytest.raises(socket.gaierror):
        await ours.getaddrinfo("name", 80)  # forgets the first one
    gc.collect()
    assert reported == []


async def test_the_same_look_up_has_one_thread_and_survives_a_cancelled_caller(
    names: Names,
) -> None:
    ours = Resolver()
    first, second = (asyncio.create_task(ours.getaddrinfo("a.hangs", 80)) for _ in range(2))
    while not names.asked:  # noqa: ASYNC110 - a thread sets it
        await asyncio.sleep(0.005)
    first.cancel()
    await asyncio.wait([first])
    names.go_on.set()
    async with asyncio.timeout(LIMIT_S):
        assert await second
    assert names.asked == ["a.hangs"]


async def test_answers_are_not_cached(names: Names) -> None:
    ours = Resolver()
    for _ in range(3):
        await ours.getaddrinfo("a", 80)
    assert names.asked == ["a"] * 3


async def test_blocked_look_ups_are_bounded(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Resolver()
    ports = range(resolver.MOST_OF_ONE_HOST)
    hanging = [asyncio.create_task(ours.getaddrinfo("a.hangs", port)) for port in ports]
    await asyncio.sleep(0)
    with pytest.raises(socket.gaierror, match="too many"):
        await ours.getaddrinfo("a.hangs", 99)
    assert await ours.getaddrinfo("b", 80)
    monkeypatch.setattr(resolver, "MOST_LOOKUPS", len(hanging))
    with pytest.raises(socket.gaierror, match="too many"):
        await ours.getaddrinfo("c", 80)
    names.go_on.set()
    await asyncio.gather(*hanging)
    assert await ours.getaddrinfo("a.hangs", 99)


async def test_a_failed_look_up_is_the_callers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    ours = Resolver()
    for _ in range(2):
        with pytest.raises(socket.gaierror, match="no such name"):
            await ours.getaddrinfo("missing", 80)


async def test_numeric_addresses_need_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", None)
    for host in ("127.0.0.1", b"127.0.0.1", "::1", None):
        assert await Resolver().getaddrinfo(host, 80)


async def test_connections_of_a_loop_use_the_resolver(names: Names) -> None:
    loop = asyncio.get_running_loop()
    resolve_in_own_threads(loop)
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    _, writer = await asyncio.open_connection("some-name", port)
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()
    assert "some-name" in names.asked


EXIT = """
import asyncio, socket, threading, time
socket.getaddrinfo = lambda *_, **__: time.sleep(1000)
from agent.ops.resolver import resolve_in_own_threads

async def main():
    resolve_in_own_threads(asyncio.get_running_loop())
    try:
        async with asyncio.timeout(0.1):
            await asyncio.open_connection("name", 80)
    except TimeoutError:
        print("ended")

asyncio.run(main())
"""


def test_the_exit_does_not_wait_for_a_look_up() -> None:
    began_at = time.monotonic()
    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, timeout=60, check=True)
    assert done.stdout == b"ended\n"
    assert time.monotonic() - began_at < LIMIT_S
