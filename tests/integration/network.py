"""A network of hosts on one machine: each is a network namespace, and a bridge joins them.

Owns the namespaces, each for as long as its *holder* runs, a process that ends with the tests. Nothing outside
them is changed. A way between two hosts is cut by a rule of nftables on the bridge, in one direction or
both; packets are dropped without an answer, as on a broken network.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

HOLD = "ip link set lo up && echo ready && exec cat"
PREFIX = "10.99.0."
PROGRAMS = {"ip": "iproute2", "nft": "nftables", "unshare": "util-linux", "nsenter": "util-linux"}
RULES = """
table bridge faults {
  set cut { type ipv4_addr . ipv4_addr; }
  chain forward { type filter hook forward priority 0; ip saddr . ip daddr @cut drop; }
}
"""
CLONE_NEWNET = 0x40000000
END_S = 10.0

_libc = ctypes.CDLL(None, use_errno=True)


def _hold(stack: ExitStack) -> int:
    """A new network namespace; the process id of its holder."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    stack.enter_context(holder)
    stack.callback(holder.kill)
    assert holder.stdout is not None
    if holder.stdout.readline() != b"ready\n":
        pytest.skip("needs: a network namespace: run as root with CAP_SYS_ADMIN")
    return holder.pid


def _inside(pid: int) -> tuple[str, ...]:
    return ("nsenter", f"--net=/proc/{pid}/ns/net")


def _problem(*command: str, text: str | None = None) -> str:
    """What a command said when it failed, or nothing."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return f"{' '.join(command)}: {done.stderr.strip()}" if done.returncode else ""


def _run(*command: str) -> None:
    problem = _problem(*command)
    assert not problem, problem


@dataclass(frozen=True, slots=True)
class Host:
    """One host of the network. ``before`` starts a command there."""

    name: str
    address: str
    holder: int

    @property
    def before(self) -> tuple[str, ...]:
        return _inside(self.holder)

    def processes(self) -> list[int]:
        """All processes of this host but its holder."""
        own = Path(f"/proc/{self.holder}/ns/net").readlink()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            pid = int(path.name)
            with suppress(OSError):
                if (path / "ns/net").readlink() == own and pid not in (self.holder, os.getpid()):
                    found.append(pid)
        return found

    def cut_power(self) -> None:
        """Kill every process of the host, and wait until all are gone or zombies of ours."""
        end_at = time.monotonic() + END_S
        while running := self.processes():  # a zombie has no namespace
            assert time.monotonic() < end_at, f"{self.name}: {running} do not die"
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)


class Network:
    """The hosts, by their names; skips the test where there can be none."""

    def __init__(self, stack: ExitStack, names: Sequence[str]) -> None:
        for program, package in PROGRAMS.items():
            if shutil.which(program) is None:
                pytest.skip(f"needs: {program}: apt-get install {package}")
        if os.geteuid() != 0:
            pytest.skip("needs: network namespaces joined by a bridge: run the tests as root")
        self._switch = _inside(_hold(stack))
        for command, text in (
            (("ip", "link", "add", "br0", "type", "bridge"), None),
            (("ip", "link", "set", "br0", "up"), None),
            (("nft", "-f", "-"), RULES),
        ):
            if problem := _problem(*self._switch, *command, text=text):
                pytest.skip(
                    f"needs: a bridge with rules of nftables: a kernel with both ({problem})"
                )
        self._cuts: Counter[str] = Counter()
        self.hosts = {
            name: self._join(name, number, _hold(stack)) for number, name in enumerate(names, 1)
        }
        for host in self.hosts.values():
            stack.callback(host.cut_power)  # guards outlive their agents

    def _join(self, name: str, number: int, holder: int) -> Host:
        port = f"port{number}"
        peer = ("peer", "name", "eth0", "netns", str(holder))
        _run(*self._switch, "ip", "link", "add", port, "type", "veth", *peer)
        _run(*self._switch, "ip", "link", "set", port, "master", "br0", "up")
        host = Host(name, f"{PREFIX}{number}", holder)
        _run(*host.before, "ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        _run(*host.before, "ip", "link", "set", "eth0", "up")
        return host

    def cut(self, senders: Sequence[Host], receivers: Sequence[Host]) -> Callable[[], None]:
        """Drop what senders send to receivers; the other direction stays. Returns what ends that."""
        pairs = [
            f"{one.address} . {other.address}"
            for one, other in product(senders, receivers)
            if one is not other
        ]
        self._change("add", [pair for pair in pairs if not self._cuts[pair]])
        self._cuts.update(pairs)

        def mend() -> None:
            self._cuts.subtract(pairs)
            self._change("delete", [pair for pair in pairs if not self._cuts[pair]])

        return mend

    def _change(self, what: str, pairs: Sequence[str]) -> None:
        if pairs:
            elements = f"{{ {', '.join(pairs)} }}"
            _run(*self._switch, "nft", what, "element", "bridge", "faults", "cut", elements)


@contextmanager
def entered(host: Host) -> Iterator[None]:
    """This thread, and the threads that it starts meanwhile, are on that host."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _enter(Path(f"/proc/{host.holder}/ns/net"))
        yield
    finally:
        _libc.setns(before, CLONE_NEWNET)
        os.close(before)


def _enter(namespace: Path) -> None:
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        assert _libc.setns(descriptor, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(descriptor)
