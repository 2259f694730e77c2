"""Credentials, certificates and a proxy of real agents that change while they run: no role moves."""

import asyncio
import base64
import contextlib
import http.client
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from agent.coordinator.auth import hash_password
from tests.connect_proxy import Proxy, proxying
from tests.mosquitto import Authority

from .stage import PATIENCE_S, Agent, Coordinator, Stage, free_port, until

READ_AGAIN, NOT_CHANGED = "credentials read again", "credentials not changed"
TIMING = ("--failover-timeout=3", "--demote=0.5", "--margin=0.9")
LONG = ("--failover-timeout=10",)
"""The shortest lease with which a changed password costs no role, since it is tried every 3 s (docs/operations.md)."""


def write(path: Path, text: str | bytes) -> Path:
    """Replace a file that only we can read."""
    new = path.with_suffix(".new")
    new.touch(0o600)
    new.write_bytes(text if isinstance(text, bytes) else text.encode())
    return new.replace(path)


class Site:
    """A coordinator and two agents with TLS, a password, and probes with TLS and a password."""

    def __init__(self, stage: Stage, *flags: str, timing: tuple[str, ...] = TIMING) -> None:
        self.stage = stage
        self.timing = timing
        self.folder = stage.directory
        self.authorities = []
        for name in ("first", "second"):
            (self.folder / name).mkdir()
            self.authorities.append(Authority(self.folder / name))
        self.ca = write(self.folder / "agents-ca.pem", self.authorities[0].file.read_bytes())
        self.password = write(self.folder / "password", "one")
        self.users("one")
        self.certify(0)
        port = free_port()
        self.coordinator = stage.serve(
            f"--tls-certificate={self.folder / 'tls.crt'}",
            f"--tls-key={self.folder / 'tls.key'}",
            f"--users-file={self.folder / 'users'}",
            port=port,
        )
        self.coordinator.endpoint = f"https://127.0.0.1:{port}/api/v1/clientfailover"
        self.primary = self.agent("host-a", *flags)
        self.epoch = self.primary.until_role("Primary")["epoch"]
        self.other = self.agent("host-b", *flags)
        self.other.until_said("joined")

    def agent(self, name: str, *flags: str) -> Agent:
        return self.stage.run(
            name,
            self.coordinator,
            flags=[
                f"--ca-file={self.ca}",
                "--username=agent",
                f"--password-file={self.password}",
                *flags,
            ],
            timing=self.timing,
        )

    def users(self, password: str) -> None:
        write(self.folder / "users", f"agent:{hash_password(password)}\n")

    def certify(self, authority: int) -> None:
        for made, used in zip(
            self.authorities[authority].issue("coordinator"), ("tls.crt", "tls.key"), strict=True
        ):
            write(self.folder / used, made.read_bytes())

    def reload_coordinator(self) -> None:
        after = len(self.coordinator.said())
        self.coordinator.send(signal.SIGHUP)
        self.coordinator.until_said("configuration read again", after)

    def until_both(self, text: str, since: tuple[int, int]) -> None:
        for agent, after in zip((self.primary, self.other), since, strict=True):
            agent.until_said(text, after)

    @property
    def now(self) -> tuple[int, int]:
        return len(self.primary.said()), len(self.other.said())

    def check_nothing_moved(self) -> None:
        state = self.primary.state
        assert (state["role"], state["epoch"]) == ("Primary", self.epoch)
        assert self.other.state["role"] == "Secondary"
        for agent in (self.primary, self.other):
            assert "lease lost" not in agent.said()


def test_ca_and_server_certificate_change_at_both_ends_without_a_takeover(stage: Stage) -> None:
    site = Site(stage)
    both = site.authorities[0].file.read_bytes() + site.authorities[1].file.read_bytes()
    since = site.now
    write(site.ca, both)
    site.until_both(READ_AGAIN, since)  # on change of the file, without a signal
    site.certify(1)
    site.reload_coordinator()
    since = site.now
    write(site.ca, site.authorities[1].file.read_bytes())
    site.until_both(READ_AGAIN, since)
    since = site.now
    site.primary.send(signal.SIGHUP)
    site.other.send(signal.SIGHUP)
    site.until_both(READ_AGAIN, since)
    site.check_nothing_moved()
    assert not site.primary.lines(NOT_CHANGED)
    # What is in force now is the second authority alone: new connections need it.
    site.certify(0)
    site.reload_coordinator()
    since = site.now
    site.primary.send(signal.SIGHUP)
    site.primary.until_said(NOT_CHANGED, since[0])
    site.check_nothing_moved()


def test_a_wrong_file_is_one_line_and_the_role_stays_until_it_is_right(stage: Stage) -> None:
    site = Site(stage)
    good = site.ca.read_bytes()
    since = site.now
    site.ca.write_bytes(good[: len(good) // 2])
    site.until_both(NOT_CHANGED, since)
    for wrong in (b"", site.authorities[1].file.read_bytes()):  # nothing; one that does not trust
        site.ca.write_bytes(wrong)
        after = len(site.primary.said())
        site.primary.send(signal.SIGHUP)
        site.primary.until_said(NOT_CHANGED, after)
        site.check_nothing_moved()
    assert len(site.other.lines(NOT_CHANGED, after=since[1])) == 1
    since = site.now
    site.ca.write_bytes(good)
    site.until_both(READ_AGAIN, since)
    site.check_nothing_moved()


def test_a_password_changes_at_the_agents_and_then_at_the_coordinator(stage: Stage) -> None:
    """The former one is refused from the coordinator's reload on: the new one is tried until then."""
    site = Site(stage, timing=LONG)
    since = site.now
    write(site.password, "a newer password")
    site.until_both(NOT_CHANGED, since)
    site.check_nothing_moved()
    site.users("a newer password")
    site.reload_coordinator()
    site.until_both(READ_AGAIN, since)
    site.check_nothing_moved()
    assert "newer" not in site.primary.said()


# --- the probe


def ask_probe(
    url: str, path: str, authority: Authority, password: str | None, method: str = "GET"
) -> int:
    parts = urlsplit(url)
    trust = ssl.create_default_context(cafile=authority.file)
    connection = http.client.HTTPSConnection(
        "127.0.0.1", parts.port, timeout=PATIENCE_S, context=trust
    )
    with contextlib.closing(connection):
        headers = {}
        if password is not None:
            token = base64.b64encode(f"monitoring:{password}".encode()).decode()
            headers = {"Authorization": f"Basic {token}"}
        connection.request(method, path, headers=headers)
        return connection.getresponse().status


def test_a_probes_certificate_and_password_change_without_a_restart(
    stage: Stage, coordinator: Coordinator, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one, two = map(Authority, folders)
    certificate, key, password = (tmp_path / name for name in ("p.crt", "p.key", "p.password"))
    for made, used in zip(one.issue("probe"), (certificate, key), strict=True):
        write(used, made.read_bytes())
    write(password, "first")
    agent = stage.run(
        "host-a",
        coordinator,
        flags=[
            "--probe-listen=[::]:0",
            f"--probe-tls-certificate={certificate}",
            f"--probe-tls-key={key}",
            "--probe-username=monitoring",
            f"--probe-password-file={password}",
        ],
    )
    epoch = agent.until_role("Primary")["epoch"]
    assert "can be reached from other machines" not in agent.said()
    url = agent.state["probe"]
    assert url.startswith("https://[::]:")
    assert ask_probe(url, "/primary", one, None) == HTTPStatus.UNAUTHORIZED
    for method in ("GET", "OPTIONS"):
        assert ask_probe(url, "/primary", one, "first", method) == HTTPStatus.OK
    after = len(agent.said())
    write(password, "a newer one")
    for made, used in zip(two.issue("probe"), (certificate, key), strict=True):
        write(used, made.read_bytes())
    agent.until_said(READ_AGAIN, after)

    def replaced() -> bool:
        with contextlib.suppress(ssl.SSLError):
            return ask_probe(url, "/metrics", two, "a newer one") == HTTPStatus.OK
        return False

    until(replaced, "the new certificate and password")
    assert ask_probe(url, "/primary", two, "first") == HTTPStatus.UNAUTHORIZED
    assert (agent.state["role"], agent.state["epoch"]) == ("Primary", epoch)
    assert "newer" not in agent.said()


def test_a_probe_that_others_reach_without_both_is_warned_of(
    stage: Stage, coordinator: Coordinator
) -> None:
    agent = stage.run("host-a", coordinator, flags=["--probe-listen=0.0.0.0:0"])
    agent.until_said("probe can be reached from other machines")
    assert "without TLS and a password" in agent.said()


# --- a proxy


@pytest.fixture
def proxy(stage: Stage) -> Iterator[Proxy]:
    """A proxy that asks for a password, in a loop of its own."""
    proxy = Proxy(login="edge:a password of the proxy")
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with proxying(proxy):
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    started.wait(PATIENCE_S)
    yield proxy
    loop.call_soon_threadsafe(stop.set)
    thread.join(PATIENCE_S)
    loop.close()


def test_an_agent_is_primary_through_a_proxy_and_shows_no_password(
    stage: Stage, proxy: Proxy
) -> None:
    secret = write(stage.directory / "proxy-password", "a password of the proxy")
    flags = (
        f"--proxy=http://127.0.0.1:{proxy.port}",
        "--proxy-username=edge",
        f"--proxy-password-file={secret}",
        "--log-level=DEBUG",
    )
    site = Site(stage, *flags)
    port = urlsplit(site.coordinator.endpoint).port
    assert proxy.asked
    assert {line.split(" ")[1] for line in proxy.asked} == {f"127.0.0.1:{port}"}
    for agent in (site.primary, site.other):
        command = Path(f"/proc/{agent.popen.pid}/cmdline").read_text()
        for secret_form in (
            "password of the proxy",
            base64.b64encode(b"edge:a password of the proxy").decode(),
        ):
            assert secret_form not in agent.said() + command
    with socket.socket():  # a SIGHUP makes new connections, through the proxy too
        before, since = len(proxy.asked), site.now
        site.primary.send(signal.SIGHUP)
        site.primary.until_said(READ_AGAIN, since[0])
        until(lambda: len(proxy.asked) > before, "a new tunnel")
    site.check_nothing_moved()
