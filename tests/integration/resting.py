"""Agents at rest, L = 10 s: a plain one and one with every feature, and what each costs.

Owns how they are set up and how their cost is read from /proc. Knows nothing of what is right.
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from agent.coordinator.auth import hash_password
from tests.integration.stage import Coordinator, Stage, environment, free_port, until
from tests.mosquitto import Authority, Broker

SCRAPE_S = 5.0
"""The interval of config/prometheus/prometheus.yml."""

WATCHDOG_S = 20
"""As in the systemd unit."""

PASSWORD, WEBHOOK_SECRET = "a password of the test", "what webhooks are signed with"

PROCESSED = "processed"
"""The topic from which ``everything`` reads its data-processed time."""

ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """Of one process: resident MiB, and CPU seconds since its start.

    Attributes:
        peak_mib: the most that was resident since its start, or since ``forget_peak``.
        cpu_s: of all its threads, to the nanosecond; those that have ended count.
        children_s: CPU seconds of the children that it has waited for: hooks and exec checks. The
            kernel tells these in steps of 10 ms.
    """

    resident_mib: float
    peak_mib: float
    cpu_s: float
    children_s: float


def cost(pid: int) -> Cost:
    """What the process has cost so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children_s = sum(map(int, stat[13:15])) / TICKS_PER_S
    resident, peak = (int(status[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    return Cost(resident, peak, time.clock_gettime(cpu_clock(pid)), children_s)


def cpu_clock(pid: int) -> int:
    """The clock of a process's CPU time, as clock_getcpuclockid(3) makes it on Linux.

    /proc/PID/schedstat would be of the main thread alone, and /proc/PID/stat is in steps of 10 ms: a
    thirtieth of what an agent uses in a minute.
    """
    return ~pid << 3 | 2


def forget_peak(pid: int) -> None:
    """Let ``Cost.peak_mib`` begin anew, at what is resident now; proc(5), clear_refs."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class Notified:
    """The socket that systemd would listen at. ``ready_s`` is from the making of it to READY=1."""

    def __init__(self, path: Path) -> None:
        self._began = time.monotonic()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.path = path
        self.ready_s: float | None = None
        self.beats = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while (message := self._socket.recv(4096)) != b"end":
            if b"READY=1" in message and self.ready_s is None:
                self.ready_s = time.monotonic() - self._began
            self.beats += b"WATCHDOG=1" in message
        self._socket.close()

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            to.sendto(b"end", str(self.path))


@dataclass
class Resting:
    """One agent that has joined."""

    process: subprocess.Popen[bytes]
    notified: Notified
    log: Path
    state_file: Path
    _connection: http.client.HTTPConnection | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def guard(self) -> int:
        """The guard's process."""
        found = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return next(int(pid) for pid in found if b"failover-agent guard" in command_line(int(pid)))

    @property
    def state(self) -> dict[str, Any]:
        return dict(json.loads(self.state_file.read_text()))

    def ask(self, path: str) -> str:
        """Request a path of the probe over one kept-alive connection, with the headers that Prometheus sends."""
        if self._connection is None:
            host, _, port = self.state["probe"].removeprefix("http://").partition(":")
            self._connection = http.client.HTTPConnection(host, int(port), timeout=10)
        self._connection.request("GET", f"/{path}", headers={"Accept": ACCEPT})
        return self._connection.getresponse().read().decode()

    def disconnect(self) -> None:
        """Close the scraper's connection."""
        if self._connection is not None:
            self._connection.close()

    def rest(self, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Let it rest, scraped every SCRAPE_S; ``meanwhile`` is done as often."""
        end_at = time.monotonic() + seconds
        while (left_s := end_at - time.monotonic()) > 0:
            assert self.process.poll() is None, self.log.read_text()
            self.ask("metrics")
            meanwhile()
            time.sleep(min(SCRAPE_S, left_s))


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@contextmanager
def resting(stage: Stage, name: str, words: list[str], **variables: str) -> Iterator[Resting]:
    """An agent with these words, until it has told systemd that it is ready."""
    folder = stage.directory / name
    folder.mkdir()
    notified = Notified(folder / "notify")
    state_file, log = folder / "state.json", folder / "log"
    variables |= {"NOTIFY_SOCKET": str(notified.path), "WATCHDOG_USEC": str(WATCHDOG_S * 10**6)}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "agent", "run", f"--state-file={state_file}", *words],
            cwd=folder,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stderr=file,
        )
    agent = Resting(process, notified, log, state_file)
    try:

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            return notified.ready_s is not None

        until(ready, f"{name} to be ready")
        yield agent
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()  # its guard demotes, and ends
            process.wait()
            raise
        finally:
            notified.close()
            agent.disconnect()


def plain(stage: Stage, coordinator: Coordinator, session: str = "plain") -> list[str]:
    """An agent as the README starts it: probe, guard, state file and two hooks."""
    return [
        f"--endpoint={coordinator.endpoint}",
        f"--group={coordinator.group}",
        f"--session-id={session}",
        "--hook-primary=/bin/true",
        "--hook-secondary=/bin/true",
    ]


def failsafe(stage: Stage, coordinator: Coordinator) -> list[str]:
    """A plain agent, in a group of its own, that other members could ask."""
    secret = stage.directory / "failsafe-secret"
    secret.touch(0o600)
    secret.write_text("a secret of the whole group\n")
    return [
        *plain(stage, replace(coordinator, group="failsafe"), "failsafe"),
        f"--failsafe-listen=127.0.0.1:{free_port()}",
        f"--failsafe-secret-file={secret}",
    ]


class _Page(BaseHTTPRequestHandler):
    """An exporter of the workload: its health and its metrics are the same page."""

    def do_GET(self) -> None:
        body = f"up 1\nprocessed_seconds {time.time():.3f}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def exporter(stage: Stage) -> str:
    """The address of a small exporter, until the end of the stage."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stage.later(server.server_close)
    stage.later(server.shutdown)
    return f"http://127.0.0.1:{server.server_address[1]}"


def secure_coordinator(stage: Stage, authority: Authority, *more: str) -> Coordinator:
    """A coordinator with TLS, and with one user ``agent`` whose password is PASSWORD."""
    certificate, key = authority.issue("coordinator")
    users = secret_file(stage, "users", f"agent:{hash_password(PASSWORD)}")
    port = free_port()
    flags = [f"--tls-certificate={certificate}", f"--tls-key={key}", f"--users-file={users}"]
    serving = stage.serve(*flags, *more, port=port)
    serving.endpoint = f"https://127.0.0.1:{port}/api/v1/clientfailover"
    return serving


def everything(
    stage: Stage, coordinator: Coordinator, authority: Authority, broker: Broker
) -> list[str]:
    """TLS with a password, announcements and progress by MQTT with TLS, six checks, webhooks, JSON."""
    page = exporter(stage)
    password = secret_file(stage, "agent-password", PASSWORD)
    webhook = secret_file(stage, "webhook-secret", WEBHOOK_SECRET)
    last = stage.directory / "last"
    last.touch()
    broker_table = broker.table()
    config = stage.directory / "everything.toml"
    checks: list[dict[str, Any]] = [
        {"type": "exec", "command": ["/bin/true"]},
        {"type": "http", "url": page},
        {"type": "tcp", "address": page.removeprefix("http://")},
        {"type": "file_age", "path": str(last), "max_age": 86_400},
        {"type": "process", "process": Path(sys.executable).resolve().name[:15]},
        {"type": "prometheus", "url": page, "metric": "up", "op": "==", "value": 1},
    ]
    lines = ["[mqtt]", *pairs(broker_table)]
    progress = {k: v for k, v in broker_table.items() if k != "key"}
    if "key" in broker_table:  # a source has certificate and key in one file
        both = stage.directory / "both.pem"
        both.touch(0o600)
        parts = [Path(broker_table[name]).read_text() for name in ("certificate", "key")]
        both.write_text("".join(parts))
        progress["certificate"] = str(both)
    lines += ["[progress]", *pairs({"type": "mqtt", "topic": PROCESSED, **progress})]
    for check in checks:
        lines += ["[[check]]", *pairs({"name": check["type"], **check})]
    config.write_text("\n".join([*lines, ""]))
    return [
        *plain(stage, coordinator, "everything"),
        f"--config={config}",
        "--log-format=json",
        "--username=agent",
        f"--password-file={password}",
        f"--ca-file={authority.file}",
        f"--webhook-secret-file={webhook}",
        f"--hook-joined={page}/joined",
        f"--hook-lost={page}/lost",
        f"--hook-left={page}/left",
    ]


def secret_file(stage: Stage, name: str, secret: str) -> Path:
    """A file that only this user can read."""
    path = stage.directory / name
    path.touch(0o600)
    path.write_text(f"{secret}\n")
    return path


def pairs(table: dict[str, Any]) -> list[str]:
    """The lines of a table in TOML, whose strings and lists look as in JSON."""
    return [f"{key} = {json.dumps(value)}" for key, value in table.items()]
