"""What a question of failsafe and its answer cost on loopback. A script, not a test.

    .venv/bin/python -m tests.bench.questions [--questions 500]

The listener and the asker are the agent's own, in a process each. Each question has a connection of its own, as
in the agent. Reported is, over plain HTTP and over TLS with a certificate that is verified: the time from the
question to its checked answer, and the CPU time of both sides together.

The exit code is 1 if the median over plain HTTP misses the aim.
"""

import argparse
import asyncio
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

from agent.drivers.failsafe.access import load_failsafe_access
from agent.drivers.failsafe.asker import Asker, Peer
from agent.drivers.failsafe.listener import Listener, Vote
from agent.ops.clock import Clock
from agent.schema.addresses import Address
from agent.schema.settings import AgentSettings
from tests.mosquitto import Authority

AIM_MS = 3.0
WARM_UP = 20
LIMIT_S = 5.0


def settings(directory: Path, port: int, *, tls: bool) -> AgentSettings:
    secret = directory / "secret"
    return AgentSettings(
        failsafe_listen=Address("127.0.0.1", port),
        failsafe_secret_file=secret,
        failsafe_ca_file=directory / "ca.pem" if tls else None,
        failsafe_certificate=directory / "b.crt" if tls else None,
        failsafe_key=directory / "b.key" if tls else None,
    )


async def listen(given: AgentSettings) -> None:
    """Answer each question with yes, until the standard input ends; then report the CPU time."""
    assert given.failsafe_listen is not None
    listener = Listener(
        "g",
        "b",
        str(given.member_url),
        load_failsafe_access(given),
        vote=lambda _: Vote(yes=True, why="in doubt, too"),
        clock=Clock(),
    )
    await listener.start(given.failsafe_listen)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await listener.stop()
    sys.stdout.write(f"{cpu_s()}\n")


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def ask(given: AgentSettings, count: int) -> list[float]:
    """How long each question took, in milliseconds."""
    asker = Asker("g", "a", "process", load_failsafe_access(given))
    peer = Peer("b", str(given.member_url))
    took_ms = []
    for _ in range(WARM_UP + count):
        began = time.perf_counter()
        answer = await asker.ask(peer, 1, rehearsal=False, limit_s=LIMIT_S)
        took_ms.append(1000 * (time.perf_counter() - began))
        assert answer.yes
    return took_ms[WARM_UP:]


def measure(directory: Path, count: int, *, tls: bool) -> float:
    """One line; the median in milliseconds."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = settings(directory, port, tls=tls)
    words = [sys.executable, "-m", "tests.bench.questions", "--listen", str(directory), str(port)]
    with subprocess.Popen(
        [*words, *(["--tls"] if tls else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "ready\n"
        own_s = cpu_s()
        took_ms = asyncio.run(ask(given, count))
        own_s = cpu_s() - own_s
        other_s = float(listener.communicate()[0])
    middle_ms = median(took_ms)
    sys.stdout.write(
        f"{'TLS' if tls else 'HTTP'}: median {middle_ms:.2f} ms, 99 % {quantiles(took_ms, n=100)[98]:.2f} ms,"
        f" max {max(took_ms):.2f} ms; CPU at most {1000 * (own_s + other_s) / count:.2f} ms a question"
        f" (asker {1000 * own_s / count:.2f}; the listener's start included)\n"
    )
    return middle_ms


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--listen", nargs=2, metavar=("DIRECTORY", "PORT"))
    parser.add_argument("--tls", action="store_true")
    args = parser.parse_args()
    if args.listen:
        asyncio.run(listen(settings(Path(args.listen[0]), int(args.listen[1]), tls=args.tls)))
        return 0
    with tempfile.TemporaryDirectory(prefix="questions-") as name:
        directory = Path(name)
        for part, path in zip(("crt", "key"), Authority(directory).issue("b"), strict=True):
            path.rename(directory / f"b.{part}")
        secret = directory / "secret"
        secret.write_text("a secret of the whole group\n")
        secret.chmod(0o600)
        plain_ms = measure(directory, args.questions, tls=False)
        measure(directory, args.questions, tls=True)
    sys.stdout.write(f"aim <= {AIM_MS:g} ms over HTTP: {'yes' if plain_ms <= AIM_MS else 'NO'}\n")
    return 0 if plain_ms <= AIM_MS else 1


if __name__ == "__main__":
    sys.exit(main())
