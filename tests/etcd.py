"""A real etcd for tests: one member or a cluster of three, on free ports, with files in one folder.

Owns the processes. Elections take a quarter of a second, so that tests need not wait for long. Each member may
have a place of its own: an address, a directory, and a network namespace that its command is started in.
"""

import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import pytest

PATIENCE_S = 30.0
HINT = "needs: etcd: apt-get install etcd-server"


def _free_port() -> int:
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True, slots=True)
class Place:
    """Where one member runs: its address, the directory of its data, and what its command is started by."""

    address: str
    directory: Path
    before: Sequence[str] = ()


class EtcdServer:
    """One etcd cluster. ``urls`` are the clients' URLs of its members.

    Args:
        directory: for its logs, and its data where it has no places.
        members: how many.
        tls: certificate, key and CA in PEM, to serve https with.
        places: one for each member; without them all are on loopback.
        flags: more flags for each member.
    """

    def __init__(
        self,
        directory: Path,
        members: int = 1,
        tls: tuple[Path, Path, Path] | None = None,
        *,
        places: Sequence[Place] = (),
        flags: Sequence[str] = (),
    ) -> None:
        found = shutil.which("etcd")
        if found is None:
            pytest.skip(HINT)
        self._program = found
        self._directory = directory
        self._places = places or [Place("127.0.0.1", directory)] * members
        self._flags = flags
        hosts = [(place.address, _free_port(), _free_port()) for place in self._places]
        scheme = "http" if tls is None else "https"
        self.urls = [f"{scheme}://{address}:{client}" for address, client, _ in hosts]
        self._tls: tuple[str, ...] = ()
        self._context: ssl.SSLContext | None = None
        if tls is not None:
            certificate, key, authority = map(str, tls)
            self._tls = ("--cert-file", certificate, "--key-file", key)
            self._context = ssl.create_default_context(cafile=authority)
        self.peers = [f"http://{address}:{peer}" for address, _, peer in hosts]
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * len(hosts)

    def start(self, number: int, *, cluster: Sequence[int] = (), state: str = "new") -> None:
        """Start a member, with the data that it has.

        Args:
            number: of the member.
            cluster: the members that it begins with, if it has no data; all of them.
            state: whether it makes a new cluster or joins an existing one then.
        """
        name = f"m{number}"
        client, peer = self.urls[number], self.peers[number]
        place = self._places[number]
        numbers = cluster or range(len(self.peers))
        everybody = ",".join(f"m{n}={self.peers[n]}" for n in numbers)
        with (self._directory / f"{name}.log").open("ab") as log:
            self._processes[number] = subprocess.Popen(
                [
                    *place.before,
                    self._program,
                    *("--name", name, "--data-dir", str(place.directory / name)),
                    *("--listen-client-urls", client, "--advertise-client-urls", client),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    *("--initial-cluster", everybody, "--initial-cluster-state", state),
                    *("--heartbeat-interval", "50", "--election-timeout", "250"),
                    *self._tls,
                    *self._flags,
                ],
                stdout=log,
                stderr=log,
                env={k: v for k, v in os.environ.items() if not k.startswith("ETCD_")},
            )

    def start_all(self) -> None:
        """Start every member, and wait until the cluster can be written."""
        for number in range(len(self.urls)):
            self.start(number)
        for url in self.urls:
            self.wait_until_healthy(url)

    def wait_until_healthy(self, url: str) -> None:
        """Wait until a member serves, and the cluster has a leader."""
        until = time.monotonic() + PATIENCE_S
        while not self.is_healthy(url):
            assert time.monotonic() < until, f"etcd at {url} is not healthy"
            time.sleep(0.05)

    def is_healthy(self, url: str) -> bool:
        """Whether a member serves now, and knows a leader."""
        health = urllib.request.Request(f"{url}/health")
        with (
            suppress(OSError, HTTPException),
            urllib.request.urlopen(health, timeout=2, context=self._context) as answer,
        ):
            return b'"true"' in answer.read()
        return False

    def leader(self) -> int:
        """The number of the member that leads."""
        for number, url in enumerate(self.urls):
            with (
                suppress(OSError, HTTPException),  # also one that ends while it answers
                urllib.request.urlopen(f"{url}/metrics", timeout=2) as page,
            ):
                if b"\netcd_server_is_leader 1\n" in page.read():
                    return number
        raise AssertionError("etcd has no leader")

    def pid(self, member: int) -> int:
        """The process id of a member that was started."""
        process = self._processes[member]
        assert process is not None
        return process.pid

    def has_ended(self, member: int) -> bool:
        """Whether a member's process has ended."""
        process = self._processes[member]
        return process is None or process.poll() is not None

    def send(self, member: int, number: signal.Signals) -> None:
        process = self._processes[member]
        assert process is not None
        process.send_signal(number)

    def kill(self, member: int) -> None:
        process = self._processes[member]
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def end(self) -> None:
        for number in range(len(self.urls)):
            self.kill(number)


@contextmanager
def an_etcd(
    directory: Path,
    members: int = 1,
    tls: tuple[Path, Path, Path] | None = None,
    *,
    places: Sequence[Place] = (),
    flags: Sequence[str] = (),
) -> Iterator[EtcdServer]:
    """A running cluster (see EtcdServer); skips the test where there is no etcd."""
    server = EtcdServer(directory, members, tls, places=places, flags=flags)
    try:
        server.start_all()
        yield server
    finally:
        server.end()
