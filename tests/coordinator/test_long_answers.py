"""Long answers, and long bodies: making them delays nobody, and slow readers of them do not fill the memory."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from agent.coordinator import api as api_module
from agent.coordinator.api import Api
from agent.coordinator.service import Coordinator
from agent.coordinator.store.memory import MemoryStore
from agent.core.group_state import Policy
from agent.model import TICKS_PER_SECOND, GroupConfig, GroupKey, GroupRecord
from agent.ops.clock import Clock

from .conftest import Process
from .raw import BASE, Raw, ask, program, until

GROUPS = 600
NOTE = "x" * 15_000
PAGE = f"{BASE}/groups?count=1000"
"""A page of 9 MB: more than the kernel takes from a process whose peer does not read."""


async def many_groups(clock: Clock) -> Coordinator:
    store, additional = MemoryStore(), json.dumps({"Note": NOTE})
    for number in range(GROUPS):
        config = GroupConfig(f"g{number}", 10 * TICKS_PER_SECOND, additional=additional)
        await store.create(GroupKey("default", "default", config.id), GroupRecord(config))
    coordinator = Coordinator(store, clock.now, Policy())
    await coordinator.start()
    return coordinator


async def call(
    api: Api, target: str, body: bytes | None = None, *, connected: bool = True
) -> tuple[int, int]:
    """GET, or PUT a body; the status of the answer, and the bytes of its body."""
    sent: list[Any] = []
    path, _, query = target.partition("?")

    async def send(message: Any) -> None:
        sent.append(message)

    received = 0

    async def receive() -> Any:
        nonlocal received
        received += 1
        if received == 1:
            return {"type": "http.request", "body": body, "more_body": False}
        if connected:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    scope = {
        "type": "http",
        "method": "GET" if body is None else "PUT",
        "path": path,
        "query_string": query.encode(),
        "headers": [(b"host", b"localhost")],
    }
    await api(scope, receive, send)
    return sent[0]["status"], sum(len(part["body"]) for part in sent[1:])


async def longest_turn_s(work: Callable[[], Any]) -> float:
    """The CPU time of the longest turn of the event loop meanwhile."""
    held_s = 0.0

    async def turn() -> None:
        nonlocal held_s
        while True:
            began_s = time.thread_time()
            await asyncio.sleep(0)
            held_s = max(held_s, time.thread_time() - began_s)

    turning = asyncio.create_task(turn())
    await work()
    turning.cancel()
    return held_s


async def test_many_lists_at_once_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    coordinator = await many_groups(clock)
    api = Api(coordinator, clock.now)

    async def lists() -> None:
        asked = [call(api, PAGE) for _ in range(12)]
        answers = await asyncio.gather(*asked)
        assert {status for status, _ in answers} <= {200, 503}
        assert answers[0][1] > GROUPS * len(NOTE)

    one_s = await longest_turn_s(lists)
    monkeypatch.setattr(api_module, "LISTS", frozenset())
    together_s = await longest_turn_s(lists)
    assert together_s > 2 * one_s
    await coordinator.stop()


async def test_a_list_whose_caller_has_hung_up_is_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While etcd hangs, callers give up and ask again: their lists must not keep others waiting once it is back."""
    clock = Clock()
    coordinator = Coordinator(MemoryStore(), clock.now, Policy())
    await coordinator.start()
    api, free, made = Api(coordinator, clock.now), asyncio.Event(), 0

    async def hang(*_: object) -> tuple[int, list[GroupConfig]]:
        nonlocal made
        made += 1
        await free.wait()
        return 0, []

    monkeypatch.setattr(coordinator, "list_groups", hang)
    waiting = asyncio.create_task(call(api, PAGE))
    gone = [asyncio.create_task(call(api, PAGE, connected=False)) for _ in range(20)]
    await asyncio.wait(gone, timeout=5.0)
    free.set()
    assert await waiting == (200, 2)
    assert await call(api, PAGE) == (200, 2)
    await asyncio.wait(gone)
    assert made == 2
    await coordinator.stop()


async def test_many_long_bodies_at_once_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    coordinator = await many_groups(clock)
    api = Api(coordinator, clock.now)
    entries = [
        {"Trustee": {"Type": 1, "ObjectId": f"{n:05}"}, "AccessType": 0, "AccessRights": 8}
        for n in range(700)
    ]
    body = json.dumps({"RoleTrusteeAccessControlEntries": entries}).encode()

    async def bodies() -> None:
        asked = [call(api, f"{BASE}/groups/g{n}/accesscontrol", body) for n in range(50)]
        assert {status for status, _ in await asyncio.gather(*asked)} == {204}

    one_s = await longest_turn_s(bodies)
    monkeypatch.setattr(api_module, "LONG_BODY", len(body))
    together_s = await longest_turn_s(bodies)
    assert together_s > 2 * one_s
    await coordinator.stop()


@pytest.mark.long
def test_slow_readers_of_long_answers_do_not_fill_the_memory(
    serve: Callable[..., Process],
) -> None:
    """What they have not read yet is bounded together; short answers are always given."""
    process = serve(program=program(ANSWER_S=600.0, MAX_UNSENT_BYTES=20_000_000))
    with Raw(process.url) as writer:
        for number in range(GROUPS):
            group = {
                "Id": f"g{number}",
                "FailoverTimeout": "00:00:30",
                "AdditionalData": {"Note": NOTE},
            }
            assert writer.request("POST", f"{BASE}/groups", group).answer().status == 201
        slow = [Raw(process.url) for _ in range(2)]
        for one in slow:
            one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.request("GET", PAGE)
        until(lambda: ask(process.url, PAGE).status == 503)
        error = ask(process.url, PAGE).error()
        assert "Long answers of" in error["Reason"]
        assert writer.request("GET", f"{BASE}/groups/g1").answer().status == 200
        assert len(json.loads(ask(process.url, f"{BASE}/groups?count=2").body)) == 2
        for one in slow:
            one.socket.close()
        until(lambda: ask(process.url, PAGE).status == 200)
