"""The image, built as the Dockerfile says, and containers of it through what happens to them.

The base image is made by mmdebstrap, under the name that the Dockerfile has, since no registry of
images can be asked; the wheels come from where this environment gets its own, in the locked versions.
Images and containers are in a folder of their own. All containers are on the host's loopback.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from .stage import ask, free_port, until

ROOT = Path(__file__).parents[2]
TOOLS = ("podman", "buildah", "runc", "mmdebstrap")
HOW = f"as root, on Debian: apt-get install {' '.join(TOOLS)}"
IMAGE = "localhost/failover-agent:test"
SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = "python3,python3-venv"
LEAN = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
GLIBC = ("manylinux2014", "manylinux_2_17", "manylinux_2_28", "manylinux_2_34")
PIP_CONF = "[global]\nno-index = true\nfind-links = /wheels\ndisable-pip-version-check = true\n"
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
HARDENED = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all")
TIMING = ("--failover-timeout=3", "--demote=1", "--margin=0.6")
STORAGE = "3g"
"""Of memory, at most; half of a gigabyte is used. Two to three times as quick as a disk."""

BUILD_S = 400
COMMAND_S = 60

WORK = """while echo "$FAILOVER_EPOCH $FAILOVER_SESSION" >> /srv/written; do
  (true &)
  sleep 0.02
done"""
"""Each round leaves a process to process 1."""

pytestmark = pytest.mark.timeout(BUILD_S + 200)  # the first one builds the image


def call(*argv: str | Path, limit_s: float = COMMAND_S) -> str:
    """The output of a command that succeeds."""
    code, said = attempt(*argv, limit_s=limit_s)
    assert code == 0, f"{argv}: {code}: {said}"
    return said


def attempt(*argv: str | Path, limit_s: float = COMMAND_S) -> tuple[int, str]:
    """Code and output of a command."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "DISABLE_HC_SYSTEMD": "true"},  # the test itself asks for health
        text=True,
        timeout=limit_s,
        check=False,
    )
    return done.returncode, done.stdout


class Engine:
    """podman and buildah, with storage of their own in one folder."""

    def __init__(self, folder: Path) -> None:
        self._storage = folder / "storage"
        where = [f"--root={self._storage}", f"--runroot={folder / 'run'}"]
        own = [f"--tmpdir={folder / 'tmp'}", "--runtime=runc", "--cgroup-manager=cgroupfs"]
        self._podman = ["podman", *where, *own, "--events-backend=file"]
        self._buildah = ["buildah", *where]

    def __call__(self, *args: str | Path) -> str:
        return call(*self._podman, *args, limit_s=BUILD_S)

    def attempt(self, *args: str) -> tuple[int, str]:
        return attempt(*self._podman, *args)

    def build(self, *args: str) -> str:
        options = ["--isolation=chroot", "--network=host", "--pull-never", "--format=docker"]
        return call(*self._buildah, "bud", *options, *args, limit_s=BUILD_S)

    def remove(self) -> None:
        """Every container, and what keeps the folder from being unmounted."""
        try:
            self("rm", "--all", "--force", "--time=0")
        finally:
            attempt("umount", str(self._storage / "overlay"))


class Container:
    """One container of the image, hardened as docs/container.md says."""

    def __init__(self, engine: Engine, name: str, options: list[str], *words: str) -> None:
        self._engine = engine
        self.name = name
        flags = ["--detach", f"--name={name}", "--network=host", "--log-driver=k8s-file"]
        engine("run", *flags, *HARDENED, *LIMITS, "--security-opt=no-new-privileges", *options,
               IMAGE, *words)  # fmt: skip

    def sh(self, script: str) -> tuple[int, str]:
        return self._engine.attempt("exec", self.name, "/bin/sh", "-c", script)

    def said(self) -> str:
        return self._engine("logs", self.name)

    def until_said(self, text: str) -> None:
        until(lambda: text in self.said(), f"{self.name} to say {text!r}")

    def is_well(self) -> bool:
        return self._engine.attempt("healthcheck", "run", self.name)[0] == 0

    def end(self) -> int:
        """SIGTERM, as an orchestrator does it; the exit code."""
        self._engine("stop", "--time=30", self.name)
        return self.code()

    def kill(self) -> None:
        self._engine("kill", "--signal=KILL", self.name)

    def code(self) -> int:
        """The exit code, once it has ended."""
        return int(self._engine("wait", self.name).strip().splitlines()[-1])


# -- the image -------------------------------------------------------------------------------------


def base_name() -> str:
    """The base that the Dockerfile names, without the digest, which a local image cannot have."""
    found = re.search(r"^ARG BASE=(\S+:\S+)@sha256:[0-9a-f]{64}$", dockerfile(), re.MULTILINE)
    assert found, "the Dockerfile pins no base"
    return found[1]


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def debian(kept: Path, scratch: Path) -> Path:
    """The root file system of that base, with Python; kept from one run to the next."""
    root = kept / f"{SUITE}.tar"
    if not root.exists():
        options = ["--quiet", "--variant=minbase", "--mode=root", f"--include={PACKAGES}", *LEAN]
        new = root.with_suffix(".new.tar")
        call("env", f"TMPDIR={scratch}", "mmdebstrap", *options, SUITE, new, limit_s=BUILD_S)
        new.rename(root)
    return root


def download(wheels: Path) -> None:
    """What the build will want from a package index, for the image's Python."""
    wanted = [
        "--implementation=cp",
        f"--python-version={PYTHON}",
        f"--abi=cp{PYTHON.replace('.', '')}",
    ]
    wanted += ["--abi=abi3", "--abi=none"]
    wanted += [f"--platform={glibc}_{platform.machine()}" for glibc in GLIBC]
    files = [f"--requirement={ROOT}/requirements/{name}.txt" for name in ("image", "build")]
    options = [
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        f"--dest={wheels}",
    ]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    call(*pip, *options, *wanted, *files, limit_s=BUILD_S)


@pytest.fixture(scope="module")
def engine(pytestconfig: pytest.Config) -> Iterator[Engine]:
    """With the image built."""
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in TOOLS):
        pytest.skip(f"needs: podman: {HOW}")
    assert pytestconfig.cache is not None
    with tempfile.TemporaryDirectory(prefix="failover-") as name:
        folder = Path(name)
        call("mount", "-t", "tmpfs", "-o", f"size={STORAGE}", "tmpfs", folder)
        engine = Engine(folder)
        try:
            root = debian(pytestconfig.cache.mkdir("container-base"), folder)
            engine("import", "--quiet", root, f"docker.io/library/{base_name()}")
            (folder / "wheels").mkdir()
            download(folder / "wheels")
            (folder / "pip.conf").write_text(PIP_CONF)
            engine.build(
                f"--build-arg=BASE={base_name()}",
                "--build-arg=VERSION=1.2.3",
                f"--volume={folder}/wheels:/wheels:ro",
                f"--volume={folder}/pip.conf:/etc/pip.conf:ro",
                f"--tag={IMAGE}",
                str(ROOT),
            )
            yield engine
        finally:
            engine.remove()
            call("umount", folder)


# -- containers ------------------------------------------------------------------------------------


class Group:
    """A coordinator, and hosts with a workload that writes to one file."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._srv = folder / "srv"
        self._srv.mkdir()
        os.chown(self._srv, 10001, 10001)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        healthy = f"failover-agent healthcheck --probe {self.url}/readyz"
        listen = [f"--env=FAILOVER_COORDINATOR_LISTEN=127.0.0.1:{port}"]
        options = [*listen, f"--health-cmd={healthy}", "--tmpfs=/run/failover-agent"]
        self.coordinator = Container(engine, "coordinator", options, "serve")
        self.coordinator.until_said("coordinator listening")

    def host(self, name: str) -> Container:
        words = ["exec", "--group=line-7", f"--endpoint={self.url}/api/v1/clientfailover"]
        words += [f"--session-id={name}", *TIMING, "--", "/bin/sh", "-c", WORK]
        host = Container(self._engine, name, [f"--volume={self._srv}:/srv"], *words)
        host.until_said("joined")
        return host

    def written(self) -> list[tuple[int, str]]:
        """Epoch and session of each line, in the order of writing."""
        with suppress(FileNotFoundError):
            lines = (self._srv / "written").read_text().splitlines()
            return [(int(line.split()[0]), line.split()[1]) for line in lines]
        return []

    def until_written_by(self, host: Container) -> int:
        """The epoch of the newest line, once it is that host's."""

        def found() -> int | None:
            newest = self.written()[-1:]
            return newest[0][0] if newest and newest[0][1] == host.name else None

        return until(found, f"{host.name} to write")

    def history(self) -> list[dict[str, Any]]:
        """The tenures, newest first."""
        path = "/api/v1/clientfailover/groups/line-7/history"
        return list(ask("GET", f"{self.url}{path}").body)


@pytest.fixture
def group(engine: Engine, tmp_path: Path) -> Iterator[Group]:
    try:
        yield Group(engine, tmp_path)
    finally:
        engine("rm", "--all", "--force", "--time=0", "--volumes")


def test_a_container_takes_over_from_a_killed_and_from_a_stopped_one(
    group: Group,
) -> None:
    """With a read-only root, no capability and no root user; SIGTERM is a graceful stop."""
    one = group.host("host-a")
    first = group.until_written_by(one)
    other = group.host("host-b")
    one.kill()
    second = group.until_written_by(other)
    again = group.host("host-c")
    assert other.end() == 0
    third = group.until_written_by(again)
    assert first < second < third
    epochs = [epoch for epoch, _ in group.written()]
    assert epochs == sorted(epochs), "an older epoch wrote after a newer one"
    newest_ended = next(entry for entry in group.history() if "WhyEnded" in entry)
    assert newest_ended["WhyEnded"] == "stopping"
    assert "agent stopped code=0" in other.said()
    assert again.end() == 0
    assert group.coordinator.end() == 0


def test_the_image_is_read_only_and_runs_without_root(group: Group) -> None:
    host = group.host("host-a")
    assert host.sh("id -u; id -g")[1].split() == ["10001", "10001"]
    assert "Read-only file system" in host.sh("touch /opt/failover-agent/x")[1]
    assert "Read-only file system" in host.sh("touch /tmp/x")[1]
    assert host.sh("grep -h ^CapEff: /proc/self/status")[1].split() == ["CapEff:", "0" * 16]
    code, _ = group.coordinator.sh("test -s /var/lib/failover-agent/coordinator.db")
    assert code == 0


def test_process_1_reaps_orphans_of_the_workload(group: Group) -> None:
    host = group.host("host-a")
    group.until_written_by(host)
    count = len(group.written())
    until(lambda: len(group.written()) > count + 20, "the workload to leave 20 processes")
    assert host.sh("cat /proc/1/comm")[1].strip() == "tini"
    zombies = host.sh("cat /proc/[0-9]*/stat 2>/dev/null | grep -c ' Z 1 '")[1]
    assert int(zombies) <= 1  # one may have ended just now


def test_the_health_check_fails_for_a_frozen_agent_and_the_guard_kills_it(
    group: Group,
) -> None:
    """As process 1 the agent could not be ended by anything in its container."""
    host = group.host("host-a")
    group.until_written_by(host)
    assert host.is_well()
    assert group.coordinator.is_well()
    assert host.sh("kill -STOP $(cat /run/failover-agent/*.lock)")[0] == 0
    assert not host.is_well()
    assert host.code() == 128 + 9
    assert "the guard demotes in the place of the agent" in host.said()


def test_the_image_has_labels_and_a_version(engine: Engine) -> None:
    (image,) = json.loads(engine("inspect", "--type=image", IMAGE))
    labels = image["Config"]["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.version"] == "1.2.3"
    assert image["Config"]["User"] == "10001:10001"
    code, output = engine.attempt("run", "--rm", "--network=none", *HARDENED, *LIMITS, IMAGE)
    assert code == 0
    assert "serve" in output
    added_mb = (int(image["Size"]) - size_of_base(engine)) / 1e6
    assert added_mb < 120, "docs/container.md states a size"


def size_of_base(engine: Engine) -> int:
    (base,) = json.loads(engine("inspect", "--type=image", f"docker.io/library/{base_name()}"))
    return int(base["Size"])
