"""Two hosts with a real systemd: the units as they are, with the wheel, through what happens to them.

Each host is a systemd-nspawn container on one Debian root, with a throw-away overlay; both are in
one network namespace of their own, so the coordinator on the first is on loopback for both. The
workload is the sample ``collector.service``, started by the sample hook; every instance appends its
epoch to one file, in which an epoch that goes back would be two active members.
"""

import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.ops.signals import IGNORED
from tests.mosquitto import mosquitto

from .stage import until

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = "systemd,systemd-sysv,dbus,python3,procps,openssl"
LEAN = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
TOOLS = ("systemd-nspawn", "mmdebstrap", "nsenter", "ip")
HOW = "as root, on Debian: apt-get install systemd-container mmdebstrap iproute2"
BUILD_S = 300
PATIENCE_S = 20.0
COMMAND_S = 60
PASSWORD = "the password"
LEFT = "/run/left-by-the-page.sh"
CGROUP_TOPS = [Path("/sys/fs/cgroup", name) for name in ("", "unified", "systemd")]
VENV = Path("opt/failover-agent")
AGENT, COORDINATOR, COLLECTOR = "failover-agent", "failover-coordinator", "collector"

LEASE_S = 3.0
WRITE_S = 0.02
FAILSAFE_PORT = 5480
CONFIG = """
group = "line-7"
failover_timeout = 3
demote = 1
margin = 0.6
hook_primary = ["/etc/failover-agent/hooks/systemd-unit"]
hook_secondary = ["/etc/failover-agent/hooks/systemd-unit"]
hook_environment = { UNIT = "collector.service" }
"""
WRITER = """#!/bin/sh
while echo "$FAILOVER_EPOCH" >> /srv/written; do sleep 0.02; done
"""

pytestmark = pytest.mark.timeout(BUILD_S + 300)  # the first one makes the root


def call(*argv: str | Path, limit_s: float = COMMAND_S) -> str:
    """The output of a command that succeeds."""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s, check=False
    )
    assert done.returncode == 0, f"{argv}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


# -- one Debian root with the wheel in it ----------------------------------------------------------


def install(root: Path, scratch: Path) -> None:
    """What docs/operations.md does on a host, without a package index."""
    scripts = root / VENV
    call("chroot", root, "python3", "-m", "venv", "--without-pip", f"/{VENV}")
    site = scripts / f"lib/python{PYTHON}/site-packages"
    names = re.findall(
        r"^([\w-]+)==", (ROOT / "requirements/runtime.txt").read_text(), re.MULTILINE
    )
    for name in (*names, "aiomqtt", "paho-mqtt"):  # the extra mqtt
        with suppress(importlib.metadata.PackageNotFoundError):  # for another system or Python
            copy(name, site)
    copy("pip", root / "mnt")
    call(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", scratch)
    (wheel,) = scratch.glob("*.whl")
    shutil.copy(wheel, root / "mnt")
    words = "install --quiet --no-deps --no-index --no-cache-dir --root-user-action=ignore"
    pip = ["env", "PYTHONPATH=/mnt", f"/{VENV}/bin/python", "-m", "pip"]
    call("chroot", root, *pip, *words.split(), f"/mnt/{wheel.name}")
    shutil.rmtree(root / "mnt")
    (root / "mnt").mkdir()


def copy(name: str, to: Path) -> None:
    """The files of a distribution of the environment that runs the tests."""
    for file in importlib.metadata.files(name) or ():
        if ".." not in file.parts:
            (to / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file.locate(), to / file)


def configure(root: Path) -> None:
    """Units, users, folders, the sample hook and the sample workload."""
    for unit in UNITS.glob("*.service"):
        shutil.copy(unit, root / "etc/systemd/system")
    for kind in ("sysusers", "tmpfiles"):
        (root / f"etc/{kind}.d").mkdir(exist_ok=True)
        shutil.copy(UNITS / f"{kind}.conf", root / f"etc/{kind}.d/{AGENT}.conf")
    hooks = root / "etc/failover-agent/hooks"
    hooks.mkdir(parents=True)
    shutil.copy(ROOT / "config/hooks/systemd-unit", hooks)
    (root / "etc/failover-agent/agent.toml").write_text(CONFIG)
    (root / "etc/failover-agent/coordinator.toml").write_text("minimum_hold = 0\n")
    shutil.copy(UNITS / "examples/collector.service", root / "etc/systemd/system")
    writer = root / "usr/local/bin/collector"
    writer.write_text(WRITER)
    writer.chmod(0o755)


@pytest.fixture(scope="module")
def debian() -> Iterator[Path]:
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0 or lacking:
        pytest.skip(f"needs: systemd-nspawn: {HOW}")
    if not platform.python_version().startswith(f"{PYTHON}."):
        pytest.skip(
            f"needs: Python {PYTHON}: it is the one of Debian {SUITE}, where the wheel goes"
        )
    with tempfile.TemporaryDirectory(prefix="failover-systemd-") as folder:
        root = Path(folder, "root")
        options = ["--quiet", "--variant=minbase", f"--include={PACKAGES}", "--mode=root", *LEAN]
        call("mmdebstrap", *options, "--dpkgopt=force-unsafe-io", SUITE, root, limit_s=BUILD_S)
        (root / "etc/machine-id").write_text("")
        (root / "etc/hostname").unlink(missing_ok=True)  # the name of this machine
        install(root, Path(folder, "wheel"))
        configure(root)
        yield root


# -- hosts -----------------------------------------------------------------------------------------


@dataclass
class Host:
    """A container that has booted."""

    name: str
    leader: int
    cursor: str = ""

    def run(self, *argv: str, limit_s: float = COMMAND_S) -> str:
        return call("nsenter", "-t", str(self.leader), "-a", *argv, limit_s=limit_s)

    def type(self, block: str, keys: str = "") -> None:
        """Run a block of a page in the shell that the one before has left, and answer it by keys.

        Folder and umask stay. The first shell is in the checkout, with the umask of a host on which
        others see nothing.
        """
        before = f"cd /srv/checkout\numask 027\n[ ! -e {LEFT} ] || . {LEFT}"
        after = f"echo \"cd '$PWD'; umask $(umask)\" >{LEFT}"
        shell = ["sh", "-euc", f"{before}\n{block}\n{after}"]
        argv = ["nsenter", "-t", str(self.leader), "-a", *shell]
        done = subprocess.run(
            argv, input=keys, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.returncode}: {done.stdout}{done.stderr}"

    def systemctl(self, *argv: str) -> str:
        return self.run("systemctl", *argv)

    def show(self, unit: str, *names: str) -> dict[str, str]:
        wanted = [f"--property={name}" for name in names]
        lines = self.systemctl("show", unit, *wanted).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def status(self, unit: str = AGENT) -> str:
        """What a person reads in the line ``Status:``."""
        return self.show(unit, "StatusText")["StatusText"]

    def until_status(self, start: str, unit: str = AGENT) -> str:
        def found() -> str | None:
            text = self.status(unit)
            return text if text.startswith(start) else None

        try:
            return until(found, f"{unit} on {self.name} to be {start!r}", PATIENCE_S)
        except AssertionError as error:
            log = self.journal(unit)
            raise AssertionError(f"{error}; it was {self.status(unit)!r}:\n{log}") from None

    def until_active(self, unit: str = AGENT) -> None:
        def active() -> bool:
            return self.show(unit, "ActiveState")["ActiveState"] == "active"

        until(active, f"{unit} on {self.name} to be active", PATIENCE_S)

    def main_pid(self, unit: str = AGENT) -> int:
        return int(self.show(unit, "MainPID")["MainPID"])

    def signal(self, number: signal.Signals, unit: str = AGENT) -> None:
        """To the main process, by the kernel: systemd adds nothing to it."""
        self.run("kill", f"-{number.name.removeprefix('SIG')}", str(self.main_pid(unit)))

    def until_logged(self, text: str, unit: str = AGENT) -> None:
        until(lambda: text in self.journal(unit), f"{text!r} from {self.name}", PATIENCE_S)

    def journal(self, unit: str = AGENT, form: str = "cat") -> str:
        """What was logged since ``clear``."""
        words = [f"--after-cursor={self.cursor}"] if self.cursor else []
        return self.run("journalctl", "--no-pager", f"--output={form}", "--unit", unit, *words)

    def urgent(self, priority: int) -> list[str]:
        """What of it is at least so urgent: 3 is an error, 4 a warning.

        With --priority= the first entry after a cursor is missed.
        """
        entries = [json.loads(line) for line in self.journal(form="json").splitlines()]
        return [e["MESSAGE"] for e in entries if int(e["PRIORITY"]) <= priority]

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        program = "import os,sys; p=sys.argv[1]; os.makedirs(os.path.dirname(p), exist_ok=True)"
        program += "; open(p, 'w').write(sys.argv[2]); os.chmod(p, int(sys.argv[3]))"
        self.run("python3", "-c", program, path, text, str(mode))

    def configure(self, demotion: str, config: str = CONFIG) -> None:
        """Settings with another demotion hook."""
        path = "/etc/failover-agent/hooks/slow"
        self.write(path, demotion, 0o755)
        config = re.sub(r"(?m)^hook_secondary = .*", f'hook_secondary = ["{path}"]', config)
        self.write("/etc/failover-agent/agent.toml", config)

    def drop_in(self, text: str, unit: str = AGENT) -> None:
        """For this host until it is ended by ``clear``."""
        self.write(f"/run/systemd/system/{unit}.service.d/{secrets.token_hex(4)}.conf", text)
        self.systemctl("daemon-reload")

    def clear(self) -> None:
        self.run("sh", "-c", "rm -rf /run/systemd/system/*.service.d")
        self.write("/etc/failover-agent/agent.toml", CONFIG)
        self.systemctl("daemon-reload")
        self.systemctl("reset-failed")
        last = self.run("journalctl", "--no-pager", "--lines=1", "--show-cursor", "--output=cat")
        self.cursor = last.rpartition("-- cursor: ")[2].strip()

    def state(self) -> dict[str, Any]:
        text = self.run("sh", "-c", f"cat /run/failover-agent/line-7.{self.name}.json")
        return dict(json.loads(text))


def cell(stack: ExitStack, name: str) -> list[Path]:
    """Control groups for one container: with two in one, systemd cannot tell their processes apart."""
    made = []
    name = f"failover-{name}-{secrets.token_hex(4)}"  # one for all: nspawn makes it in both
    for top in CGROUP_TOPS:
        if (top / "cgroup.procs").exists():
            made.append(top / name)
            made[-1].mkdir()
            stack.callback(remove, made[-1])
    return made


def remove(cgroup: Path) -> None:
    """With what is below; the kernel takes a moment to see that it is empty."""

    def gone() -> bool:
        for folder, _, _ in os.walk(cgroup, topdown=False):
            with suppress(OSError):
                Path(folder).rmdir()
        return not cgroup.exists()

    until(gone, f"{cgroup} to be empty")


def boot(stack: ExitStack, root: Path, namespace: str, shared: Path, name: str) -> Host:
    cells = cell(stack, name)
    log = stack.enter_context((shared / f"{name}.log").open("wb"))
    process = subprocess.Popen(
        [
            *(
                "sh",
                "-c",
                'for c; do [ "$c" != -- ] || break; echo $$ > "$c"; shift; done; shift; exec "$@"',
            ),
            *("sh", *(str(cgroup / "cgroup.procs") for cgroup in cells), "--"),
            *("systemd-nspawn", "--quiet", "--boot", f"--directory={root}", "--volatile=overlay"),
            *("--register=no", "--keep-unit", f"--machine={name}-{secrets.token_hex(4)}"),
            *(f"--hostname={name}", f"--network-namespace-path=/run/netns/{namespace}"),
            # For IPAddressDeny=, which is nothing but a line of text without them.
            *("--capability=CAP_BPF,CAP_NET_ADMIN,CAP_SYS_RESOURCE", "--system-call-filter=bpf"),
            *(f"--bind={shared}:/srv", "--console=read-only", "--link-journal=no"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    stack.callback(process.wait, COMMAND_S)
    stack.callback(process.kill)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def leader() -> int | None:
        """Its process 1, which there is only after some forks."""
        assert process.poll() is None, (shared / f"{name}.log").read_text()
        for pid in map(int, children.read_text().split()):
            with suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                    return pid
        return None

    host = Host(name, until(leader, f"{name} to start"))
    stack.callback(end, host.leader)

    def booted() -> bool:
        argv = ["nsenter", "-t", str(host.leader), "-a", "systemctl", "is-system-running"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=COMMAND_S)
        return done.stdout.strip() in {"running", "degraded"}

    until(booted, f"{name} to have booted", PATIENCE_S)
    return host


def end(leader: int) -> None:
    """Process 1 of a container takes everything in it along."""
    with suppress(ProcessLookupError):
        os.kill(leader, signal.SIGKILL)


@dataclass
class Plant:
    """Two hosts of one group; the coordinator is on the first."""

    a: Host
    b: Host
    written: Path

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.a, self.b

    def primary(self) -> tuple[Host, Host]:
        """Who is primary, and who is not; waits until somebody is, and the other is ready."""

        def found() -> tuple[Host, Host] | None:
            one, other = self.hosts
            said = one.status(), other.status()
            if said[0].startswith("Primary") and said[1].startswith("Secondary"):
                return one, other
            if said[1].startswith("Primary") and said[0].startswith("Secondary"):
                return other, one
            return None

        return until(found, "one primary and one secondary", PATIENCE_S)

    def epochs(self) -> list[int]:
        """Of every line that a workload wrote, in the order of the writing."""
        return [int(line) for line in self.written.read_text().split()]

    def until_written(self, after_epoch: int) -> None:
        until(lambda: max(self.epochs(), default=0) > after_epoch, "the successor to work")

    def check(self) -> None:
        epochs = self.epochs()
        assert epochs == sorted(epochs), "two were active"


@pytest.fixture(scope="module")
def booted(debian: Path) -> Iterator[Plant]:
    with ExitStack() as stack:
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="failover-shared-")))
        shared.chmod(0o755)
        namespace = f"failover-{secrets.token_hex(4)}"
        call("ip", "netns", "add", namespace)
        stack.callback(call, "ip", "netns", "delete", namespace)
        call("ip", "-n", namespace, "link", "set", "lo", "up")
        a, b = (boot(stack, debian, namespace, shared, name) for name in ("host-a", "host-b"))
        a.systemctl("start", COORDINATOR)
        yield Plant(a, b, shared / "written")


@pytest.fixture
def plant(booted: Plant) -> Iterator[Plant]:
    """Both agents have just been started, one is primary, and its workload writes."""
    booted.written.write_text("")
    for host in booted.hosts:
        host.clear()
        host.systemctl("restart", "--no-block", AGENT)
    for host in booted.hosts:
        host.until_active()
    booted.primary()
    booted.until_written(0)
    yield booted
    for host in booted.hosts:
        host.systemctl("stop", AGENT)
    booted.check()


def test_ready_is_sent_after_joining_and_the_status_shows_role_and_epoch(plant: Plant) -> None:
    plant.b.systemctl("stop", AGENT)
    plant.a.systemctl("stop", COORDINATOR, AGENT)
    plant.b.systemctl("start", "--no-block", AGENT)
    plant.b.until_status("starting, not yet in group line-7")
    assert plant.b.show(AGENT, "ActiveState")["ActiveState"] == "activating"
    plant.a.systemctl("start", COORDINATOR)
    plant.b.until_active()
    status = plant.b.until_status("Primary")
    epoch = plant.b.state()["epoch"]
    assert status == (
        f"Primary of line-7 epoch={epoch} (confirmed by the coordinator); registered in the group"
    )
    assert f'Status: "{status}"' in plant.b.systemctl("status", AGENT)


def test_after_a_sigkill_the_guard_demotes_and_systemd_restarts_the_agent(
    plant: Plant,
) -> None:
    one, other = plant.primary()
    # Later than another is chosen: an agent that is back sooner goes on with its lease.
    one.drop_in("[Service]\nRestartSec=6")
    epoch = one.state()["epoch"]
    one.signal(signal.SIGKILL)
    one.until_logged('command=/etc/failover-agent/hooks/systemd-unit result="exit 0"')
    urgent = "\n".join(one.urgent(4))
    assert "in the place of the agent: it is dead" in urgent
    assert "hook ended" not in urgent
    other.until_status("Primary")
    plant.until_written(epoch)
    one.until_status("Secondary")
    assert one.show(AGENT, "NRestarts")["NRestarts"] == "1"
    assert one.show(COLLECTOR, "ActiveState")["ActiveState"] == "inactive"


def test_the_guard_demotes_a_frozen_agent_before_another_is_chosen(plant: Plant) -> None:
    one, other = plant.primary()
    epoch = one.state()["epoch"]
    one.signal(signal.SIGSTOP)
    other.until_status("Primary")
    one.until_logged("in the place of the agent: it has not renewed its deadline")
    plant.until_written(epoch)
    one.until_status("Secondary")
    assert one.show(AGENT, "NRestarts")["NRestarts"] == "1"


def test_without_a_guard_systemds_watchdog_kills_a_frozen_agent(plant: Plant) -> None:
    """Its workload is bound to the unit, so it ends with it."""
    one, other = plant.primary()
    one.drop_in("[Service]\nWatchdogSec=1\nEnvironment=FAILOVER_AGENT_GUARD=false\nKillMode=mixed")
    one.systemctl("restart", AGENT)
    other.until_status("Primary")
    other.systemctl("stop", AGENT)
    one.until_status("Primary")
    one.signal(signal.SIGSTOP)
    one.until_logged("Watchdog timeout (limit 1s)!")
    until(lambda: one.show(AGENT, "NRestarts")["NRestarts"] == "1", "the restart", PATIENCE_S)
    one.until_status("Primary")


def test_a_reload_keeps_the_role_and_the_status(plant: Plant) -> None:
    one, other = plant.primary()
    before, pid = one.status(), one.main_pid()
    one.write(
        "/etc/failover-agent/agent.toml", CONFIG + "failover_score = 99\nprobe_listen = 'off'\n"
    )
    one.systemctl("reload", AGENT)
    one.until_logged("configuration read again")
    assert "settings not changed refused=probe_listen" in one.journal()
    one.until_active()
    assert (one.status(), one.main_pid()) == (before, pid)
    assert other.status().startswith("Secondary")


def test_the_unit_ignores_every_ordinary_signal(plant: Plant) -> None:
    """Faults 22 and 23: agent, guard and hooks are in one unit, and systemctl kill means them all."""
    one, _ = plant.primary()
    before = {unit: plant.a.main_pid(unit) for unit in (AGENT, COORDINATOR)}
    role, pid = one.status(), one.main_pid()
    for number in IGNORED:
        plant.a.systemctl("kill", f"--signal={int(number)}", AGENT, COORDINATOR)
        if one is not plant.a:
            one.systemctl("kill", f"--signal={int(number)}", AGENT)
    one.until_logged("signal ignored signal=SIGUSR1")
    plant.a.until_logged("configuration read again", COORDINATOR)
    assert before == {unit: plant.a.main_pid(unit) for unit in (AGENT, COORDINATOR)}
    assert (one.until_status("Primary"), one.main_pid()) == (role, pid)
    assert "guard ended" not in one.journal()


def test_systemd_restarts_the_agent_after_a_clean_exit_without_systemctl_stop(plant: Plant) -> None:
    """Fault 22: Restart=on-failure left a coordinator down after a signal like SIGINT."""
    before = plant.a.main_pid(COORDINATOR)
    plant.a.signal(signal.SIGINT, COORDINATOR)
    until(lambda: plant.a.main_pid(COORDINATOR) not in (0, before), "its restart", PATIENCE_S)
    plant.a.until_status("serving at", COORDINATOR)


def test_systemctl_stop_waits_for_the_demotion(plant: Plant) -> None:
    """TimeoutStopSec= of the unit is shorter; the agent has it extended, and hands over."""
    one, other = plant.primary()
    slow = "#!/bin/sh\nsystemctl stop collector\n[ $FAILOVER_OLD_ROLE = Secondary ] || sleep 3\n"
    one.configure(
        slow, CONFIG.replace("demote = 1", "demote = 6").replace("timeout = 3", "timeout = 12")
    )
    for host in plant.hosts:
        host.systemctl("stop", AGENT)
    plant.a.run(f"/{VENV}/bin/failover-agent", "groups", "delete", "line-7")
    one.drop_in("[Service]\nTimeoutStopSec=1")
    one.systemctl("start", AGENT)
    one.until_status("Primary")
    other.systemctl("start", AGENT)
    began_at = time.monotonic()
    one.systemctl("stop", AGENT)
    assert time.monotonic() - began_at > 3
    assert one.show(AGENT, "Result")["Result"] == "success"
    other.until_status("Primary")
    other.systemctl("stop", AGENT)
    plant.a.run(f"/{VENV}/bin/failover-agent", "groups", "delete", "line-7")
    plant.written.write_text("")  # a new group counts its epochs anew


def test_a_permanent_fault_causes_no_restart(plant: Plant) -> None:
    plant.b.write("/etc/failover-agent/agent.toml", CONFIG + "no_such_setting = 1\n")
    plant.b.systemctl("stop", AGENT)
    plant.b.systemctl("start", "--no-block", AGENT)
    shown = ("ActiveState", "ExecMainStatus", "NRestarts")

    def failed() -> bool:
        return plant.b.show(AGENT, *shown)["ActiveState"] == "failed"

    until(failed, "the unit to fail", PATIENCE_S)
    assert plant.b.show(AGENT, *shown) == {
        "ActiveState": "failed",
        "ExecMainStatus": "11",
        "NRestarts": "0",
    }
    assert any("no_such_setting" in line for line in plant.b.urgent(3))


def test_the_coordinator_shows_its_address_and_keeps_its_data_over_a_restart(plant: Plant) -> None:
    a = plant.a
    assert a.status(COORDINATOR) == "serving at http://127.0.0.1:5470"
    epoch = plant.primary()[0].state()["epoch"]
    a.signal(signal.SIGKILL, COORDINATOR)
    until(lambda: a.show(COORDINATOR, "NRestarts")["NRestarts"] == "1", "its restart", PATIENCE_S)
    a.until_status("serving at", COORDINATOR)
    assert plant.primary()[0].state()["epoch"] >= epoch
    owner = a.run("stat", "--format=%U %a", "/var/lib/failover-coordinator")
    assert owner.split() == ["failover-coordinator", "700"]


def test_systemds_watchdog_kills_a_frozen_coordinator(plant: Plant) -> None:
    a = plant.a
    a.drop_in("[Service]\nWatchdogSec=1", COORDINATOR)
    a.systemctl("restart", COORDINATOR)
    a.signal(signal.SIGSTOP, COORDINATOR)
    a.until_logged("Watchdog timeout (limit 1s)!", COORDINATOR)
    a.until_status("serving at", COORDINATOR)
    plant.primary()


@pytest.mark.parametrize("unit", [AGENT, COORDINATOR])
def test_a_unit_is_restarted_until_its_address_exists(plant: Plant, unit: str) -> None:
    """DHCP, or a virtual address: exit code 17, tried again each second."""
    a = plant.a
    for host in plant.hosts:
        host.systemctl("stop", AGENT)
    a.drop_in(
        "[Service]\nEnvironment=FAILOVER_AGENT_PROBE_LISTEN=192.0.2.77:9170"
        " FAILOVER_COORDINATOR_LISTEN=192.0.2.77:5470 FAILOVER_COORDINATOR_INSECURE=true",
        unit,
    )
    network = ("nsenter", "-t", str(a.leader), "-n", "ip", "address")
    try:
        a.systemctl("restart", "--no-block", unit)
        a.until_logged("192.0.2.77:", unit)
        until(lambda: int(a.show(unit, "NRestarts")["NRestarts"]) > 0, "a restart", PATIENCE_S)
        assert "annot assign requested address" in a.journal(unit)
        assert "status=17" in a.journal(unit)
        call(*network, "add", "192.0.2.77/32", "dev", "lo")
        a.until_active(unit)
        if unit == AGENT:
            assert a.state()["probe"] == "http://192.0.2.77:9170"
        else:
            assert a.status(unit) == "serving at http://192.0.2.77:5470"
    finally:
        call(*network, "flush", "to", "192.0.2.77/32", "dev", "lo")
        a.clear()
        a.systemctl("restart", COORDINATOR)


def test_the_agent_is_restarted_until_run_has_room(plant: Plant) -> None:
    """Exit code 19, tried again each second."""
    b, folder = plant.b, "/run/failover-agent"
    b.systemctl("stop", AGENT)
    b.run("mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs", folder)
    try:
        b.run("sh", "-c", f"cat /dev/zero 2>&- >{folder}/much || :")
        b.systemctl("start", "--no-block", AGENT)
        b.until_logged("No space left on device")
        until(lambda: int(b.show(AGENT, "NRestarts")["NRestarts"]) > 0, "a restart", PATIENCE_S)
        assert "status=19" in b.journal()
        b.run("rm", f"{folder}/much")
        b.until_active()
        assert b.state()["role"] in {"Primary", "Secondary"}
    finally:
        b.systemctl("stop", AGENT)
        b.run("umount", "--lazy", folder)


def test_the_network_drop_in_limits_who_reaches_the_coordinator(plant: Plant) -> None:
    a = plant.a
    network = ("nsenter", "-t", str(a.leader), "-n", "ip", "address")
    addresses = ("127.0.0.1", "192.0.2.78", "198.51.100.78")
    ask = "import socket, sys; at = sys.argv[1]"
    ask += "; socket.create_connection((at, 5470), 1, source_address=(at, 0)).close()"

    def answered() -> list[bool]:
        done = []
        for address in addresses:
            argv = ["nsenter", "-t", str(a.leader), "-a", "python3", "-c", ask, address]
            ran = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
            assert ran.returncode == 0 or "TimeoutError" in ran.stderr, ran.stderr
            done.append(ran.returncode == 0)
        return done

    for address in addresses[1:]:
        call(*network, "add", f"{address}/32", "dev", "lo")
    try:
        anywhere = "FAILOVER_COORDINATOR_LISTEN=0.0.0.0:5470 FAILOVER_COORDINATOR_INSECURE=true"
        a.drop_in(f"[Service]\nEnvironment={anywhere}", COORDINATOR)
        a.systemctl("restart", COORDINATOR)
        assert answered() == [True, True, True]
        a.drop_in((UNITS / "examples/coordinator-network.conf").read_text(), COORDINATOR)
        a.systemctl("restart", COORDINATOR)
        assert answered() == [True, True, False]
    finally:
        for address in addresses[1:]:
            call(*network, "delete", f"{address}/32", "dev", "lo")
        a.clear()
        a.systemctl("restart", COORDINATOR)


@pytest.fixture
def broker(plant: Plant, tmp_path: Path) -> Iterator[str]:
    """The URL of a mosquitto beside the hosts, which lets in a user with a password."""
    program = mosquitto()
    if program is None:
        pytest.skip("needs: mosquitto: apt-get install mosquitto")
    accounts, config = tmp_path / "accounts", tmp_path / "mosquitto.conf"
    call("mosquitto_passwd", "-b", "-c", accounts, "failover", "of the broker")
    config.write_text(
        f"listener 1883 127.0.0.1\nuser root\nallow_anonymous false\npassword_file {accounts}\n"
    )
    namespace = ("nsenter", "-t", str(plant.a.leader), "-n")
    process = subprocess.Popen(
        [*namespace, program, "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    yield "mqtt://127.0.0.1:1883"
    process.kill()
    process.wait()


def test_the_work_goes_on_under_the_failsafe_drop_in_while_the_coordinator_is_frozen(
    plant: Plant,
) -> None:
    """The secret is a credential of systemd (LoadCredential=)."""
    for number, host in enumerate(plant.hosts):
        host.write("/etc/failover-agent/secrets/failsafe", f"{'secret' * 4}\n", 0o600)
        listen = f'failsafe_listen = "127.0.0.1:{FAILSAFE_PORT + number}"\n'
        host.write("/etc/failover-agent/agent.toml", listen + CONFIG)
        host.drop_in((UNITS / "examples/agent-failsafe.conf").read_text())
        host.systemctl("restart", AGENT)
    ready = "failsafe ready members=1"
    until(lambda: any(ready in host.journal() for host in plant.hosts), "failsafe to be ready")
    one, other = plant.primary()
    epoch, lines = one.state()["epoch"], len(plant.epochs())
    plant.a.signal(signal.SIGSTOP, COORDINATOR)
    one.until_logged("failsafe hold begins")
    outage = round(2 * LEASE_S / WRITE_S)
    until(lambda: len(plant.epochs()) > lines + outage, "work beyond the lease")
    plant.a.signal(signal.SIGCONT, COORDINATOR)
    one.until_logged("failsafe hold ended")
    assert one.state()["epoch"] == epoch
    assert "failsafe promise" in other.journal()


def test_a_credential_is_the_password_for_a_broker(plant: Plant, broker: str) -> None:
    """The path that the example and docs/operations.md name; check-config finds it while it runs."""
    b = plant.b
    path = f"/run/credentials/{AGENT}.service/mqtt-password"
    example = (UNITS / "examples/agent-credentials.conf").read_text()
    assert f'password_file = "{path}"' in example
    lines = [line for line in example.splitlines() if line.startswith("#LoadCredential=mqtt-pass")]
    b.drop_in("\n".join(["[Service]", *(line[1:] for line in lines)]))
    secret = "/etc/failover-agent/secrets/mqtt-password"
    table = f'[mqtt]\nbroker = "{broker}"\nusername = "failover"\npassword_file = "{path}"\n'
    b.write("/etc/failover-agent/agent.toml", CONFIG + table)
    check = f"/{VENV}/bin/failover-agent check-config --config /etc/failover-agent/agent.toml"
    b.write(secret, "of somebody else\n", 0o600)
    b.systemctl("restart", AGENT)
    b.until_logged("role is not announced by MQTT")
    assert "ot authori" in b.journal()
    b.write(secret, "of the broker\n", 0o600)
    b.systemctl("restart", AGENT)
    b.until_logged("role is announced by MQTT")
    assert path in b.run(*check.split())
    b.systemctl("stop", AGENT)
    said = b.run("sh", "-c", f"{check} 2>&1 || echo $?")
    assert (path in said, said.split()[-1]) == (True, "12"), said
    assert "of the broker" not in b.journal()


# -- the page ---------------------------------------------------------------------------------------

BLOCK = re.compile(r"(?ms)^```(sh|toml)\n(.*?)^```$")


@pytest.fixture
def new_plant(plant: Plant) -> Iterator[Plant]:
    """Both hosts without what the page installs; restored after the test."""
    checkout = plant.written.parent / "checkout"
    for name in ("systemd", "config"):
        shutil.copytree(ROOT / name, checkout / name, dirs_exist_ok=True)
    name = "coordinator.example"
    forget = (
        "rm -rf /etc/systemd/system/failover-coordinator.service.d /var/lib/failover-coordinator/*"
        f" /etc/failover-agent/secrets /etc/failover-agent/*.toml /etc/failover-agent/ca.pem {LEFT}"
        " /run/failover-agent/*"  # else the agents refuse the store of the coordinator that is new
    )
    uninstall = (
        f"userdel {AGENT}; userdel {COORDINATOR}; rm -rf /usr/local/bin/{AGENT} /etc/{AGENT}"
        f" /etc/sysusers.d/{AGENT}.conf /etc/tmpfiles.d/{AGENT}.conf"
        " /etc/systemd/system/failover-* /etc/systemd/system/*.wants/failover-*"
    )
    for host in plant.hosts:
        host.systemctl("stop", AGENT, COORDINATOR)
        host.run("sh", "-c", f"{forget}; {uninstall}; echo 127.0.0.1 {name} >>/etc/hosts")
    plant.written.write_text("")  # the coordinator will count from 1
    yield plant
    for host in plant.hosts:
        host.systemctl("stop", AGENT, COORDINATOR)
        host.run("sh", "-c", forget)
        host.clear()
    plant.check()
    plant.a.write("/etc/failover-agent/coordinator.toml", "minimum_hold = 0\n")
    plant.a.systemctl("start", COORDINATOR)
    plant.written.write_text("")


@pytest.fixture
def typed(new_plant: Plant) -> Plant:
    """Every block of the page has been typed where it says, one after another: TLS and users."""
    page = (ROOT / "docs/operations.md").read_text()
    section = page.partition("## Five minutes")[2].partition("## More")[0]
    blocks = BLOCK.findall(section)
    kinds, (install_, secrets_, served, serve, password, joined, join) = zip(*blocks, strict=True)
    assert kinds == ("sh", "sh", "toml", "sh", "sh", "toml", "sh")
    umask, made, wheel, rest = install_.split("\n", 3)
    assert made == f"python3 -m venv /{VENV}"  # the root has it, and the network has no index
    assert wheel == f"/{VENV}/bin/pip install client_failover_agent-*.whl"
    a = new_plant.a
    for host in new_plant.hosts:
        host.type(f"{umask}\n{rest}")
    a.type(secrets_, PASSWORD + "\n")
    a.type("cat >/etc/failover-agent/coordinator.toml", served)
    a.type(serve)
    assert a.status(COORDINATOR) == "serving at https://0.0.0.0:5470"
    certificate = a.run("cat", "/etc/failover-agent/secrets/tls.crt")
    for host in new_plant.hosts:
        host.type("cat >/etc/failover-agent/ca.pem", certificate)
        host.type(password, PASSWORD + "\n")
        host.type("cat >/etc/failover-agent/agent.toml", joined)
        host.type(join)
    new_plant.primary()
    return new_plant


def test_the_commands_of_the_quick_start_work_as_typed(typed: Plant) -> None:
    one, other = typed.primary()
    typed.until_written(0)
    epoch = one.state()["epoch"]
    one.systemctl("stop", AGENT)
    typed.until_written(epoch)
    other.until_status("Primary of line-7")
    for host in typed.hosts:
        for unit in (AGENT, COORDINATOR):
            assert PASSWORD not in host.journal(unit)
            assert "answered 401" not in host.journal(unit)


def test_another_tenure_begins_when_the_collector_of_the_quick_start_has_crashed(
    typed: Plant,
) -> None:
    one, _ = typed.primary()
    typed.until_written(0)
    epoch = one.state()["epoch"]
    one.systemctl("kill", "--signal=KILL", COLLECTOR)
    typed.until_written(epoch)


def test_a_store_is_restored_by_the_commands_of_the_page_as_typed(typed: Plant) -> None:
    """The backup belongs to root, and the coordinator runs as another user; a next start is an ordinary one."""
    page = (ROOT / "docs/high-availability.md").read_text()
    section = page.partition("## Back up and restore")[2]
    (_, backup), (_, restore), (_, declare), (_, trust) = BLOCK.findall(section)
    a = typed.a
    words = "failover-agent status line-7 --json --config /etc/failover-agent/agent.toml"
    lift = "failover-agent failsafe lift line-7 --reason test --yes --epoch"
    at = "--config /etc/failover-agent/agent.toml"
    a.type("""echo 'administrator = ["user:agents"]' >>/etc/failover-agent/coordinator.toml""")
    a.type(backup)
    a.type(restore)
    a.type(declare)
    a.until_logged("restored store declared", COORDINATOR)
    found = json.loads(a.run(*words.split()))["Status"]
    assert (found["Failsafe"]["State"], found.get("Primary")) == ("Restricted", None), found
    a.systemctl("stop", COORDINATOR)
    a.type(trust.splitlines()[0])
    a.systemctl("start", COORDINATOR)
    assert json.loads(a.run(*words.split()))["Status"]["Epoch"] == found["Epoch"]

    def lifted() -> bool:
        done = a.run("sh", "-c", f"{lift} {found['Epoch']} {at} 2>&1 || true")
        assert "may be promoted" in done or "Try again" in done, done  # refused for the first L
        return "may be promoted" in done

    until(lifted, "the lift", PATIENCE_S)
    typed.primary()


def test_a_changed_users_file_is_in_force_after_a_restart(typed: Plant) -> None:
    """The coordinator of the five minutes has a copy of it, which a reload does not renew."""
    a, users = typed.a, "/etc/failover-agent/secrets/users"
    epochs = [host.state()["epoch"] for host in typed.hosts]
    status = "failover-agent status line-7 --config /etc/failover-agent/agent.toml 2>&1 || echo $?"
    a.run("sed", "-i", "s/^agents:/others:/", users)
    a.systemctl("reload", COORDINATOR)
    a.until_logged("configuration read again", COORDINATOR)
    assert "host-b" in a.run("sh", "-c", status)
    a.run("sed", "-i", "s/^others:/agents:/", users)
    a.systemctl("restart", COORDINATOR)
    assert "host-b" in a.run("sh", "-c", status)
    typed.primary()
    assert [host.state()["epoch"] for host in typed.hosts] == epochs
    a.run("sed", "-i", "s/^agents:/others:/", users)
    a.systemctl("restart", COORDINATOR)
    assert a.run("sh", "-c", status).split()[-1] == "26"


def test_a_wrong_password_is_logged_and_retried(typed: Plant) -> None:
    """The password is a credential, which systemd reads again at each start."""
    _, other = typed.primary()
    other.drop_in((UNITS / "examples/agent-credentials.conf").read_text())
    other.run("sed", "-i", "/^password_file/d", "/etc/failover-agent/agent.toml")
    path = "/etc/failover-agent/secrets/password"
    other.write(path, "swordfish\n", 0o600)
    other.systemctl("restart", "--no-block", AGENT)
    until(lambda: int(other.show(AGENT, "NRestarts")["NRestarts"]) > 0, "a restart", PATIENCE_S)
    (said, *_) = (line for line in other.urgent(3) if "error:" in line)
    assert "401" in said
    assert "credentials" in said
    assert "status=26" in other.journal()
    assert "swordfish" not in other.journal()
    other.write(path, PASSWORD + "\n", 0o600)
    other.until_active()
    other.until_status("Secondary")


def test_one_instance_a_group_under_the_strict_drop_in_with_a_credential(typed: Plant) -> None:
    """It runs as a user who cannot read the settings' password_file: the variable counts first."""
    b, unit = typed.b, f"{AGENT}@line-8"
    b.type("cd /etc/failover-agent; grep -E '^(endpoint|.*file|username)' agent.toml >line-8.toml")
    for name in ("agent-strict", "agent-credentials"):
        b.drop_in((UNITS / f"examples/{name}.conf").read_text(), unit)
    b.systemctl("start", "--no-block", unit)
    b.until_status("Primary of line-8", unit)
    assert b.run("ps", "-o", "user:20=", "-p", str(b.main_pid(unit))).strip() == AGENT
    b.systemctl("stop", unit)
    assert b.show(unit, "Result")["Result"] == "success"
