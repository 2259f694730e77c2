r"""How late heartbeats are answered at a fixed rate. A script, not a test: it needs a quiet machine.

    .venv/bin/python tests/bench/heartbeats.py [--rate 3000] [--groups 2000] [--seconds 10]
    .venv/bin/python tests/bench/heartbeats.py --rate 700 --groups 10000 --failover-timeout 60 \
        --seconds 30 --scrape 1 [--session-metrics]
    .venv/bin/python tests/bench/heartbeats.py --compare main --failover-timeout 3 \
        [--rounds 5] [--groups 1000] [--seconds 5]
    .venv/bin/python tests/bench/heartbeats.py --compare bare|memory --failover-timeout 3 ...
    .venv/bin/python -m tests.bench.heartbeats --compare etcd|follower --failover-timeout 3 --warm-up 20 ...
    .venv/bin/python -m tests.bench.heartbeats --compare main --serving etcd|follower ...

A real coordinator on a fresh SQLite store, pinned to one core; this process, pinned to another one,
plays 2 sessions for each group. Open loop: the heartbeats leave at their times whether or not earlier
ones have been answered, and their latency counts from the moment at which each was due, so that
waiting inside this generator is not left out. Each carries a new LastDataProcessedTime, which the
coordinator has to make durable as well.

With --compare the coordinator of this checkout (or of the installed wheel) and that of another revision are
measured in turn, each round on fresh stores: closed loop, as many heartbeats as are answered. What is
compared is heartbeats for each second of the coordinator's CPU time, which another process on the machine
disturbs less than heartbeats for each second; both are printed, with the ratio of their medians. "bare"
instead of a revision is uvicorn with httptools and uvloop alone: it reads each body and gives a constant
answer, as large as a heartbeat's. "memory" is this coordinator with nothing durable, "etcd" is this
coordinator on an etcd of one member, and "follower" one of two such coordinators, of which the other leads
all groups, on another core with etcd; the follower shares its core with this generator. The processor time is that
of the one that is asked. With --serving both that are compared are served in such a way; "bare" and the others that
are alone share their core with this generator, too, if they are compared with a follower.

With --scrape its /metrics are read every so many seconds meanwhile, as by Prometheus, by a process of its
own beside this one.
"""

import argparse
import asyncio
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from urllib.request import urlopen

ALONE = ("sqlite", "memory", "bare")
CLUSTERS = ("etcd", "follower")

CONNECTIONS = 400
BUSY_CONNECTIONS = 64

PATIENCE_S = 20.0

CORES = sorted(os.sched_getaffinity(0))
"""Those of this process, before it pins itself to the last one."""

SCRAPER = """
import sys, time, urllib.request
url, every_s = sys.argv[1], float(sys.argv[2])
while True:
    began = time.monotonic()
    page = urllib.request.urlopen(url).read()
    took_s = time.monotonic() - began
    print(len(page), took_s, flush=True)
    time.sleep(max(0.0, every_s - took_s))
"""

BARE = """
import asyncio, socket, sys, uvicorn, uvloop

BODY = b'{"Role":1,"LastDataProcessedTime":"2026-01-31T12:00:00.000000Z","Epoch":1,' \\
    b'"LeaseDuration":"00:00:03","Revision":2,"StoreId":"0123456789abcdef0123456789abcdef"}'
HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]

async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 201 if b"heartbeat" not in scope["raw_path"]
        else 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})

listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
print(f"url=http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
config = uvicorn.Config(app, http="httptools", ws="none", lifespan="off", interface="asgi3",
    log_config=None, access_log=False)
uvloop.run(uvicorn.Server(config).serve(sockets=[listener]))
"""
"""A server that does nothing but serve."""


@dataclass
class Connection:
    """One kept-alive connection, with the requests on it that are not answered yet."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    sent: asyncio.Queue[float] = field(default_factory=asyncio.Queue)


@dataclass
class Result:
    """What was measured."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)


def request(method: str, path: str, body: str) -> bytes:
    return (
        f"{method} /api/v1/clientfailover/{path} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


async def read_answer(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    if length:
        await reader.readexactly(int(length))
    return int(head[9:12])


async def ask(connection: Connection, method: str, path: str, body: str) -> int:
    connection.writer.write(request(method, path, body))
    return await read_answer(connection.reader)


async def make(connection: Connection, path: str, body: str) -> None:
    """Make something, at a coordinator whose etcd may be busy."""
    while (status := await ask(connection, "POST", path, body)) == 503:  # noqa: ASYNC110 - it is asked
        await asyncio.sleep(0.05)
    assert status in {200, 201}, status


async def set_up(connections: list[Connection], groups: int, timeout_s: int) -> None:
    """Make the groups and their sessions, over all connections at once."""
    timeout = timedelta(seconds=timeout_s)

    async def some(number: int) -> None:
        connection = connections[number]
        for group in range(number, groups, len(connections)):
            body = f'{{"Id":"g{group}","FailoverTimeout":"0{timeout}"}}'
            await make(connection, "groups/", body)
            for session in "ab":
                await make(connection, f"groups/g{group}/clientsessions", f'{{"Id":"{session}"}}')

    await asyncio.gather(*(some(number) for number in range(len(connections))))


async def listen(connection: Connection, result: Result, measure_from: float) -> None:
    while True:
        status = await read_answer(connection.reader)
        due = connection.sent.get_nowait()
        if due >= measure_from:
            result.latencies.append(time.monotonic() - due)
            result.statuses[status] += 1


async def beat(connections: list[Connection], groups: int, rate: float, until: float) -> None:
    """Send heartbeats at their times: every session in turn, spread over all connections."""
    turn = in_turn(groups)
    start, number = time.monotonic(), 0
    while (due := start + number / rate) < until:
        if (early_s := due - time.monotonic()) > 0.0005:
            await asyncio.sleep(early_s)
        group, session = next(turn)
        body = heartbeat(90 + number % 10)
        connection = connections[number % len(connections)]
        connection.sent.put_nowait(due)
        path = f"groups/{group}/clientsessions/{session}/heartbeat"
        connection.writer.write(request("POST", path, body))
        number += 1
        if number % 8 == 0:
            await asyncio.sleep(0)


async def saturate(
    connections: list[Connection], turn: Iterator[tuple[str, str]], until: float
) -> tuple[int, Counter[int]]:
    """Heartbeats as fast as they are answered, one at a time on each connection, by status."""
    statuses: Counter[int] = Counter()

    async def one(connection: Connection) -> None:
        while time.monotonic() < until:
            group, session = next(turn)
            path = f"groups/{group}/clientsessions/{session}/heartbeat"
            statuses[await ask(connection, "POST", path, heartbeat(95))] += 1

    await asyncio.gather(*(one(connection) for connection in connections))
    return statuses.total(), statuses


def in_turn(groups: int) -> Iterator[tuple[str, str]]:
    """Group and session of one heartbeat after another, without end."""
    sessions = [(f"g{number // 2}", "ab"[number % 2]) for number in range(2 * groups)]
    random.Random(1).shuffle(sessions)  # agents beat when they like, not the primaries together
    return itertools.cycle(sessions)


def heartbeat(score: int) -> str:
    now = datetime.now(UTC).isoformat()[:-6]
    return f'{{"FailoverScore":{score},"LastDataProcessedTime":"{now}Z"}}'


def cpu_s(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kept_waiting_s(process: int) -> float:
    """For how long other processes kept the first thread from its core although it could run."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9


async def measure(args: argparse.Namespace, host: str, port: int, process: int) -> None:
    pairs = [await asyncio.open_connection(host, port) for _ in range(CONNECTIONS)]
    connections = [Connection(*pair) for pair in pairs]
    started = time.monotonic()
    await set_up(connections, args.groups, args.failover_timeout)
    print(  # noqa: T201 - a script's result
        f"{args.groups} groups of 2 sessions made in {time.monotonic() - started:.1f} s"
    )
    result = Result()
    scraping = scraper(f"http://{host}:{port}/metrics", args.scrape)
    begin = time.monotonic() + args.warm_up
    tasks = [asyncio.create_task(listen(c, result, begin)) for c in connections]
    beating = asyncio.create_task(beat(connections, args.groups, args.rate, begin + args.seconds))
    await asyncio.sleep(begin - time.monotonic())
    measures = ((cpu_s, process), (cpu_s, os.getpid()))
    waits = ((kept_waiting_s, process), (kept_waiting_s, os.getpid()))
    before = [read(of) for read, of in (*measures, *waits)]
    await beating
    took = [read(of) - was for (read, of), was in zip((*measures, *waits), before, strict=True)]
    await asyncio.sleep(0.5)
    for task in tasks:
        task.cancel()
    report(result, args.seconds, took)
    if scraping is not None:
        scraping.kill()
        report_scrapes(scraping.communicate()[0])


def scraper(url: str, every_s: float | None) -> subprocess.Popen[str] | None:
    """What scrapes, if something is to; it says of each scrape how long and how large it was."""
    if every_s is None:
        return None
    command = [sys.executable, "-c", SCRAPER, url, str(every_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def report_scrapes(said: str) -> None:
    scrapes = [line.split() for line in said.splitlines()]
    took_s = sorted(float(seconds) for _, seconds in scrapes)
    print(  # noqa: T201 - a script's result
        f"{len(took_s)} scrapes of {scrapes[-1][0]} bytes: median {median(took_s) * 1000:.0f} ms,"
        f" max {took_s[-1] * 1000:.0f} ms"
    )


def report(result: Result, seconds: float, took: list[float]) -> None:
    latencies = sorted(result.latencies)

    if not latencies:
        raise SystemExit("no heartbeat was answered in the measurement: the machine is too busy")

    def at(share: float) -> str:
        return f"{latencies[min(len(latencies) - 1, int(share * len(latencies)))] * 1000:.1f} ms"

    cpu, own, waited, own_waited = (one / seconds for one in took)
    print(  # noqa: T201 - a script's result
        f"rate {len(latencies) / seconds:.0f}/s, p50 {at(0.5)}, p99 {at(0.99)},"
        f" p99.9 {at(0.999)}, max {at(1)}, statuses {dict(result.statuses)},"
        f" coordinator CPU {cpu:.0%} of one core, generator {own:.0%};"
        f" kept waiting for a core {waited:.0%}, {own_waited:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=3000)
    parser.add_argument("--groups", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument(
        "--failover-timeout", type=int, default=10, help="of the groups, in seconds"
    )
    parser.add_argument("--scrape", type=float, help="read /metrics every so many seconds")
    parser.add_argument(
        "--session-metrics", action="store_true", help="with series of each session"
    )
    parser.add_argument("--profile", type=Path, help="where to write the coordinator's cProfile")
    parser.add_argument(
        "--compare",
        metavar="REV",
        help="measure this and another revision, bare, memory, etcd or follower in turn",
    )
    parser.add_argument(
        "--serving",
        choices=("sqlite", *CLUSTERS),
        default="sqlite",
        help="what is measured: alone on SQLite, on etcd, or a follower of another one on etcd",
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each revision, with --compare")
    parser.add_argument(
        "--warm-up",
        type=float,
        default=3.0,
        help="seconds before the measurement: the first roles are being written",
    )
    args = parser.parse_args()
    if args.compare in (*ALONE, *CLUSTERS):
        compare(args, None)
        return
    if args.compare:
        with checked_out(args.compare) as tree:
            compare(args, tree)
        return
    with serving(args, args.serving) as (host, port, process):
        asyncio.run(measure(args, host, port, process))


@contextmanager
def coordinator(
    args: argparse.Namespace,
    tree: Path | None = None,
    *,
    store: str = "sqlite",
    etcd: str | None = None,
    core: int = 0,
    load_core: int = -1,
) -> Iterator[tuple[str, int, int]]:
    """A coordinator on one core, this process on another one or the same: host, port and process id.

    ``tree`` is a checkout whose code is run, rather than this program's own; ``store`` is one of ALONE, of
    which "bare" runs the bare server in its place; ``etcd`` is the URL of its store, if that is not one of those;
    ``core`` and ``load_core`` are the numbers of both cores among those of this process.
    """
    program = ["-m", "agent", "serve"]
    if args.profile:
        program = ["-m", "cProfile", "-o", str(args.profile), *program]
    environment = dict(os.environ)
    if tree is not None:
        environment |= {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryDirectory() as data_dir:
        command = ["taskset", "-c", str(CORES[core]), sys.executable, *program]
        command += ["--data-dir", data_dir, "--log-level", "INFO"]
        if etcd is None:
            command += ["--listen", "127.0.0.1:0", "--store", store]
        else:
            command += on_etcd(etcd)
        if args.session_metrics:
            command.append("--session-metrics")
        if store == "bare":
            command = ["taskset", "-c", str(CORES[core]), sys.executable, "-c", BARE]
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment
        ) as server:
            assert server.stderr is not None
            url = next(line.split("url=")[1].strip() for line in server.stderr if "url=" in line)
            log = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
            os.sched_setaffinity(0, {CORES[load_core]})
            host, _, port = url.removeprefix("http://").rpartition(":")
            try:
                yield host, int(port), server.pid
            finally:
                os.sched_setaffinity(0, CORES)
                server.send_signal(signal.SIGTERM)
                server.wait(20)
                log.wait()


def on_etcd(url: str) -> list[str]:
    """The flags of a coordinator on etcd, on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        *("--store", "etcd", "--shards", "1", "--etcd-endpoint", url),
        *("--listen", address, "--advertise", f"http://{address}"),
    ]


@contextmanager
def serving(
    args: argparse.Namespace, kind: str, tree: Path | None = None
) -> Iterator[tuple[str, int, int]]:
    """A coordinator of one of the kinds in ALONE and CLUSTERS."""
    if kind in ALONE:
        with coordinator(
            args, tree, store=kind, load_core=0 if args.serving == "follower" else -1
        ) as one:
            yield one
        return
    from tests.etcd import an_etcd  # noqa: PLC0415 - only a run with -m finds it

    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(an_etcd(directory)).urls[0]
        leader = stack.enter_context(
            coordinator(args, tree, etcd=url, core=0 if kind == "etcd" else -1)
        )
        wait_until_leading(*leader[:2])
        if kind == "etcd":
            yield leader
        else:
            yield stack.enter_context(coordinator(args, tree, etcd=url, load_core=0))


def wait_until_leading(host: str, port: int) -> None:
    """Wait until a coordinator leads the only shard."""
    line = "\nfailover_coordinator_shards_led 1.0\n"
    until = time.monotonic() + PATIENCE_S
    while line not in urlopen(f"http://{host}:{port}/metrics").read().decode():
        assert time.monotonic() < until, "the coordinator does not lead"
        time.sleep(0.1)


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A temporary git worktree of a revision."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "worktree"]
    tree = Path(tempfile.mkdtemp(prefix="heartbeats-"))
    subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
    try:
        yield tree
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)
        shutil.rmtree(tree, ignore_errors=True)


def compare(args: argparse.Namespace, tree: Path | None) -> None:
    """This version and the other one, which is that of ``tree`` if there is one, in turn; the ratio of medians."""
    figures: dict[str, list[tuple[float, float]]] = {args.compare: [], "this": []}
    for _ in range(args.rounds):
        for name, results in figures.items():
            other = name == args.compare
            kind = name if other and tree is None else args.serving
            with serving(args, kind, tree if other else None) as (host, port, process):
                result = asyncio.run(throughput(args, host, port, process))
            results.append(result)
            print(f"{name}: {result[0]:.0f} heartbeats/s, {result[1]:.0f} per CPU second")  # noqa: T201 - as above
    for what, index in (("heartbeats/s", 0), ("heartbeats per CPU second", 1)):
        before, after = (median(one[index] for one in each) for each in figures.values())
        print(f"{what}: {before:.0f} -> {after:.0f}, ratio {after / before:.2f}")  # noqa: T201 - as above


async def throughput(
    args: argparse.Namespace, host: str, port: int, process: int
) -> tuple[float, float]:
    """Heartbeats that were accepted, for each second and for each second of the coordinator's CPU."""
    pairs = [await asyncio.open_connection(host, port) for _ in range(BUSY_CONNECTIONS)]
    connections = [Connection(*pair) for pair in pairs]
    await set_up(connections, args.groups, args.failover_timeout)
    turn = in_turn(args.groups)
    await saturate(connections, turn, time.monotonic() + args.warm_up)
    began, cpu = time.monotonic(), cpu_s(process)
    count, statuses = await saturate(connections, turn, began + args.seconds)
    took, cpu = time.monotonic() - began, cpu_s(process) - cpu
    if statuses[200] < 0.99 * count:
        raise SystemExit(
            f"too many refusals, take more --groups or a shorter --failover-timeout: {dict(statuses)}"
        )
    return count / took, count / cpu


if __name__ == "__main__":
    main()
