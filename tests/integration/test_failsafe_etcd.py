"""Failsafe beside several coordinators over a real etcd: all of them, or etcd's majority, are away for long.

The same workload goes on in the same tenure, and no hook runs, whoever leads afterwards (R28, R33).
"""

import signal
from collections.abc import Iterator

import pytest

from tests.etcd import EtcdServer, an_etcd

from .failsafe import failsafe_state
from .stage import Agent, Coordinator, Stage, free_port, until
from .test_several_coordinators import TIMING, Cluster, check_unmoved, leads, pair_of

OUTAGE_S = 10.0
"""More than three L: the lease on record has ended by far."""


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with an_etcd(tmp_path_factory.mktemp("etcd"), members=3) as server:
        yield server


def running(stage: Stage, *coordinators: Coordinator) -> tuple[Agent, int]:
    """Two agents with failsafe; the primary, once it is ready, and its epoch."""
    secret = stage.directory / "failsafe-secret"
    secret.touch(0o600)
    secret.write_text("a secret of the whole group\n")
    agents = []
    for name in ("host-a", "host-b"):
        listen = f"--failsafe-listen=127.0.0.1:{free_port()}"
        flags = (listen, f"--failsafe-secret-file={secret}")
        agents.append(stage.run(name, *coordinators, timing=TIMING, flags=flags))
    one = stage.until_primary(*agents, after_epoch=0)
    until_ready(one)
    return one, one.state["epoch"]


def until_ready(agent: Agent) -> None:
    def ready() -> bool:
        members = agent.state.get("failsafe", {}).get("members", [])
        return failsafe_state(agent) == "ready" and len(members) == 1

    until(ready, "failsafe to be ready")


def until_holding(agent: Agent) -> None:
    until(lambda: failsafe_state(agent) == "holding", "the hold to begin")


def check_outage(stage: Stage, agent: Agent, epoch: int) -> None:
    """The tenure goes on by the vote of the other member, for longer than any lease."""
    until_holding(agent)
    check_unmoved(stage, agent, epoch, OUTAGE_S)
    assert failsafe_state(agent) == "holding"


def check_after(stage: Stage, agent: Agent, epoch: int, *left: Coordinator) -> None:
    """The same tenure goes on with the coordinator."""
    until_ready(agent)
    check_unmoved(stage, agent, epoch, 4.0)
    assert all(one.status()["Primary"] == agent.name for one in left)


def test_r28_a_primary_outlives_all_coordinators(stage: Stage, etcd: EtcdServer) -> None:
    both = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    agent, epoch = running(stage, *both)
    for one in both:
        one.send(signal.SIGSTOP)
    check_outage(stage, agent, epoch)
    for one in both:
        one.send(signal.SIGCONT)
    check_after(stage, agent, epoch, *both)


def test_r28_a_primary_outlives_the_majority_of_etcd(stage: Stage, etcd: EtcdServer) -> None:
    both = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    agent, epoch = running(stage, *both)
    stopped = {etcd.leader(), (etcd.leader() + 1) % 3}
    for member in stopped:
        etcd.send(member, signal.SIGSTOP)
    try:
        check_outage(stage, agent, epoch)
    finally:
        for member in stopped:
            etcd.send(member, signal.SIGCONT)
    check_after(stage, agent, epoch, *both)


def test_r33_another_leader_resumes_the_tenure_after_an_outage(
    stage: Stage, etcd: EtcdServer
) -> None:
    leader, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    agent, epoch = running(stage, leader, standby)
    standby.send(signal.SIGSTOP)
    leader.send(signal.SIGKILL)
    leader.wait()
    check_outage(stage, agent, epoch)
    standby.send(signal.SIGCONT)
    check_after(stage, agent, epoch, standby)
    assert leads(standby) == 1
