"""Faults of hosts do what they say: a test that injects none of them would prove nothing."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.etcd import Place, an_etcd

from .disks import WRITES_OF_ETCD, WRITES_OF_STATE_FILES, Disk, slow_disk
from .network import Host, Network, entered
from .outputs import Outputs

PORT = 4000
REPLACES = """
import os, sys, time
while True:
    began = time.monotonic()
    open(sys.argv[1] + ".new", "w").close()
    os.replace(sys.argv[1] + ".new", sys.argv[1])
    print(time.monotonic() - began, flush=True)
"""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listening(stack: ExitStack, host: Host) -> socket.socket:
    """A socket for datagrams on a host."""
    with entered(host):
        end = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        end.bind((host.address, PORT))
        end.settimeout(10)
        return end


def test_a_cut_drops_one_direction_only_until_it_is_mended(stack: ExitStack) -> None:
    network = Network(stack, ["a", "b"])
    a, b = network.hosts.values()
    at_a, at_b = listening(stack, a), listening(stack, b)
    mend = network.cut([a], [b])
    overlapping = network.cut([a], [a, b])
    at_a.sendto(b"lost", (b.address, PORT))
    at_b.sendto(b"other way", (a.address, PORT))
    assert at_a.recv(100) == b"other way"
    mend()
    at_a.sendto(b"lost, too", (b.address, PORT))
    at_b.sendto(b"after that", (a.address, PORT))
    assert at_a.recv(100) == b"after that"
    overlapping()
    at_a.sendto(b"kept", (b.address, PORT))
    assert at_b.recv(100) == b"kept"


def test_a_power_cut_ends_all_processes_of_one_host(stack: ExitStack) -> None:
    a, b = Network(stack, ["a", "b"]).hosts.values()
    sleepers = {
        host.name: subprocess.Popen([*host.before, "sh", "-c", "sleep 100 & exec sleep 100"])
        for host in (a, b)
    }
    for host in (a, b):
        while len(host.processes()) < 2:
            time.sleep(0.01)
    a.cut_power()
    assert (a.processes(), len(b.processes())) == ([], 2)
    assert sleepers["a"].wait(10) == -9
    assert sleepers["b"].poll() is None
    b.cut_power()
    sleepers["b"].wait(10)


def test_a_full_disk_takes_no_byte_until_it_is_freed(stack: ExitStack, tmp_path: Path) -> None:
    disk = Disk(stack, tmp_path / "disk", "1m")
    disk.fill()
    with pytest.raises(OSError, match="No space left"):
        (disk.path / "file").write_bytes(b"x")
    disk.free()
    (disk.path / "file").write_bytes(b"x")


def test_a_slow_disk_delays_each_write_until_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REPLACES, str(tmp_path / "state")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        assert float(process.stdout.readline()) < 0.3
        end = slow_disk(process.pid, WRITES_OF_STATE_FILES, 0.3)
        os.set_blocking(process.stdout.fileno(), False)
        process.stdout.read()
        os.set_blocking(process.stdout.fileno(), True)
        process.stdout.readline()  # of which a part was read
        assert float(process.stdout.readline()) >= 0.3
        end()
        process.stdout.readline()
        assert float(process.stdout.readline()) < 0.3
        process.kill()
        process.wait()
        slow_disk(process.pid, WRITES_OF_STATE_FILES, 0.3)()  # it has ended: no error


def test_a_member_of_etcd_has_its_own_place_and_is_slowed_by_its_disk(
    stack: ExitStack, tmp_path: Path
) -> None:
    host = Network(stack, ["a"]).hosts["a"]
    place = Place(host.address, Disk(stack, tmp_path / "disk", "160m").path, host.before)
    with entered(host):
        etcd = stack.enter_context(an_etcd(tmp_path, places=[place]))
        assert (place.directory / "m0" / "member").is_dir()
        end = slow_disk(etcd.pid(0), WRITES_OF_ETCD, 0.4)
        began = time.monotonic()
        assert etcd.is_healthy(etcd.urls[0])  # of a proposal, which is written
        assert time.monotonic() - began >= 0.4
        end()
    host.cut_power()
    etcd.kill(0)


def test_lines_of_two_epochs_that_overlap_are_found(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    outputs = Outputs([one, other])
    one.write_text("1 a 1000000000 7\n1 a 3000000000 7\n1 a 40")
    other.write_text("2 b 3000000001 8\n")
    outputs.read()
    assert outputs.overlap_s() <= 0
    with one.open("a") as file:
        file.write("00000000 7\n")
    outputs.read()
    assert outputs.overlap_s() == pytest.approx(1.0)
