r"""What a group, a session and a connection cost a coordinator: memory, store, and the time of a start. A script, not a test.

    .venv/bin/python -m tests.bench.memory_per_session [--groups 20000] [--store sqlite|memory|etcd]

A real coordinator on a fresh store. It gets groups of one session and then as many of three; each session sends a
heartbeat with a LastDataProcessedTime, so every group has a primary. Memory is VmRSS after each stage: the difference of the stages gives that of a session, and of a group
without any. Then connections are made which all send one request and rest, and the coordinator is started
again with what it has.

The store's size is that of its files in SQLite (after a stop, so the WAL is part of the database), and etcd's own
figure of what is in use.
"""

import argparse
import asyncio
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from agent.core.timing import LONGEST_INTERVAL_S
from tests.bench.heartbeats import Connection, ask, heartbeat, on_etcd
from tests.etcd import EtcdServer, an_etcd

CONNECTIONS = 32
IDLE_CONNECTIONS = 1000
"""Less than max_connections_per_address."""

LEASE = "01:00:00"
"""So long that no lease ends while groups are made."""

CREATED, OK = 201, 200
SETTLE_S = 2.0
"""Progress is saved by then."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Coordinator:
    """A running coordinator, which can be started again with what it has."""

    def __init__(self, directory: Path, etcd: EtcdServer | None, store: str, most: int) -> None:
        self._command = [sys.executable, "-m", "agent", "serve", "--max-groups", str(most)]
        if etcd is not None:
            self._command += [*on_etcd(etcd.urls[0]), "--leadership-ttl", "10"]
        else:
            self._command += ["--listen", "127.0.0.1:0", "--store", store]
            if store == "sqlite":
                self._command += ["--data-dir", str(directory)]

    @contextmanager
    def running(self) -> Iterator[tuple[str, int, int, float]]:
        """Host, port, process and the seconds that the start has taken."""
        began = time.monotonic()
        with subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            url = next(line.split("url=")[1].strip() for line in server.stderr if "url=" in line)
            took_s = time.monotonic() - began
            log = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
            host, _, port = url.removeprefix("http://").split()[0].rpartition(":")
            try:
                yield host, int(port), server.pid, took_s
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait(60)
                log.wait()


def resident_kib(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


async def connect(host: str, port: int) -> Connection:
    return Connection(*await asyncio.open_connection(host, port))


async def make_groups(connections: list[Connection], names: list[str], sessions: int) -> None:
    """Make groups with sessions, which all send a heartbeat, and the first another one, which makes it primary."""

    async def some(number: int) -> None:
        connection = connections[number]
        for name in names[number :: len(connections)]:
            body = f'{{"Id":"{name}","FailoverTimeout":"{LEASE}"}}'
            assert await ask(connection, "POST", "groups/", body) == CREATED
            for one in range(sessions):
                path = f"groups/{name}/clientsessions"
                assert await ask(connection, "POST", path, f'{{"Id":"session-{one}"}}') == CREATED
                beat = f"{path}/session-{one}/heartbeat"
                assert await ask(connection, "POST", beat, heartbeat(95)) == OK

    async def confirm(number: int) -> None:
        for name in names[number :: len(connections)]:
            beat = f"groups/{name}/clientsessions/session-0/heartbeat"
            assert await ask(connections[number], "POST", beat, heartbeat(95)) == OK

    await asyncio.gather(*(some(number) for number in range(len(connections))))
    await asyncio.sleep(LONGEST_INTERVAL_S)
    await asyncio.gather(*(confirm(number) for number in range(len(connections))))


async def stages(args: argparse.Namespace, host: str, port: int, process: int) -> None:
    connections = [await connect(host, port) for _ in range(CONNECTIONS)]
    await make_groups(connections, ["first"], 1)  # what is made at the first use of all code
    resident = [resident_kib(process)]
    for sessions in (1, 3):
        names = [f"collectors-{sessions}-{number}" for number in range(args.groups)]
        began = time.monotonic()
        await make_groups(connections, names, sessions)
        took_s = time.monotonic() - began
        await asyncio.sleep(SETTLE_S)
        resident.append(resident_kib(process))
        say(
            f"{args.groups} groups of {sessions} made in {took_s:.0f} s: resident"
            f" {resident[-1] / 1024:.1f} MiB, before {resident[-2] / 1024:.1f}"
        )
    with_one, with_three = (
        (after - before) / args.groups for before, after in itertools.pairwise(resident)
    )
    session = (with_three - with_one) / 2
    say(
        f"memory: a session {session:.2f} KiB, a group without any {with_one - session:.2f} KiB,"
        f" a group of two {with_one + session:.2f} KiB; {resident[0] / 1024:.1f} MiB without"
    )
    idle = [await connect(host, port) for _ in range(IDLE_CONNECTIONS)]
    for connection in idle:
        assert await ask(connection, "GET", "groups/first", "") == OK
    each = (resident_kib(process) - resident[-1]) / IDLE_CONNECTIONS
    say(f"memory: a connection at rest {each:.1f} KiB")
    for connection in [*connections, *idle]:
        connection.writer.close()


def stored_bytes(directory: Path, etcd: EtcdServer | None) -> int:
    """The size of the store."""
    if etcd is None:
        return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    url = f"{etcd.urls[0]}/v3/maintenance/status"
    with urllib.request.urlopen(urllib.request.Request(url, b"{}"), timeout=5) as page:
        return int(json.load(page)["dbSizeInUse"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", type=int, default=20_000, help="of each size")
    parser.add_argument("--store", choices=("sqlite", "memory", "etcd"), default="sqlite")
    args = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        etcd = None
        if args.store == "etcd":
            etcd = stack.enter_context(an_etcd(directory))
        data = directory / "data"
        coordinator = Coordinator(data, etcd, args.store, 3 * args.groups)
        with coordinator.running() as (host, port, process, took_s):
            say(f"{args.store}: an empty one starts in {took_s:.2f} s")
            empty = stored_bytes(data, etcd)
            asyncio.run(stages(args, host, port, process))
        if args.store == "memory":
            return
        each = (stored_bytes(data, etcd) - empty) / (2 * args.groups)
        say(f"store: {each:.0f} bytes a group of two sessions, on average")
        with coordinator.running() as (_, _, process, took_s):
            say(
                f"{2 * args.groups} groups, {4 * args.groups} sessions: starts in {took_s:.2f} s,"
                f" resident {resident_kib(process) / 1024:.1f} MiB"
            )


if __name__ == "__main__":
    main()
