"""The coordinator as a process: how it starts, stops, dies and comes back."""

import asyncio
import itertools
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx2
import pytest

from agent.coordinator.server import serving
from agent.errors import ConfigError, ExitCode
from agent.schema.addresses import Address
from agent.schema.coordinator_settings import CoordinatorSettings

from .conftest import Process

pytestmark = pytest.mark.long

Serve = Callable[..., Process]
ROUNDS = 5


def client(url: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        base_url=f"{url}/api/v1/clientfailover/", trust_env=False, timeout=httpx2.Timeout(20)
    )


async def test_the_start_is_logged_with_address_and_number_of_groups(serve: Serve) -> None:
    process = serve()
    log = "".join(process.lines)
    assert "coordinator started store=sqlite data_dir=" in log
    assert "groups=0" in log
    async with client(process.url) as http:
        assert (await http.get(f"{process.url}/readyz")).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_in_order(serve: Serve, number: int) -> None:
    """Waiting readers are answered, what was answered is on disk, and the exit code is 0."""
    process = serve()
    async with client(process.url) as http:
        await http.post("groups", json={"Id": "g", "FailoverTimeout": "00:00:02"})
        query = "after=1&wait=00:01:00"
        reading = asyncio.create_task(http.get("groups/g/status", params=query))
        while reading.done() or (await http.get("groups/g/status")).status_code != 200:
            pass
        process.process.send_signal(number)
        assert (await reading).status_code in {200, 503}
    code, log = await asyncio.to_thread(process.end)
    assert code == 0
    assert "coordinator stopped" in log
    assert "Traceback" not in log
    async with client(serve().url) as http:
        assert (await http.get("groups/g")).status_code == 200


def test_a_taken_port_is_one_sentence_and_its_exit_code(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "agent", "serve", "--listen", address]
        command += ["--data-dir", str(tmp_path / "data")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.LISTEN
    assert address in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_data_directory_in_use_is_its_exit_code(serve: Serve, tmp_path: Path) -> None:
    serve()
    command = [sys.executable, "-m", "agent", "serve", "--listen", "127.0.0.1:0"]
    command += ["--data-dir", str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.DATA_DIR_LOCKED
    assert "Traceback" not in done.stderr


async def test_a_wrong_certificate_is_refused_before_anything_starts(tmp_path: Path) -> None:
    wrong = tmp_path / "tls.pem"
    wrong.write_text("no certificate")
    wrong.chmod(0o600)
    settings = CoordinatorSettings(
        listen=Address("127.0.0.1", 0),
        data_dir=tmp_path / "data",
        tls_certificate=wrong,
        tls_key=wrong,
    )
    with pytest.raises(ConfigError, match="tls_certificate"):
        async with serving(settings):
            pass
    assert not (tmp_path / "data").exists()


async def test_the_coordinator_serves_over_tls(tmp_path: Path) -> None:
    pair = tmp_path / "tls.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-subj", "/CN=localhost", "-days", "2", "-keyout", str(pair)]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(tmp_path / "crt.pem")]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    settings = CoordinatorSettings(
        listen=Address("127.0.0.1", 0),
        store="memory",
        tls_certificate=tmp_path / "crt.pem",
        tls_key=pair,
    )
    trust = ssl.create_default_context(cafile=tmp_path / "crt.pem")
    async with serving(settings) as url, httpx2.AsyncClient(verify=trust, trust_env=False) as http:
        assert url.startswith("https://")
        assert (await http.get(f"{url}/healthz")).status_code == 200


@dataclass
class Answered:
    """What a coordinator has told, of one group."""

    sessions: set[str] = field(default_factory=set)
    epoch: int = 0
    holder: str | None = None
    overrides: dict[str, int] = field(default_factory=dict)
    overriding: str | None = None


async def use(
    http: httpx2.AsyncClient, group: str, known: dict[str, Answered], chance: random.Random
) -> None:
    """Be clients of one group until the coordinator dies; note what is answered, and only that."""
    answer = await http.post("groups", json={"Id": group, "FailoverTimeout": "00:00:05"})
    assert answer.status_code == 201
    told = known[group] = Answered()
    for session in ("a", "b"):
        path = f"groups/{group}/clientsessions"
        assert (await http.post(path, json={"Id": session})).status_code == 201
        told.sessions.add(session)
        for _ in range(2):
            beat = await http.post(f"{path}/{session}/heartbeat", json={"FailoverScore": 50})
            answer = beat.json()
            if beat.status_code == 200:
                told.epoch = max(told.epoch, answer["Epoch"])
                if answer["Role"] == 1:
                    told.holder = session
    told.overriding = chance.choice("ab")
    path = f"groups/{group}/clientsessions/{told.overriding}/roleoverride"
    answer = await http.post(path, json={"Value": 1})
    assert answer.status_code == 200
    told.overrides[told.overriding] = 1
    told.overriding = None


async def check(http: httpx2.AsyncClient, group: str, told: Answered) -> None:
    """All that was told is still there. What was asked and not answered may be there or not."""
    assert (await http.get(f"groups/{group}")).status_code == 200
    status = (await http.get(f"groups/{group}/status")).json()
    assert status["Epoch"] >= told.epoch
    if told.holder is not None:
        assert status["Primary"] == told.holder
        history = (await http.get(f"groups/{group}/history")).json()
        assert [entry["Epoch"] for entry in history] == list(range(status["Epoch"], 0, -1))
    sessions = (await http.get(f"groups/{group}/clientsessions")).json()
    assert told.sessions <= {session["Id"] for session in sessions}
    for session in sessions:
        if session["Id"] != told.overriding:
            assert session["RoleOverride"] == told.overrides.get(session["Id"], 0)


async def test_sigkill_loses_nothing_that_was_answered(serve: Serve) -> None:
    """At random moments, several times, in the middle of all kinds of changes."""
    chance = random.Random(4)
    known: dict[str, Answered] = {}
    numbers = itertools.count()
    for _ in range(ROUNDS):
        process = serve()
        seen = dict(known)
        async with client(process.url) as http:
            await asyncio.gather(*(check(http, group, told) for group, told in seen.items()))

            async def some(http: httpx2.AsyncClient = http) -> None:
                while True:
                    await use(http, f"g{next(numbers)}", known, chance)

            users = [asyncio.create_task(some()) for _ in range(4)]
            wanted = len(known) + chance.randrange(2, 8)
            while len(known) < wanted:  # noqa: ASYNC110 - an event here would set the moment
                await asyncio.sleep(0.001)
            await asyncio.sleep(chance.random() * 0.02)
            process.process.kill()
            results = await asyncio.gather(*users, return_exceptions=True)
            assert all(isinstance(result, httpx2.TransportError) for result in results), results
        await asyncio.to_thread(process.end)
    async with client(serve().url) as http:
        await asyncio.gather(*(check(http, group, told) for group, told in known.items()))
    assert sum(told.holder is not None for told in known.values()) >= ROUNDS


async def test_after_sigkill_the_holder_keeps_its_role_for_one_lease(serve: Serve) -> None:
    """R14: without a heartbeat, for a full L from the restart, and not for longer."""
    lease_s = 1.0
    process = serve()
    async with client(process.url) as http:
        await http.post("groups", json={"Id": "g", "FailoverTimeout": "00:00:01"})
        await http.post("groups/g/clientsessions", json={"Id": "a"})
        for _ in range(2):
            await http.post("groups/g/clientsessions/a/heartbeat", json={"FailoverScore": 50})
    process.process.kill()
    await asyncio.to_thread(process.end)
    before = time.monotonic()
    again = serve()
    async with client(again.url) as http:
        status = (await http.get("groups/g/status")).json()
        assert status["Primary"] == "a"
        query = {"after": status["Revision"], "wait": "00:00:30"}
        status = (await http.get("groups/g/status", params=query)).json()
        took_s = time.monotonic() - before
    assert "Primary" not in status
    assert status["PreviousPrimary"] == "a"
    assert lease_s <= took_s < lease_s + 15


async def test_the_date_is_of_the_moment_of_the_answer() -> None:
    """Agents compare their clocks with it: one that a timer renews is up to a second old."""
    settings = CoordinatorSettings(listen=Address("127.0.0.1", 0), store="memory")
    async with serving(settings) as url, httpx2.AsyncClient(trust_env=False) as http:
        for _ in range(60):
            before = int(time.time())
            answer = await http.get(f"{url}/healthz")
            dates = answer.headers.get_list("date")
            assert len(dates) == 1
            date = parsedate_to_datetime(dates[0]).timestamp()
            assert before <= date <= time.time()
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_a_restart_within_the_quiet_time_promotes_nobody_early(
    serve: Serve, end: int
) -> None:
    """Fault 4: the data are older than the group, and somebody may hold a lease of L."""
    lease_s = 4.0
    process = serve()
    async with client(process.url) as http:
        await http.post("groups", json={"Id": "g", "FailoverTimeout": "00:00:04"})
        await http.post("groups/g/clientsessions", json={"Id": "a"})
        path = "groups/g/clientsessions/a/heartbeat"
        store_id = (await http.get("groups/g/status")).json()["StoreId"]
        learned_at = time.monotonic()
        body = {"FailoverScore": 100, "Instance": "a1", "Epoch": 7}
        assert (await http.post(path, json=body)).json()["Role"] != 1
    process.process.send_signal(end)
    await asyncio.to_thread(process.end)
    process = serve()
    restarted_at = time.monotonic()
    assert restarted_at < learned_at + lease_s, "too slow to show anything"
    async with client(process.url) as http:
        while (answer := (await http.post(path, json=body)).json()).get("Role") != 1:
            assert time.monotonic() < restarted_at + 5 * lease_s
            await asyncio.sleep(0.25)
    assert time.monotonic() > learned_at + lease_s
    assert (answer["Epoch"], answer["StoreId"]) == (8, store_id)


PAGE = {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:5470"},
        {"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
async def test_pages_of_other_sites_get_403_and_change_nothing(headers: dict[str, str]) -> None:
    group = {"Id": "g", "FailoverTimeout": "00:00:02"}
    settings = CoordinatorSettings(store="memory", listen=Address("127.0.0.1", 0))
    async with serving(settings) as url, client(url) as http:
        for method, path in [
            ("POST", "groups"),
            ("GET", "groups"),
            ("GET", f"{url}/"),
            ("GET", f"{url}/metrics"),
            ("GET", f"{url}/nothing"),
            ("OPTIONS", "groups"),
        ]:
            body = group if method == "POST" else None
            answer = await http.request(method, path, json=body, headers=headers)
            assert (answer.status_code, answer.json()["Error"]) == (403, "Forbidden")
            assert answer.json()["OperationId"] == answer.headers["operation-id"]
        asked = {**headers, "Access-Control-Request-Method": "POST"}
        answer = await http.options("groups", headers=asked)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert (await http.get("groups")).json() == []


async def test_the_services_own_pages_and_links_to_its_front_page_work() -> None:
    settings = CoordinatorSettings(
        store="memory", listen=Address("127.0.0.1", 0), host_names=("proxy.example",)
    )
    async with serving(settings) as url, client(url) as http:
        assert (await http.get(f"{url}/", headers=PAGE)).status_code == 200
        link = PAGE | {"Sec-Fetch-Site": "cross-site"}
        assert (await http.get(f"{url}/", headers=link)).status_code == 200
        assert (await http.get(f"{url}/openapi.json", headers=link)).status_code == 403
        own = {"Origin": url, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
        assert (await http.get("groups", headers=own)).status_code == 200
        assert (await http.get("groups", headers={"Host": "proxy.example"})).status_code == 200
        assert (await http.options("groups")).status_code == 204
