"""Floods of TLS connections at an agent's listeners: its role, its votes and its probe have to bear them."""

import contextlib
import http.client
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mosquitto import Authority

from . import flood
from .failsafe import failsafe_state
from .stage import Agent, Stage, free_port, until
from .workloads import output, start, writes
from .writer import written

RATE = 200
TIMING = ("--failover-timeout=8", "--demote=1", "--margin=1.2")
"""A question each 0.97 s, of which several may be lost on a busy machine."""

OUTAGE_S = 12.0
MORE_MIB = 16
"""The connections at once, and what Python keeps of them; without bounds it is a multiple of 100."""

ANSWER_S = 2.0
"""What a balancer or Kubernetes waits for, at most."""


@contextlib.contextmanager
def flooded(kind: str, *ports: int) -> Iterator[None]:
    words = [sys.executable, flood.__file__, kind, str(RATE), *map(str, ports)]
    with subprocess.Popen(words) as process:
        try:
            yield
            assert process.poll() is None
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["finished", "unfinished"])
def test_200_handshakes_a_second_cost_neither_the_role_nor_a_vote_nor_a_probe(
    tmp_path: Path, kind: str
) -> None:
    """At a voter's listener, and at the primary's listener and probe, in an outage of the coordinator."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("member")
    secret = tmp_path / "secret"
    secret.touch(0o600)
    secret.write_text("a secret of the whole group\n")
    trust = ssl.create_default_context(cafile=authority.file)
    with Stage(tmp_path) as stage:
        coordinator = stage.serve(store="sqlite")
        ports = {name: (free_port(), free_port()) for name in ("host-a", "host-b", "host-c")}

        def run(name: str) -> Agent:
            flags = (
                f"--failsafe-listen=127.0.0.1:{ports[name][0]}",
                f"--failsafe-secret-file={secret}",
                f"--failsafe-ca-file={authority.file}",
                f"--failsafe-certificate={certificate}",
                f"--failsafe-key={key}",
                f"--probe-listen=127.0.0.1:{ports[name][1]}",
                f"--probe-tls-certificate={certificate}",
                f"--probe-tls-key={key}",
            )
            command = writes(stage, name)
            return start(stage, name, coordinator, flags=flags, command=command, timing=TIMING)

        def is_primary(port: int) -> bool:
            """By a check that fails after three times without an answer, as in HAProxy and Kubernetes."""
            for _ in range(3):
                connection = http.client.HTTPSConnection(
                    "127.0.0.1", port, timeout=ANSWER_S, context=trust
                )
                with contextlib.closing(connection), contextlib.suppress(OSError):
                    connection.request("GET", "/primary")
                    return connection.getresponse().status == http.HTTPStatus.OK
            return False

        agents = [run(name) for name in ports]
        one = stage.until_primary(*agents, after_epoch=0)
        state = until(
            lambda: one.state if is_asking(one, len(agents)) else None, "failsafe to be ready"
        )
        voter = next(agent for agent in agents if agent is not one)
        flooded_agents = (one, voter)
        before_mib = [resident_mib(agent) for agent in flooded_agents]
        with flooded(kind, ports[voter.name][0], *ports[one.name]):
            coordinator.send(signal.SIGSTOP)
            since_s = time.monotonic()
            until(lambda: failsafe_state(one) == "holding", "the hold")
            while time.monotonic() < since_s + OUTAGE_S:
                assert is_primary(ports[one.name][1])
                assert failsafe_state(one) == "holding"
                time.sleep(0.1)
            coordinator.send(signal.SIGCONT)
            until(lambda: failsafe_state(one) == "ready", "the end of the hold")
            for agent, mib in zip(flooded_agents, before_mib, strict=True):
                assert resident_mib(agent) < mib + MORE_MIB
        assert one.state["epoch"] == state["epoch"]
        assert {line.host for line in written(output(stage)) if line.at_s > since_s} == {one.name}
        assert not any("Traceback" in agent.said() for agent in agents)


def resident_mib(agent: Agent) -> float:
    status = Path(f"/proc/{agent.popen.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def is_asking(agent: Agent, members: int) -> bool:
    failsafe = agent.state.get("failsafe") or {}
    return failsafe.get("state") == "ready" and failsafe.get("member_count") == members - 1
