"""The probe server, over real sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest

from agent.drivers import probe
from agent.drivers.probe import ProbeServer
from agent.errors import ConfigError, ExitCode

LIMIT_S = 30
GOOD = b'{"time": "2026-01-31T12:00:00Z"}'


class Agent:
    """What is behind the callbacks."""

    def __init__(self) -> None:
        self.reported: list[datetime] = []
        self.pages_now = 0
        self.in_force = datetime(2026, 1, 31, 11, 0, 0, 500, tzinfo=UTC)

    def report(self, time: datetime) -> datetime:
        self.reported.append(time)
        return self.in_force

    def status(self) -> dict[str, Any]:
        if not self.reported:
            return {"role": "Secondary", "epoch": None}
        raise KeyError("a fault of ours")

    def metrics(self, accept: str) -> tuple[bytes, str]:
        self.pages_now += 1
        return f"as {accept}".encode(), "text/anything; of=theirs"


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
async def address(agent: Agent) -> AsyncIterator[tuple[str, int]]:
    verdicts = {"fine": lambda: None, "not-fine": lambda: "it is too late"}
    server = ProbeServer(agent.report, agent.status, verdicts, agent.metrics)
    yield await server.start("127.0.0.1", 0)
    await server.stop()


@pytest.fixture
async def client(address: tuple[str, int]) -> AsyncIterator[httpx2.AsyncClient]:
    base = f"http://{address[0]}:{address[1]}"
    async with httpx2.AsyncClient(base_url=base, timeout=LIMIT_S, trust_env=False) as client:
        yield client


async def test_port_0_returns_a_free_port(address: tuple[str, int]) -> None:
    assert address[0] == "127.0.0.1"
    assert address[1] > 0


async def test_a_report_is_answered_with_the_current_time(
    client: httpx2.AsyncClient, agent: Agent
) -> None:
    answer = await client.post("/data-processed", content=GOOD)
    assert (answer.status_code, answer.json()) == (200, {"time": "2026-01-31T11:00:00.000500Z"})
    assert agent.reported == [datetime(2026, 1, 31, 12, tzinfo=UTC)]


@pytest.mark.parametrize("text", ["2026-01-31T14:00:00+02:00", "2026-01-31T12:00:00.0000009Z"])
async def test_a_report_may_have_any_zone_and_precision(
    client: httpx2.AsyncClient, agent: Agent, text: str
) -> None:
    assert (await client.post("/data-processed", json={"time": text, "more": 1})).is_success
    assert agent.reported == [datetime(2026, 1, 31, 12, tzinfo=UTC)]
    assert agent.reported[0].tzinfo is UTC


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b'{"time": "2026', "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 50_000, "not JSON"),
        (b"{}", 'no "time"'),
        (b"[]", 'no "time"'),
        (b'{"time": 1769860800}', 'no "time"'),
        (b'{"time": null}', 'no "time"'),
        (b'{"time": "yesterday"}', "yesterday"),
        (b'{"time": "2026-01-31"}', "2026-01-31"),
        (b'{"time": "2026-02-31T12:00:00Z"}', "2026-02-31"),
        (b'{"time": "0001-01-01T00:00:00"}', "never"),
    ],
)
async def test_an_invalid_report_is_refused_with_a_reason(
    client: httpx2.AsyncClient, agent: Agent, body: bytes, reason: str
) -> None:
    answer = await client.post("/data-processed", content=body)
    assert answer.status_code == 400
    (message,) = answer.json().values()
    assert reason in message
    assert "2026-01-31T12:00:00Z" in message
    assert message.endswith(".")
    assert agent.reported == []


async def test_status_is_the_callbacks_result(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/status")
    assert (answer.status_code, answer.json()) == (200, {"role": "Secondary", "epoch": None})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/data-processed", 405),
        ("DELETE", "/status", 405),
        ("GET", "/", 404),
        ("GET", "/status/", 404),
        ("GET", "/nothing%00", 404),
    ],
)
async def test_an_unknown_path_or_method_is_a_json_error(
    client: httpx2.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert ("/status" if status == 404 else "Allow") in answer.json()["error"]
    assert ("allow" in answer.headers) == (status == 405)


async def test_an_exception_is_answered_with_500_and_logged(
    client: httpx2.AsyncClient, agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    agent.reported.append(agent.in_force)
    answer = await client.get("/status")
    assert (answer.status_code, list(answer.json())) == (500, ["error"])
    assert "a fault of ours" in caplog.text


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [probe.MAX_BODY_BYTES + 1, 10 * probe.MAX_BODY_BYTES])
async def test_a_body_that_is_too_long_is_413(
    client: httpx2.AsyncClient, size: int, *, chunked: bool
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(0, size, 1000):
            yield b" " * 1000

    body = chunks() if chunked else b" " * size
    answer = await client.post("/data-processed", content=body)
    assert answer.status_code == 413
    assert str(probe.MAX_BODY_BYTES) in answer.json()["error"]
    assert (await client.post("/data-processed", content=GOOD)).is_success


async def test_a_body_of_the_longest_length_is_read(client: httpx2.AsyncClient) -> None:
    body = GOOD.ljust(probe.MAX_BODY_BYTES)
    assert (await client.post("/data-processed", content=body)).status_code == 200


async def read_to_the_end(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(LIMIT_S):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n",
        b"POST /data-processed HTTP/1.1\r\nHost: x\r\n",
        b"POST /data-processed HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
        b"POST /data-processed HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n{",
    ],
)
async def test_a_client_that_stalls_is_disconnected(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(probe, "REQUEST_S", 0.05)
    reader, writer = await asyncio.open_connection(*address)
    writer.write(sent)
    await read_to_the_end(reader)
    writer.close()


@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\nX: "])
async def test_a_head_without_end_is_disconnected(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(probe, "REQUEST_S", 1000)
    _, writer = await asyncio.open_connection(*address)
    writer.write(start)

    async def go_on() -> None:
        for _ in range(1000):
            writer.write(b"x" * 100_000)
            await writer.drain()

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(go_on(), LIMIT_S)
    writer.close()


async def test_connections_are_bounded_and_freed(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(probe, "REQUEST_S", 1000)
    held = [await asyncio.open_connection(*address) for _ in range(2)]
    reader, writer = await asyncio.open_connection(*address)
    assert await read_to_the_end(reader) == b""
    writer.close()
    for _, other in held:
        other.close()
    async with asyncio.timeout(LIMIT_S):
        answer = b""
        while not answer:  # until the server has noticed
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = await read_to_the_end(reader)
            writer.close()
    assert answer.startswith(b"HTTP/1.1 200 OK")


async def test_a_kept_connection_outlives_the_limit_of_one_request(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "REQUEST_S", 0.5)
    ports = set()
    for _ in range(12):
        answer = await client.get("/status")
        ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
        await asyncio.sleep(0.05)
    assert len(ports) == 1


async def test_a_request_that_is_not_http_is_refused(address: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"\x16\x03\x01\x02\r\n\r\n")
    assert (await read_to_the_end(reader)).startswith(b"HTTP/1.1 400 ")
    writer.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "no.such.host.invalid"])
async def test_an_address_that_cannot_be_used_is_refused(agent: Agent, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = ProbeServer(agent.report, agent.status)
        with pytest.raises(ConfigError, match=f"{host}:{port}") as caught:
            await server.start(host, port)
        assert caught.value.exit_code == ExitCode.LISTEN
        await server.stop()


async def test_stop_closes_the_port_and_open_connections(agent: Agent) -> None:
    server = ProbeServer(agent.report, agent.status)
    address = await server.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"POST /data-processed HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
    idle, idle_writer = await asyncio.open_connection(*address)
    await asyncio.wait_for(server.stop(), LIMIT_S)
    await server.stop()
    assert await read_to_the_end(reader) == b""
    assert await read_to_the_end(idle) == b""
    writer.close()
    idle_writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address)


async def test_the_access_log_is_off(
    client: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    assert (await client.get("/status")).is_success
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []


async def test_a_verdict_of_yes_is_200(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/fine")
    assert (answer.status_code, answer.json()) == (200, {"ok": True})
    assert answer.headers["cache-control"] == "no-store"


async def test_a_verdict_of_no_is_503_with_the_reason(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/not-fine")
    assert (answer.status_code, answer.json()) == (503, {"ok": False, "reason": "it is too late"})
    assert answer.headers["cache-control"] == "no-store"
    assert (await client.head("/not-fine")).status_code == 503


async def test_the_metrics_page_has_the_format_that_the_caller_accepts(
    client: httpx2.AsyncClient,
) -> None:
    answer = await client.get("/metrics", headers={"Accept": "this/form"})
    assert (answer.status_code, answer.content) == (200, b"as this/form")
    assert answer.headers["content-type"] == "text/anything; of=theirs"


async def test_without_metrics_the_page_is_404(agent: Agent) -> None:
    server = ProbeServer(agent.report, agent.status)
    host, port = await server.start("127.0.0.1", 0)
    async with httpx2.AsyncClient(timeout=LIMIT_S, trust_env=False) as client:
        assert (await client.get(f"http://{host}:{port}/metrics")).status_code == 404
    await server.stop()


async def test_at_most_one_metrics_page_is_built_per_turn_of_the_loop(
    client: httpx2.AsyncClient, agent: Agent
) -> None:
    """So that pages never add up to what would delay a heartbeat."""
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most, agent.pages_now = max(most, agent.pages_now), 0
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    answers = await asyncio.gather(*(client.get("/metrics") for _ in range(20)))
    watching.cancel()
    assert all(answer.is_success for answer in answers)
    assert most == 1
