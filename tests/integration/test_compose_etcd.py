"""config/compose-etcd.yaml as processes of this machine: etcd, coordinators, and two hosts.

Each service gets a loopback address in place of its name, and a folder in place of its volumes.
"""

import contextlib
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # nothing else here would use its stubs

from tests.etcd import HINT

from .stage import Process, Stage, ask, environment, until

SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parents[2] / "config/compose-etcd.yaml").read_text()
)["services"]


class Here:
    """The services of the file on this machine, in a loopback network that no other test has."""

    def __init__(self, stage: Stage, directory: Path) -> None:
        self._stage = stage
        self._directory = directory
        network = f"127.{random.randrange(2, 250)}.{random.randrange(256)}"
        self.addresses = {name: f"{network}.{n}" for n, name in enumerate(SERVICES, 1)}

    def translate(self, name: str, text: str) -> str:
        """A word or variable of a service, as it is right here."""
        for other, address in self.addresses.items():
            text = re.sub(rf"\b{other}:(?=\d)", f"{address}:", text)
        text = text.replace("0.0.0.0", self.addresses[name]).replace("$$", "$")
        return re.sub(r"/(run|var/lib)/(failover-agent|etcd)\b", str(self.folder(name)), text)

    def environment(self, name: str) -> dict[str, str]:
        variables = SERVICES[name]["environment"]
        return {key: self.translate(name, value) for key, value in variables.items()}

    def folder(self, name: str) -> Path:
        """What the service may write."""
        path = self._directory / name
        path.mkdir(exist_ok=True)
        return path

    def start(self, name: str) -> Process:
        """Start a service that runs the image, with what the image itself sets."""
        image = {
            "RUNTIME_DIRECTORY": str(self.folder(name)),
            "FAILOVER_COORDINATOR_LISTEN": f"{self.addresses[name]}:5470",
        }
        words = [self.translate(name, word) for word in SERVICES[name]["command"]]
        return self._stage.process(name, *words, **image, **self.environment(name))

    def start_etcd(self, name: str) -> subprocess.Popen[bytes]:
        """Start a member, without arguments, as the image does."""
        program = shutil.which("etcd")
        if program is None:
            pytest.skip(HINT)
        with (self.folder(name) / "log").open("wb") as log:
            variables = environment(**self.environment(name))
            process = subprocess.Popen([program], env=variables, stdout=log, stderr=log)
        self._stage.later(process.wait)
        self._stage.later(process.kill)
        return process

    def ask(self, name: str, path: str) -> dict[str, Any]:
        """The answer of a coordinator; empty for any but 200."""
        with contextlib.suppress(OSError):
            answer = ask("GET", f"http://{self.addresses[name]}:5470/{path}")
            if answer.status == 200:
                return dict(answer.body)
        return {}

    def are_complete(self, names: Collection[str]) -> bool:
        """Whether these and no others are the coordinators, and every shard has a leader."""
        urls = sorted(f"http://{self.addresses[name]}:5470" for name in names)
        reports = [self.ask(name, "readyz") for name in names]
        return all(
            report.get("Coordinators") == urls and report["ShardsWithoutLeader"] == []
            for report in reports
        )

    def primary(self, name: str) -> tuple[str, int]:
        """Whom a coordinator knows as primary, and the epoch; waits until there is one."""

        def found() -> tuple[str, int] | None:
            status = self.ask(name, "api/v1/clientfailover/groups/line-7/status")
            return (status["Primary"], status["Epoch"]) if status.get("Primary") else None

        return until(found, f"{name} to know a primary")


def test_losing_a_coordinator_and_a_member_of_etcd_costs_no_role(
    stage: Stage, tmp_path: Path
) -> None:
    here = Here(stage, tmp_path)
    etcd = {name: here.start_etcd(name) for name in SERVICES if name.startswith("etcd-")}
    coordinators = {n: here.start(n) for n in SERVICES if n.startswith("coordinator-")}
    until(lambda: here.are_complete(coordinators), "three coordinators")
    for name in etcd:
        assert "unrecognized environment variable" not in (here.folder(name) / "log").read_text()

    for name in ("host-a", "host-b"):
        here.start(name)
    before = here.primary("coordinator-2")
    assert {here.primary(name) for name in coordinators} == {before}

    coordinators.pop("coordinator-1").send(signal.SIGKILL)
    etcd["etcd-1"].kill()
    until(lambda: here.are_complete(coordinators), "the others to lead everything")
    assert {here.primary(name) for name in coordinators} == {before}
