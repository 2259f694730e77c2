"""What a real etcd does beyond dying: it is full, compacted, given users, loses a lease, gets another member (R19).

In all of it a workload stays active on one host, or, where nobody may lead, etcd's own words name the reason.
"""

import base64
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.etcd import EtcdServer, an_etcd

from .stage import Coordinator, Stage, ask, until
from .test_several_coordinators import (
    Cluster,
    check_unmoved,
    leads,
    number,
    pair_of,
    running,
)

GROUP = {"Id": "g", "FailoverTimeout": "00:00:30"}


def text(value: str) -> str:
    return base64.b64encode(value.encode()).decode()


def etcdctl(etcd: EtcdServer, *words: str) -> str:
    """One command of etcd's own client."""
    program = shutil.which("etcdctl")
    if program is None:
        pytest.skip("needs: etcdctl: apt-get install etcd-client")
    command = [program, "--endpoints", ",".join(etcd.urls), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with an_etcd(tmp_path) as server:
        yield server


def readiness(coordinator: Coordinator) -> tuple[int, str]:
    base = coordinator.endpoint.removesuffix("/api/v1/clientfailover")
    answer = ask("GET", f"{base}/readyz")
    return answer.status, answer.body.get("Reason", "")


def test_r19_an_etcd_without_space_costs_no_role(stage: Stage, tmp_path: Path) -> None:
    """Heartbeats that only renew go on. What would change a record is refused with etcd's reason."""
    with an_etcd(tmp_path, flags=("--quota-backend-bytes=2000000",)) as etcd:
        leader, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
        agent, epoch = running(stage, leader, standby)
        fill = {"key": text("/other"), "value": text("x" * 500_000)}
        until(lambda: ask("POST", f"{etcd.urls[0]}/v3/kv/put", fill).status != 200, "no space")
        check_unmoved(stage, agent, epoch, 4.0)
        for one in (leader, standby):
            refused = one.ask("POST", "groups", GROUP)
            assert refused.status == 503
            assert "database space exceeded" in refused.body["Reason"]
            assert "nothing was changed" in refused.body["Reason"]
        revision = etcdctl(etcd, "get", "/other", "--write-out=fields", "--keys-only")
        newest = revision.split('"Revision" : ')[1].split()[0]
        etcdctl(etcd, "compact", newest)
        etcdctl(etcd, "defrag")
        etcdctl(etcd, "alarm", "disarm")
        until(lambda: standby.ask("POST", "groups", GROUP).status in {200, 201}, "space again")
        check_unmoved(stage, agent, epoch, 1.0)
        assert number(leader, "failover_coordinator_leaderships_total") == 1


def test_r19_a_revoked_lease_of_the_leader_costs_no_role(stage: Stage, etcd: EtcdServer) -> None:
    leader, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    agent, epoch = running(stage, leader, standby)
    keys = etcdctl(etcd, "get", "--prefix", f"/{stage.directory.name}/live/leaders/")
    member = keys.split('"Member": "')[1].split('"')[0]
    etcdctl(etcd, "lease", "revoke", f"{int(member):x}")
    until(lambda: leader.lines("session with etcd ended"), "the leader to notice")
    check_unmoved(stage, agent, epoch, 4.0)
    until(lambda: leads(leader) + leads(standby) == 1, "one leader")


def test_r19_compaction_of_etcd_ends_no_watch_for_long(stage: Stage, etcd: EtcdServer) -> None:
    """All revisions are compacted while other keys change, and then leadership moves as quickly as before."""
    leader, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    agent, epoch = running(stage, leader, standby)
    for _ in range(20):
        put = {"key": text("/other"), "value": text("x")}
        header = ask("POST", f"{etcd.urls[0]}/v3/kv/put", put).body["header"]
        compact = {"revision": header["revision"], "physical": True}
        assert ask("POST", f"{etcd.urls[0]}/v3/kv/compaction", compact).status == 200
    leader.send(signal.SIGTERM)
    until(lambda: standby.lines("leadership acquired"), "the standby to lead")
    assert leader.wait() == 0
    check_unmoved(stage, agent, epoch, 2.0)
    assert not standby.lines("session with etcd ended")


def test_users_of_etcd_that_are_turned_on_are_named_and_turned_off_again(
    stage: Stage, etcd: EtcdServer
) -> None:
    """A coordinator without a login has no session meanwhile, and stops to lead in time."""
    leader = Cluster(stage, etcd, "--shards=1").serve()
    until(lambda: leads(leader) == 1, "a leader")
    etcdctl(etcd, "user", "add", "root:secret")
    etcdctl(etcd, "user", "grant-role", "root", "root")
    etcdctl(etcd, "auth", "enable")
    until(lambda: readiness(leader)[0] == 503, "no session")
    until(lambda: "user name is empty" in readiness(leader)[1], "etcd's reason")
    until(lambda: leads(leader) == 0, "nobody to lead")
    assert leader.ask("GET", "groups/g/status").status == 503
    etcdctl(etcd, "--user=root:secret", "auth", "disable")
    until(lambda: leads(leader) == 1, "a leader again")
    assert len(leader.lines("session with etcd ended")) == 1


def test_r19_a_member_of_etcd_that_is_replaced_costs_no_role(stage: Stage, tmp_path: Path) -> None:
    """First it is replaced by a member of another, new cluster, as a wrong restart makes it; then properly."""
    with an_etcd(tmp_path, members=3) as etcd:
        leader, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1", "--leadership-ttl=1"))
        agent, epoch = running(stage, leader, standby)
        replaced = (etcd.leader() + 1) % 3
        kept = [url for number, url in enumerate(etcd.urls) if number != replaced]
        members = etcdctl(etcd, "member", "list").splitlines()
        old = next(line.split(",")[0] for line in members if etcd.urls[replaced] in line)
        etcd.kill(replaced)
        shutil.rmtree(tmp_path / f"m{replaced}")
        peer = etcd.peers[replaced]
        etcd.start(replaced, cluster=[replaced])
        etcd.wait_until_healthy(etcd.urls[replaced])
        check_unmoved(stage, agent, epoch, 4.0)
        stray = ask(
            "POST",
            f"{etcd.urls[replaced]}/v3/kv/range",
            {"key": text("\0"), "range_end": text("\0")},
        )
        assert stray.body.get("count", "0") == "0", "nothing of ours is written there"
        etcd.kill(replaced)
        shutil.rmtree(tmp_path / f"m{replaced}")
        command = ("--endpoints", ",".join(kept), "member")
        etcdctl(etcd, *command, "remove", old)
        etcdctl(etcd, *command, "add", f"m{replaced}", f"--peer-urls={peer}")
        etcd.start(replaced, state="existing")
        etcd.wait_until_healthy(etcd.urls[replaced])
        check_unmoved(stage, agent, epoch, 3.0)


def test_r19_a_host_with_a_leader_and_a_member_of_etcd_costs_no_role(
    stage: Stage, tmp_path: Path
) -> None:
    """The standby has asked that member for no group yet, and asks another one for its first."""
    with an_etcd(tmp_path, members=3) as etcd:
        lost = (etcd.leader() + 1) % 3
        cluster = Cluster(stage, etcd, "--shards=1")
        first = f"--etcd-endpoint={etcd.urls[lost]}"
        cluster.flags = (first, *(flag for flag in cluster.flags if flag != first))
        leader, standby = pair_of(stage, cluster)
        agent, epoch = running(stage, leader, standby)
        etcd.send(lost, signal.SIGSTOP)
        leader.send(signal.SIGKILL)
        leader.wait()
        check_unmoved(stage, agent, epoch, 5.0)
        assert leads(standby) == 1
        assert not standby.lines("shard cannot be loaded")


def test_r19_many_requests_wait_for_a_frozen_leader_and_delay_nothing_else(
    stage: Stage, etcd: EtcdServer
) -> None:
    """The follower keeps answering other requests; when it leads itself, it answers the ones that waited."""
    leader, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    agent, epoch = running(stage, standby)
    assert standby.ask("POST", "groups", GROUP).status == 201
    base = standby.endpoint.removesuffix("/api/v1/clientfailover")
    leader.send(signal.SIGSTOP)
    with ThreadPoolExecutor(200) as pool:
        path = "groups/g/status?after=1&wait=00:00:03"
        reads = [pool.submit(standby.ask, "GET", path) for _ in range(120)]
        calls = [pool.submit(standby.ask, "GET", "groups/g") for _ in range(60)]
        slowest_s = 0.0
        while not all(one.done() for one in calls):
            began = time.monotonic()
            assert ask("GET", f"{base}/healthz").status == 200
            slowest_s = max(slowest_s, time.monotonic() - began)
            time.sleep(0.02)
        assert {one.result().status for one in (*calls, *reads)} == {200}
    assert slowest_s < 1.0
    check_unmoved(stage, agent, epoch, 1.0)
    leader.send(signal.SIGCONT)
