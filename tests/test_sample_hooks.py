"""The samples in config/hooks: each run for what it is for, as far as one machine can."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

HOOKS = Path(__file__).parents[1] / "config/hooks"
SAMPLES = ("systemd-unit", "virtual-ip", "touch-file", "webhook")
LIMIT_S = 60

SYSTEMCTL = """#!/bin/sh
echo "$@" >> calls
case $1 in
restart) echo active > state ;;
stop) [ -e stubborn ] && echo deactivating > state || echo inactive > state ;;
kill) [ -e immortal ] || echo failed > state ;;
show) cat state ;;
esac
"""
"""A unit that stops when told, when killed if ``stubborn`` is there, and never if ``immortal`` is."""

VIRTUAL_IP = """
set -eu
ip link add dev0 type veth peer name dev1
ip link set dev0 up
ip link set dev1 up
FAILOVER_EVENT=secondary "$1"
FAILOVER_EVENT=primary "$1"
FAILOVER_EVENT=primary "$1"
echo "added: $(ip -o address show dev dev0 to "$IP" | wc -l)"
FAILOVER_EVENT=secondary "$1"
echo "left: $(ip -o address show dev dev0 to "$IP" | wc -l)"
FAILOVER_EVENT=secondary "$1"
ip address add "$IP/$OTHER" dev dev0
if FAILOVER_EVENT=secondary "$1"; then echo "said gone"; else echo "said not gone"; fi
ip link delete dev0
FAILOVER_EVENT=secondary "$1"
"""


def run(
    name: str, event: str, tmp_path: Path, stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """One run with the variables that a hook has."""
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "FAILOVER_EVENT": event, **variables}
    return subprocess.run(
        [HOOKS / name],
        input=stdin,
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_executable_and_documents_what_it_needs(name: str, tmp_path: Path) -> None:
    assert os.access(HOOKS / name, os.X_OK)
    assert (HOOKS / name).read_text().splitlines()[1].startswith(f"# {name}: ")
    result = run(name, "primary", tmp_path)
    assert result.returncode != 0
    assert "in hook_environment" in result.stderr


def test_every_sample_is_tested_here() -> None:
    assert {path.name for path in HOOKS.iterdir()} == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_shellcheck_finds_nothing_in_a_sample(name: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs: shellcheck: apt-get install shellcheck")
    result = subprocess.run(
        ["shellcheck", HOOKS / name], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")


# --- touch-file -------------------------------------------------------------------------------


def test_touch_file_makes_the_file_with_the_epoch_and_removes_it(tmp_path: Path) -> None:
    active = tmp_path / "active"
    for _ in range(2):
        made = run("touch-file", "primary", tmp_path, ACTIVE_FILE=str(active), FAILOVER_EPOCH="7")
        assert (made.returncode, active.read_text()) == (0, "7\n")
    for _ in range(2):
        assert run("touch-file", "secondary", tmp_path, ACTIVE_FILE=str(active)).returncode == 0
        assert list(tmp_path.iterdir()) == []


# --- systemd-unit -----------------------------------------------------------------------------


@pytest.fixture
def unit(tmp_path: Path) -> Mapping[str, str]:
    """Variables for a unit of a systemctl that is not the system's."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/systemctl").write_text(SYSTEMCTL)
    (tmp_path / "bin/systemctl").chmod(0o755)
    (tmp_path / "state").write_text("inactive\n")
    return {"UNIT": "x.service", "RUN_DIR": str(tmp_path), "FAILOVER_DEADLINE_MS": "400"}


def calls(tmp_path: Path) -> list[str]:
    return [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]


def test_systemd_unit_starts_with_the_epoch_and_stops(
    tmp_path: Path, unit: Mapping[str, str]
) -> None:
    assert run("systemd-unit", "primary", tmp_path, FAILOVER_EPOCH="7", **unit).returncode == 0
    assert "FAILOVER_EPOCH=7" in (tmp_path / "x.service.failover").read_text().splitlines()
    for _ in range(2):
        assert run("systemd-unit", "secondary", tmp_path, **unit).returncode == 0
        assert (tmp_path / "state").read_text() == "inactive\n"
    assert not (tmp_path / "x.service.failover").exists()
    assert calls(tmp_path) == ["restart", "stop", "show", "stop", "show"]


def test_systemd_unit_kills_one_that_takes_too_long(
    tmp_path: Path, unit: Mapping[str, str]
) -> None:
    run("systemd-unit", "primary", tmp_path, **unit)
    (tmp_path / "stubborn").touch()
    result = run("systemd-unit", "secondary", tmp_path, **unit)
    assert (result.returncode, (tmp_path / "state").read_text()) == (0, "failed\n")
    assert "kill" in calls(tmp_path)


def test_systemd_unit_fails_if_the_unit_still_runs(tmp_path: Path, unit: Mapping[str, str]) -> None:
    run("systemd-unit", "primary", tmp_path, **unit)
    (tmp_path / "stubborn").touch()
    (tmp_path / "immortal").touch()
    result = run("systemd-unit", "secondary", tmp_path, **unit)
    assert result.returncode == 1
    assert "still runs" in result.stderr


def test_systemd_unit_fails_without_systemctl(tmp_path: Path, unit: Mapping[str, str]) -> None:
    (tmp_path / "bin/systemctl").write_text("#!/bin/sh\nexit 1\n")
    assert run("systemd-unit", "secondary", tmp_path, **unit).returncode == 1


# --- virtual-ip -------------------------------------------------------------------------------


@pytest.mark.parametrize(("ip", "length", "other"), [("192.0.2.10", 24, 25), ("fd00::10", 64, 65)])
def test_virtual_ip_adds_and_removes_the_address_and_looks(
    tmp_path: Path, ip: str, length: int, other: int
) -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs: network namespaces: run as root, with apt-get install iproute2")
    result = subprocess.run(
        ["unshare", "--net", "sh", "-c", VIRTUAL_IP, "sh", HOOKS / "virtual-ip"],
        env={
            "PATH": os.environ["PATH"],
            "ADDRESS": f"{ip}/{length}",
            "DEVICE": "dev0",
            "IP": ip,
            "OTHER": str(other),
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert [line for line in said if ":" in line or "said" in line][:3] == [
        "added: 1",
        "left: 0",
        "said not gone",
    ]
    assert said[-1] == f"there is no dev0, and so no {ip} on it"


def test_virtual_ip_fails_without_the_ip_command(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ip").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/ip").chmod(0o755)
    result = run("virtual-ip", "secondary", tmp_path, ADDRESS="192.0.2.1/24", DEVICE="dev0")
    assert result.returncode == 1


@pytest.mark.parametrize("kind", ["Thomas Habets", "iputils"])
def test_virtual_ip_announces_the_address_by_either_arping(tmp_path: Path, kind: str) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("ip", '[ "$2" != address ] || echo 1'),
        ("arping", f'[ "$1" != -h ] || {{ echo "{kind}"; exit 1; }}\necho "$*" >> calls'),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    variables = {"ADDRESS": "192.0.2.1/24", "DEVICE": "dev0"}
    assert run("virtual-ip", "primary", tmp_path, **variables).returncode == 0
    flag = "-i dev0" if kind == "Thomas Habets" else "-I dev0"
    assert flag in (tmp_path / "calls").read_text()


ADVERTISED = """
import socket, subprocess, sys

for words in ("add dev0 type veth peer peer0", "set dev0 up", "set peer0 up"):
    subprocess.run(["ip", "link", *words.split()], check=True)
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x86DD))
wire.bind(("peer0", 0))
wire.settimeout(5)
subprocess.run([sys.argv[1]], check=True)
target = socket.inet_pton(socket.AF_INET6, "fd00::10")
while True:
    frame = wire.recv(2000)
    if frame[20] == socket.IPPROTO_ICMPV6 and frame[54] == 136 and frame[62:78] == target:
        break
words = [frame[i] << 8 | frame[i + 1] for i in range(22, len(frame), 2)]
total = sum(words) + len(frame[54:]) + socket.IPPROTO_ICMPV6
assert (total & 0xFFFF) + (total >> 16) == 0xFFFF, "a wrong checksum"
assert (frame[:6].hex(), frame[21], frame[58]) == ("333300000001", 255, 0x20)
assert frame[78:] == bytes([2, 1]) + frame[6:12], "another link-layer address"
"""


def test_virtual_ip_advertises_an_ipv6_address_to_the_neighbours(tmp_path: Path) -> None:
    """Without it they send to the host that had the address before, for some 40 s."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs: network namespaces: run as root, with apt-get install iproute2")
    variables = {"FAILOVER_EVENT": "primary", "ADDRESS": "fd00::10/64", "DEVICE": "dev0"}
    result = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", ADVERTISED, HOOKS / "virtual-ip"],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


# --- webhook ----------------------------------------------------------------------------------


class Receiver(HTTPServer):
    """Keeps what it is sent, and answers with ``status``."""

    status = 204

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(server.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_webhook_posts_the_facts_and_fails_by_the_status(
    tmp_path: Path, receiver: Receiver
) -> None:
    facts = '{"event": "lost", "epoch": 7}'
    assert run("webhook", "lost", tmp_path, facts, WEBHOOK_URL=receiver.url).returncode == 0
    assert receiver.bodies == [facts.encode()]
    receiver.status = 503
    result = run("webhook", "lost", tmp_path, facts, WEBHOOK_URL=receiver.url)
    assert result.returncode != 0
    assert "503" in result.stderr
