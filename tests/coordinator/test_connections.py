"""Floods of connections, and what stays in memory of callers that are not known: raw sockets, real processes."""

import asyncio
import base64
import contextlib
import gc
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from agent.coordinator import api, listener, routes
from agent.coordinator.api import Api
from agent.coordinator.auth import Authenticator, hash_password
from agent.coordinator.connection import Connection
from agent.coordinator.metrics import Metrics
from agent.coordinator.route_table import ROUTES
from agent.coordinator.server import serving
from agent.coordinator.service import Coordinator
from agent.errors import ExitCode
from agent.ops.clock import Clock
from agent.schema.addresses import Address
from agent.schema.coordinator_settings import CoordinatorSettings
from tests.declarations import load

from .conftest import Process, Stage
from .raw import BASE, HEALTH, TIMES, Raw, ask, connections, crowd, program, resident, until

pytestmark = pytest.mark.long

Serve = Callable[..., Process]
MIB = 1 << 20
LIMIT = 10
GROUP = {"Id": "g", "FailoverTimeout": "00:00:10"}
BASIC = f"Authorization: Basic {base64.b64encode(b'agents:secret').decode()}\r\n"


# -- limits ---------------------------------------------------------------------------------------


def test_an_address_that_has_all_its_connections_gets_an_error_and_health(serve: Serve) -> None:
    process = serve("--max-connections-per-address", str(LIMIT))
    with crowd(process.url, LIMIT) as used:
        for one in used:
            one.request("GET", f"{BASE}/groups").answer()
        with Raw(process.url) as further:
            answer = further.request("GET", f"{BASE}/groups").answer()
            assert (answer.status, answer.error()["Error"]) == (503, "Unavailable")
            assert "max_connections_per_address" in answer.error()["Resolution"]
            assert int(answer.headers["retry-after"]) >= 1
            assert further.closed()
        with Raw(process.url) as further:
            assert further.send(HEALTH).answer().status == 200
            assert further.closed()
        with Raw(process.url, source="127.0.0.2") as elsewhere:
            assert elsewhere.request("GET", f"{BASE}/groups").answer().status == 200
        used[0].socket.close()
        until(lambda: ask(process.url, f"{BASE}/groups").status == 200)
        for one in used[1:]:
            assert one.request("GET", f"{BASE}/groups").answer().status == 200
    page = ask(process.url, "/metrics").body
    assert b'connections_ended_total{reason="address_limit"} ' in page
    assert b'connections_ended_total{reason="address_limit"} 0.0' not in page


def test_silent_connections_make_room_for_others_of_their_address(serve: Serve) -> None:
    process = serve("--max-connections-per-address", str(LIMIT))
    with Raw(process.url) as agent:
        agent.request("GET", f"{BASE}/groups").answer()
        with crowd(process.url, 3 * LIMIT):
            assert ask(process.url, f"{BASE}/groups").status == 200
            assert agent.request("GET", f"{BASE}/groups").answer().status == 200
            until(lambda: connections(process.process.pid) < 2 * LIMIT)


def test_a_flood_from_many_addresses_does_not_touch_who_has_authenticated(
    serve: Serve, tmp_path: Path
) -> None:
    """And a new agent finds room in the middle of it."""
    users = tmp_path / "users"
    users.write_text(f"agents:{hash_password('secret')}\n")
    users.chmod(0o600)
    process = serve("--users-file", str(users), program=program(MOST_CONNECTIONS=70, HEAD_S=60.0))
    ended = threading.Event()

    def flood() -> None:
        kept: list[Raw] = []
        while not ended.is_set():
            for number in range(2, 20):
                with contextlib.suppress(OSError):
                    kept.append(Raw(process.url, source=f"127.0.0.{number}").send(b"GET "))
            for one in kept[:-100]:
                one.socket.close()
            del kept[:-100]
            time.sleep(0.01)
        for one in kept:
            one.socket.close()

    thread = threading.Thread(target=flood)
    with crowd(process.url, 5) as agents:
        for one in agents:
            assert one.request("GET", f"{BASE}/groups", headers=BASIC).answer().status == 200
        thread.start()
        try:
            until(lambda: "why=evicted" in "".join(process.lines))
            for _ in range(20):
                for one in agents:
                    answer = one.request("GET", f"{BASE}/groups", headers=BASIC).answer()
                    assert answer.status == 200
            assert ask(process.url, f"{BASE}/groups", headers=BASIC).status == 200
            assert ask(process.url).status == 200
        finally:
            ended.set()
            thread.join()


def test_connections_of_all_addresses_have_a_limit_too(serve: Serve) -> None:
    process = serve(program=program(MOST_CONNECTIONS=70))
    with crowd(process.url, 70) as used:
        for one in used:
            one.request("GET", f"{BASE}/groups").answer()
        with Raw(process.url, source="127.0.0.2") as further:
            answer = further.request("GET", f"{BASE}/groups").answer()
            assert (answer.status, answer.error()["Error"]) == (503, "Unavailable")
            assert "limit of open files" in answer.error()["Resolution"]
        assert ask(process.url).status == 200


def test_wrong_credentials_do_not_authenticate_a_connection(serve: Serve, tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(f"agents:{hash_password('secret')}\n")
    users.chmod(0o600)
    process = serve("--users-file", str(users))
    with Raw(process.url) as known, Raw(process.url) as wrong:
        known.request("GET", f"{BASE}/groups", headers=BASIC).answer()
        assert wrong.request("GET", f"{BASE}/groups").answer().status == 401
        assert wrong.request("GET", "/metrics").answer().status == 200
        page = known.request("GET", "/metrics").answer().body
        assert b'failover_coordinator_connections{authenticated="true"} 1.0' in page
        assert b'failover_coordinator_connections{authenticated="false"} 1.0' in page


def test_handshakes_count_before_they_are_done(serve: Serve, tmp_path: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-subj", "/CN=localhost", "-days", "2", "-keyout", str(tmp_path / "key")]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(tmp_path / "crt")]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "key").chmod(0o600)
    tls = ("--tls-certificate", str(tmp_path / "crt"), "--tls-key", str(tmp_path / "key"))
    process = serve(*tls, "--max-connections-per-address", str(LIMIT))
    with crowd(process.url, 5 * LIMIT) as shaking:
        for one in shaking:
            with contextlib.suppress(OSError):
                one.send(b"\x16\x03\x01")
        assert ask(process.url, trust=tmp_path / "crt").status == 200
        until(lambda: connections(process.process.pid) < 2 * LIMIT)


def test_a_thousand_silent_connections_delay_nobody_and_end(serve: Serve) -> None:
    process = serve(program=program())
    pid = process.process.pid
    before, open_before = resident(pid), connections(pid)
    with crowd(process.url, 1000):
        assert ask(process.url).status == 200
        assert resident(pid) - before < 40 * MIB
        until(lambda: connections(pid) <= open_before, TIMES["HEAD_S"] + 10)


async def test_a_connection_that_ended_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the help of the garbage collector, whose full collections are rare here."""
    seen: list[weakref.ref[Connection]] = []

    class Watched(Connection):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            seen.append(weakref.ref(self))

    monkeypatch.setattr(listener, "Connection", Watched)
    settings = CoordinatorSettings(listen=Address("127.0.0.1", 0), store="memory")
    gc.collect()
    gc.disable()
    try:
        async with serving(settings) as url:
            port = int(url.rpartition(":")[2])
            for data in (b"", HEALTH, HEALTH + b"GE", b"garbage\r\n\r\n", HEALTH * 3):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(data)
                if data:
                    await reader.readuntil(b"\r\n\r\n")
                writer.close()
                await writer.wait_closed()
            async with httpx2.AsyncClient(base_url=url, trust_env=False) as http:
                await http.post(f"{BASE}/groups", json=GROUP)
                await http.get(f"{BASE}/groups/g/status")
            for _ in range(200):
                if len(seen) == 6 and all(ref() is None for ref in seen):
                    break
                await asyncio.sleep(0.01)
            left = [ref() for ref in seen if ref() is not None]
            assert len(seen) == 6
            assert not left, [gc.get_referrers(one) for one in left]
    finally:
        gc.enable()


def test_a_lack_of_descriptors_is_survived(serve: Serve) -> None:
    """The limit of open files is lower than that of connections: accepting pauses, and goes on."""
    process = serve(program=program(SPARE_FILES=-1000))
    subprocess.run(
        ["prlimit", f"--pid={process.process.pid}", "--nofile=40"], check=True, capture_output=True
    )
    with crowd(process.url, 100):
        until(lambda: "connections cannot be accepted" in "".join(process.lines))
    until(lambda: ask(process.url).status == 200)


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
def test_long_ids_in_paths_are_not_kept_in_memory(
    serve: Serve, tmp_path: Path, *, known: bool
) -> None:
    """12 KiB each, of callers with and without credentials."""
    users = tmp_path / "users"
    users.write_text(f"agents:{hash_password('secret')}\n")
    users.chmod(0o600)
    process = serve("--users-file", str(users))
    name = "%F0%9F%98%80" * 250
    with Raw(process.url) as one:
        for number in range(1000):
            tenant = f"/api/v1/tenants/{number}{name}/namespaces/{name}/clientfailover"
            path = f"{tenant}/groups/{name}/clientsessions/{name}"
            answer = one.request("GET", path, headers=BASIC if known else "").answer()
            assert answer.status == (404 if known else 401)
            if number == 100:
                before = resident(process.process.pid)
    assert resident(process.process.pid) - before < 8 * MIB


async def test_only_short_paths_of_the_known_are_remembered(
    monkeypatch: pytest.MonkeyPatch, stage: Stage
) -> None:
    remembered: list[bytes] = []

    class Recorded(routes.Router):
        def remember(self, raw_path: bytes, match: routes.PathMatch) -> None:
            super().remember(raw_path, match)
            if self.find(raw_path) is match:
                remembered.append(raw_path)

    monkeypatch.setattr(api, "Router", Recorded)
    app = Api(stage.coordinator, stage.clock)
    secured = Api(stage.coordinator, stage.clock, Authenticator({}))
    for one, known in ((app, ("g", "h", "i")), (secured, ())):
        remembered.clear()
        transport = httpx2.ASGITransport(app=one)
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as http:
            for path in ("/healthz", "/nothing", f"{BASE}/groups/{'x' * 257}"):
                await http.get(path)
            for group in ("g", "h", "i", "%C3%BC" * 60):
                await http.get(f"{BASE}/groups/{group}")
        groups = [f"{BASE}/groups/{group}".encode() for group in known]
        assert remembered == groups


def test_the_paths_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "PATHS_REMEMBERED", 2)
    router = routes.Router(ROUTES)
    paths = [f"{BASE}/groups/{group}".encode() for group in "ghi"]
    found = {path: router.find(path) for path in paths}
    for path, match in found.items():
        router.remember(path, match)
    assert [router.find(path) is match for path, match in found.items()] == [False, True, True]


# -- metrics and readiness ------------------------------------------------------------------------


async def test_many_scrapes_at_once_cost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    # the cost of a page is making it: this counts that
    make = Metrics._make_page

    async def counted(*args: object) -> tuple[bytes, str]:
        nonlocal made
        made += 1
        return await make(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Metrics, "_make_page", counted)
    settings = CoordinatorSettings(listen=Address("127.0.0.1", 0), store="memory")
    async with serving(settings) as url, httpx2.AsyncClient(base_url=url, trust_env=False) as http:
        answers = await asyncio.gather(*(http.get("/metrics") for _ in range(50)))
        assert {answer.status_code for answer in answers} == {200}
        assert made == 1


@pytest.mark.parametrize("version", ["1.x", "9" * 5000, "1.0.0\x80", "2"])
async def test_what_a_scraper_accepts_is_not_repeated(version: str) -> None:
    metrics = Metrics()
    coordinator = Coordinator(Stage().store, Clock().now)
    for kind in ("application/openmetrics-text", "text/plain"):
        _, media = await metrics.page(coordinator, Clock().now(), f"{kind}; version={version}")
        assert len(media) < 100
        assert version not in media or version == "2"


async def test_readiness_queries_the_store_once_for_all(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = 0
    access = stage.store.access

    async def counted(tenant: str, namespace: str) -> object:
        nonlocal queries
        queries += 1
        return await access(tenant, namespace)

    monkeypatch.setattr(stage.store, "access", counted)
    problems = await asyncio.gather(*(stage.coordinator.readiness_problem() for _ in range(50)))
    assert problems == [None] * 50
    assert queries == 1
    stage.coordinator.refuse_requests()
    assert await stage.coordinator.readiness_problem() == "the coordinator is stopping"


def metrics_url(process: Process) -> str:
    line = next(line for line in process.lines if "metrics listening" in line)
    return line.split("url=")[1].strip()


def test_metrics_have_a_listener_of_their_own(serve: Serve) -> None:
    process = serve("--metrics-listen", "127.0.0.1:0")
    url = metrics_url(process)
    for path in ("/metrics", "/healthz", "/readyz"):
        assert ask(url, path).status == 200
    for path in ("/", "/openapi.json", f"{BASE}/groups"):
        assert ask(url, path).error()["Error"] == "NotFound"
    assert ask(process.url, "/metrics").status == 404
    assert b"/metrics" not in ask(process.url, "/").body
    assert b'"/metrics":' not in ask(process.url, "/openapi.json").body
    for path in ("/healthz", "/readyz"):
        assert ask(process.url, path).status == 200
    with crowd(url, 50):
        assert ask(url, "/metrics").status == 200
    process.process.terminate()
    code, log = process.end()
    assert code == 0
    assert "Traceback" not in log


def test_a_taken_port_for_metrics_is_one_sentence_and_its_exit_code(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "agent", "serve", "--listen", "127.0.0.1:0"]
        command += ["--metrics-listen", address, "--data-dir", str(tmp_path / "data")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.LISTEN
    assert f"cannot listen on {address}" in done.stderr
    assert "--metrics-listen HOST:PORT" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('metrics_listen = "nonsense"', "metrics_listen"),
        ('listen = "127.0.0.1:1"\nmetrics_listen = "127.0.0.1:1"', "choose another port"),
        ("max_connections_per_address = 0", "max_connections_per_address"),
    ],
)
def test_a_wrong_value_is_one_clear_error(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text(text)
    with pytest.raises(Exception, match=reason) as caught:
        load(CoordinatorSettings, path=path)
    assert getattr(caught.value, "exit_code", None) == ExitCode.CONFIG_VALUE
