"""A real etcd for tests: one member or a cluster of three, on free ports, with files in one folder.

Owns the processes. With ``quick`` elections take a quarter of a second, so that tests need not wait for long.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


class EtcdServer:
    """One etcd cluster. ``urls`` are the clients' URLs of its members."""

    def __init__(
        self, directory: Path, members: int = 1, tls: tuple[Path, Path, Path] | None = None
    ) -> None:
        found = shutil.which("etcd")
        if found is None:
            pytest.skip(HINT)
        self._program = found
        self._directory = directory
        ports = [(_free_port(), _free_port()) for _ in range(members)]
        scheme = "http" if tls is None else "https"
        self.urls = [f"{scheme}://127.0.0.1:{client}" for client, _ in ports]
        self._tls: tuple[str, ...] = ()
        self._context: ssl.SSLContext | None = None
        if tls is not None:
            certificate, key, authority = map(str, tls)
            self._tls = ("--cert-file", certificate, "--key-file", key)
            self._context = ssl.create_default_context(cafile=authority)
        self._peers = [f"http://127.0.0.1:{peer}" for _, peer in ports]
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * members

    def start(self, number: int) -> None:
        """Start a member, with the data that it has."""
        name = f"m{number}"
        client, peer = self.urls[number], self._peers[number]
        everybody = ",".join(f"m{n}={url}" for n, url in enumerate(self._peers))
        with (self._directory / f"{name}.log").open("ab") as log:
            self._processes[number] = subprocess.Popen(
                [
                    self._program,
                    *("--name", name, "--data-dir", str(self._directory / name)),
                    *("--listen-client-urls", client, "--advertise-client-urls", client),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    *("--initial-cluster", everybody),
                    *("--heartbeat-interval", "50", "--election-timeout", "250"),
                    *self._tls,
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
        while True:
            health = urllib.request.Request(f"{url}/health")
            with (
                suppress(OSError),
                urllib.request.urlopen(health, timeout=2, context=self._context) as answer,
            ):
                if b'"true"' in answer.read():
                    return
            assert time.monotonic() < until, f"etcd at {url} is not healthy"
            time.sleep(0.05)

    def leader(self) -> int:
        """The number of the member that leads."""
        for number, url in enumerate(self.urls):
            with suppress(OSError), urllib.request.urlopen(f"{url}/metrics", timeout=2) as page:
                if b"\netcd_server_is_leader 1\n" in page.read():
                    return number
        raise AssertionError("etcd has no leader")

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
    directory: Path, members: int = 1, tls: tuple[Path, Path, Path] | None = None
) -> Iterator[EtcdServer]:
    """A running cluster; skips the test where there is no etcd.

    Args:
        directory: for its data and logs.
        members: how many.
        tls: certificate, key and CA in PEM, to serve https with.
    """
    server = EtcdServer(directory, members, tls)
    try:
        server.start_all()
        yield server
    finally:
        server.end()
