"""The probe server, over real sockets."""

import asyncio
import errno
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agent.drivers import probe
from agent.drivers.probe import ProbeServer
from agent.errors import ConfigError, ExitCode
from agent.ops.probe_access import ProbeAccess, load_probe_access, warn_of_exposure
from agent.schema.addresses import Address
from agent.schema.settings import AgentSettings
from tests.mosquitto import Authority
from tests.this_process import descriptors

LIMIT_S = 30
GOOD = b'{"time": "2026-01-31T12:00:00Z"}'


class Agent:
    """Stands for the daemon: the callbacks of a probe server, and what they have received."""

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
def limits() -> dict[str, float]:
    """The server's limits that are other ones than usual; a test replaces it by its parameter of this name."""
    return {}


@pytest.fixture
async def server(
    agent: Agent, limits: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ProbeServer]:
    bound(monkeypatch, limits)
    verdicts = {"fine": lambda: None, "not-fine": lambda: "it is too late"}
    server = ProbeServer(agent.report, agent.status, verdicts, agent.metrics)
    yield server
    await server.stop()


@pytest.fixture
async def address(server: ProbeServer) -> Address:
    return await server.start("127.0.0.1", 0)


def bound(monkeypatch: pytest.MonkeyPatch, limits: dict[str, float]) -> None:
    """Change limits of the servers that are made from now on."""
    changed: Any = limits  # by name
    monkeypatch.setattr(probe, "LIMITS", replace(probe.LIMITS, **changed))


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
        (b'{"time": "\\ud800"}', "\ud800"),
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


@pytest.mark.parametrize("limits", [{"request_s": 0.05}])
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n",
        b"POST /data-processed HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /data-processed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{",
        b"POST /data-processed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n{",
    ],
)
async def test_a_client_that_stalls_is_disconnected(address: tuple[str, int], sent: bytes) -> None:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(sent)
    await read_to_the_end(reader)
    writer.close()


@pytest.mark.parametrize("limits", [{"request_s": 1000}])
@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\nX: "])
async def test_a_head_without_end_is_disconnected(address: tuple[str, int], start: bytes) -> None:
    _, writer = await asyncio.open_connection(*address)
    writer.write(start)

    async def go_on() -> None:
        for _ in range(1000):
            writer.write(b"x" * 100_000)
            await writer.drain()

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(go_on(), LIMIT_S)
    writer.close()


@pytest.mark.parametrize("limits", [{"connections": 2, "request_s": 1000}])
async def test_clients_that_only_hold_connections_keep_nobody_out(
    address: tuple[str, int],
) -> None:
    before = descriptors()
    held = [await asyncio.open_connection(*address) for _ in range(5)]
    answer = await raw(
        address, b"GET /fine HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 200 OK")
    await until(lambda: descriptors() <= before + len(held) + 2)  # the server's ends of two
    for _, other in held:
        other.close()


@pytest.mark.parametrize("limits", [{"request_s": 0.5}])
async def test_a_kept_connection_outlives_the_limit_of_one_request(
    client: httpx2.AsyncClient,
) -> None:
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
    writer.write(b"POST /data-processed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
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
    assert [record for record in caplog.records if record.name.startswith("agent")] == []


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


# --- browsers


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example"},
        {"Host": "evil.example:80", "Origin": "http://evil.example:80"},
    ],
)
@pytest.mark.parametrize("path", ["/status", "/fine", "/metrics", "/nothing", "/data-processed"])
async def test_pages_of_other_sites_are_refused(
    client: httpx2.AsyncClient, agent: Agent, path: str, headers: dict[str, str]
) -> None:
    content = GOOD if path == "/data-processed" else None
    answer = await client.request(
        "POST" if content else "GET", path, content=content, headers=headers
    )
    assert (answer.status_code, list(answer.json())) == (403, ["error"])
    assert agent.reported == []


async def test_a_preflight_is_refused(client: httpx2.AsyncClient) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = await client.options("/data-processed", headers=asked)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "a/b"],
)
async def test_a_report_that_a_form_could_send_is_415(
    client: httpx2.AsyncClient, agent: Agent, content_type: str
) -> None:
    answer = await client.post(
        "/data-processed", content=GOOD, headers={"Content-Type": content_type}
    )
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]
    assert agent.reported == []


async def test_options_is_answered_as_get(client: httpx2.AsyncClient) -> None:
    """HAProxy's checks ask so, unless they are configured otherwise."""
    for path, status in [("/fine", 200), ("/not-fine", 503), ("/status", 200), ("/metrics", 200)]:
        asked, got = await client.options(path), await client.get(path)
        assert (asked.status_code, asked.content) == (status, got.content)


async def test_haproxys_default_check_without_a_host_is_answered(address: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"OPTIONS /fine HTTP/1.0\r\n\r\n")
    assert (await read_to_the_end(reader)).startswith(b"HTTP/1.1 200 OK")
    writer.close()


# --- bounds of what faces a network


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.01)


async def raw(address: tuple[str, int], sent: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(sent)
    answer = await read_to_the_end(reader)
    writer.close()
    return answer


async def test_an_unfinished_head_that_is_too_large_is_431_on_a_kept_connection_too(
    address: tuple[str, int],
) -> None:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
    first = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in first.lower().splitlines() if line.startswith(b"content-length"))
    await reader.readexactly(int(length.split()[1]))
    writer.write(b"GET /status HTTP/1.1\r\nX: " + b"x" * probe.LIMITS.head_bytes)
    assert (await read_to_the_end(reader)).startswith(b"HTTP/1.1 431 ")
    writer.close()


@pytest.mark.parametrize(
    "head",
    [
        b"".join(b"X-%d: 1\r\n" % n for n in range(probe.LIMITS.headers + 1)),
        b"X: " + b"x" * probe.LIMITS.head_bytes + b"\r\n",
    ],
)
async def test_a_head_that_is_too_large_is_431(address: tuple[str, int], head: bytes) -> None:
    answer = await raw(address, b"GET /fine HTTP/1.1\r\n" + head + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert str(probe.LIMITS.headers) in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


async def test_a_path_that_is_too_long_is_431(address: tuple[str, int]) -> None:
    sent = b"GET /" + b"x" * probe.LIMITS.head_bytes + b" HTTP/1.1\r\n\r\n"
    assert (await raw(address, sent)).startswith(b"HTTP/1.1 431 ")


async def test_the_most_headers_are_answered(client: httpx2.AsyncClient) -> None:
    own = 5  # what the client itself sends
    headers = {f"X-{n}": "1" for n in range(probe.LIMITS.headers - own)}
    assert (await client.get("/fine", headers=headers)).status_code == 200


async def test_requests_that_wait_for_others_are_bounded(address: tuple[str, int]) -> None:
    request = b"GET /fine HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = await raw(address, request * 50)
    assert 0 < answer.count(b"HTTP/1.1 ") <= probe.LIMITS.pipelined + 2


async def test_a_stranger_writes_nothing_into_the_log(
    address: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    assert (await raw(address, b"\x16\x03\x01\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
    assert caplog.records == []


# --- addresses


async def test_the_wildcard_of_ipv6_serves_ipv4_too(agent: Agent) -> None:
    server = ProbeServer(agent.report, agent.status)
    _, port = await server.start("::", 0)
    async with httpx2.AsyncClient(timeout=LIMIT_S, trust_env=False) as client:
        for host in ("127.0.0.1", "[::1]"):
            assert (await client.get(f"http://{host}:{port}/status")).is_success
    await server.stop()


async def test_a_name_is_served_at_all_its_addresses_on_one_port(agent: Agent) -> None:
    server = ProbeServer(agent.report, agent.status)
    _, port = await server.start("localhost", 0)
    for *_, place in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM):
        _, writer = await asyncio.open_connection(str(place[0]), port)
        writer.close()
    await server.stop()


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
async def test_ipv6_on_a_host_without_it_is_one_clear_error(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_: object) -> socket.socket:
        raise OSError(number, "no")

    monkeypatch.setattr("agent.ops.http_server.socket.socket", fails)
    server = ProbeServer(agent.report, agent.status)
    with pytest.raises(
        ConfigError, match=r"cannot use \[::\]:9170 .*no IPv6: use 0.0.0.0:9170"
    ) as caught:
        await server.start("::", 9170)
    assert caught.value.exit_code == ExitCode.LISTEN
    await server.stop()


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (
            socket.gaierror(socket.EAI_NONAME, "unknown to this resolver"),
            "unknown to this resolver",
        ),
        ([], "the name has no address"),
    ],
)
async def test_a_name_without_an_address_is_one_clear_error(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, found: Any, why: str
) -> None:
    async def look_up(*_: object, **__: object) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    server = ProbeServer(agent.report, agent.status)
    with pytest.raises(ConfigError, match=rf"cannot use host.test:0 \({why}\): choose another"):
        await server.start("host.test", 0)
    await server.stop()


# --- TLS and a password


def access(tmp_path: Path, authority: Authority, name: str, password: str) -> ProbeAccess:
    certificate, key = authority.issue(name)
    secret = tmp_path / "password"
    secret.touch(0o600)
    secret.write_text(f"{password}\n")
    return load_probe_access(
        AgentSettings(
            probe_tls_certificate=certificate,
            probe_tls_key=key,
            probe_username="monitoring",
            probe_password_file=secret,
        )
    )


@asynccontextmanager
async def secured(agent: Agent, access: ProbeAccess) -> AsyncIterator[tuple[ProbeServer, int]]:
    server = ProbeServer(agent.report, agent.status, {"fine": lambda: None}, agent.metrics)
    server.use(access)
    _, port = await server.start("127.0.0.1", 0)
    yield server, port
    await server.stop()


async def test_with_tls_and_a_password_nothing_is_answered_without_both(
    agent: Agent, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    trust = ssl.create_default_context(cafile=authority.file)
    async with (
        secured(agent, access(tmp_path, authority, "one", "secret")) as (_, port),
        httpx2.AsyncClient(
            base_url=f"https://127.0.0.1:{port}", verify=trust, trust_env=False, timeout=LIMIT_S
        ) as client,
    ):
        for path in ("/fine", "/status", "/metrics", "/nothing"):
            for auth in (None, ("monitoring", "wrong"), ("root", "secret"), ("monitoring", "")):
                answer = await client.get(path, auth=auth)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"].startswith("Basic ")
            answer = await client.get(path, auth=("monitoring", "secret"))
            assert answer.status_code == (404 if path == "/nothing" else 200)
        assert (await client.post("/data-processed", content=GOOD)).status_code == 401
        assert agent.reported == []
        odd = {"Authorization": "Bearer bW9uaXRvcmluZzpzZWNyZXQ="}
        assert (await client.get("/fine", headers=odd)).status_code == 401
        with pytest.raises(httpx2.HTTPError):
            await client.get(f"http://127.0.0.1:{port}/fine")
    assert "bW9uaXRvcmluZzpzZWNyZXQ" not in repr(access(tmp_path, authority, "two", "secret"))


async def test_other_access_is_for_new_connections_and_every_request(
    agent: Agent, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    trust = ssl.create_default_context(cafile=authority.file)
    async with (
        secured(agent, access(tmp_path, authority, "one", "first")) as (server, port),
        httpx2.AsyncClient(verify=trust, trust_env=False, timeout=LIMIT_S) as client,
    ):
        url = f"https://127.0.0.1:{port}/fine"
        first = await client.get(url, auth=("monitoring", "first"))
        server.use(access(tmp_path, authority, "two", "second"))
        second = await client.get(url, auth=("monitoring", "first"))
        assert (first.status_code, second.status_code) == (200, 401)
        streams = [one.extensions["network_stream"] for one in (first, second)]
        assert streams[0].get_extra_info("client_addr") == streams[1].get_extra_info("client_addr")
        with socket.create_connection(("127.0.0.1", port)) as plain:
            plain.setblocking(True)
            peer = await asyncio.to_thread(certificate_of, plain, trust)
        assert "two" in str(peer)


def certificate_of(plain: socket.socket, trust: ssl.SSLContext) -> object:
    with trust.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped:
        return wrapped.getpeercert()


async def test_unfinished_handshakes_count_as_connections_and_end(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = access(tmp_path, Authority(tmp_path), "one", "p")
    bound(monkeypatch, {"connections": 2, "request_s": 0.5})
    async with secured(agent, given) as (_, port):
        before = descriptors()
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await until(lambda: descriptors() == before + 4)  # both ends of two
        held.append(await asyncio.open_connection("127.0.0.1", port))
        assert await read_to_the_end(held[0][0]) == b""  # the oldest is closed at once
        await until(lambda: descriptors() == before + 5)  # and the client's end of the oldest
        for reader, writer in held:
            await read_to_the_end(reader)
            writer.close()
        await until(lambda: descriptors() == before)


def test_only_a_probe_that_others_reach_is_warned_of() -> None:
    everywhere = Address("0.0.0.0", 9170)
    login: dict[str, Any] = {"probe_username": "u", "probe_password_file": Path("p")}
    tls: dict[str, Any] = {"probe_tls_certificate": Path("c"), "probe_tls_key": Path("k")}
    assert "without TLS and a password" in str(
        warn_of_exposure(AgentSettings(probe_listen=everywhere))
    )
    assert "unencrypted" in str(warn_of_exposure(AgentSettings(probe_listen=everywhere, **login)))
    for fine in (
        AgentSettings(),
        AgentSettings(probe_listen=None),
        AgentSettings(probe_listen=everywhere, **tls),
        AgentSettings(probe_listen=everywhere, **tls, **login),
    ):
        assert warn_of_exposure(fine) is None
