"""Containers of the image through what happens to them. All are on the host's loopback."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from .containers import BUILD_S, HARDENED, IMAGE, LIMITS, Container, Engine, base_name
from .stage import ask, free_port, until

TIMING = ("--failover-timeout=3", "--demote=1", "--margin=0.6")

WORK = """while echo "$FAILOVER_EPOCH $FAILOVER_SESSION" >> /srv/written; do
  (true &)
  sleep 0.02
done"""
"""Each round leaves a process to process 1."""

pytestmark = pytest.mark.timeout(BUILD_S + 200)  # the first one builds the image


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
