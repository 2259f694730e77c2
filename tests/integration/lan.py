"""Hosts on a LAN: network namespaces behind a bridge, whose links can be cut one way or both ways.

Owns the namespaces, their addresses and their rules. Needs root, ip and nft. Knows no agent.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

NETWORK = "10.213.7"
CLONE_NEWNET = 0x40000000
RULES = "add table ip cuts; add chain ip cuts input { type filter hook input priority 0; }"


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def lacking() -> str | None:
    """What keeps this machine from having namespaces, as a hint; None if nothing does."""
    if not (shutil.which("nft") and shutil.which("ip")):
        return "needs: nftables, iproute2: apt-get install nftables iproute2"
    name = f"fs-{secrets.token_hex(4)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode != 0:
        return "needs: network namespaces: run the tests as root with CAP_SYS_ADMIN"
    run("ip", "netns", "delete", name)
    return None


@dataclass(frozen=True, slots=True)
class LanHost:
    """One host: its namespace and its address."""

    namespace: str
    address: str

    @property
    def before(self) -> tuple[str, ...]:
        """What starts a command on it; the process is the command's own."""
        return "ip", "netns", "exec", self.namespace

    def call(self, work: Callable[[], T]) -> T:
        """Call ``work`` in a thread whose sockets are on this host."""

        def inside() -> T:
            with Path("/run/netns", self.namespace).open() as file:
                libc = ctypes.CDLL(None, use_errno=True)
                assert libc.setns(file.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            return work()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(inside).result()


@dataclass(slots=True)
class Lan:
    """Hosts by name, in one LAN."""

    hosts: dict[str, LanHost] = field(default_factory=dict)

    def cut(self, receiver: str, sender: str) -> None:
        """What ``sender`` sends to ``receiver`` is lost from now on."""
        self._nft(receiver, f"add rule ip cuts input ip saddr {self.hosts[sender].address} drop")

    def cut_both_ways(self, one: str, *others: str) -> None:
        """Cut one host off from others."""
        for other in others:
            self.cut(one, other)
            self.cut(other, one)

    def heal(self, *names: str) -> None:
        """Hosts receive everything again; without names all do."""
        for name in names or self.hosts:
            self._nft(name, "flush chain ip cuts input")

    def _nft(self, name: str, rule: str) -> None:
        run(*self.hosts[name].before, "nft", rule)


@contextlib.contextmanager
def a_lan(*names: str) -> Iterator[Lan]:
    """A LAN with these hosts; skips the test on a machine that cannot have one."""
    if hint := lacking():
        pytest.skip(hint)
    prefix = f"fs{secrets.token_hex(3)}"
    made: list[str] = []
    try:
        switch = _namespace(f"{prefix}-switch", made)
        run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "bridge", "up")
        lan = Lan()
        for number, name in enumerate(names, 1):
            host = LanHost(_namespace(f"{prefix}-{name}", made), f"{NETWORK}.{number}")
            port = f"port{number}"
            run(
                *f"ip -n {switch} link add {port} type veth peer eth0 netns {host.namespace}".split()
            )
            run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            run("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
            run(*host.before, "nft", RULES)
            lan.hosts[name] = host
        yield lan
    finally:
        for namespace in made:
            run("ip", "netns", "delete", namespace)


def _namespace(name: str, made: list[str]) -> str:
    run("ip", "netns", "add", name)
    made.append(name)
    run("ip", "-n", name, "link", "set", "lo", "up")
    return name
