"""Several coordinators over a real etcd: the leader dies, freezes, or stops, and etcd loses its own leader.

Everywhere a workload is active on one host, and neither overlaps nor changes its host (R19).
"""

import base64
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from agent.coordinator.auth import hash_password
from tests.coordinator.raw import Raw
from tests.etcd import EtcdServer, an_etcd

from .disks import WRITES_OF_ETCD, slow_disk
from .requests import request
from .stage import Agent, Coordinator, Stage, ask, free_port, until

TIMING = ("--failover-timeout=3", "--demote=0.25", "--margin=0.6", "--beat=0.3")
"""R is 2.15 s: longer than a beat, the time to live of a leadership, and etcd's delay in ending it."""

TTL = "--leadership-ttl=1"


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with an_etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


class Cluster:
    """Coordinators of one store."""

    def __init__(self, stage: Stage, etcd: EtcdServer, *flags: str) -> None:
        self.stage = stage
        endpoints = [f"--etcd-endpoint={url}" for url in etcd.urls]
        prefix = f"--etcd-prefix=/{stage.directory.name}"
        self.flags = (*endpoints, prefix, TTL, *flags)

    def serve(self, *flags: str, port: int | None = None) -> Coordinator:
        """Start one, and wait until it has a session with etcd."""
        port = port or free_port()
        advertise = f"--advertise=http://127.0.0.1:{port}"
        one = self.stage.serve(*self.flags, advertise, *flags, port=port, store="etcd")
        one.until_said("session with etcd begun")
        return one


def number(coordinator: Coordinator, name: str) -> float:
    """A metric of a coordinator."""
    base = coordinator.endpoint.removesuffix("/api/v1/clientfailover")
    with urllib.request.urlopen(f"{base}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def answered(coordinator: Coordinator, route: str, code: int) -> float:
    """How many requests of a route a coordinator has answered with a status."""
    name = f'failover_coordinator_requests_total{{code="{code}",route="{route}"}}'
    try:
        return number(coordinator, name)
    except StopIteration:  # none so far
        return 0


def leads(coordinator: Coordinator) -> int:
    return int(number(coordinator, "failover_coordinator_shards_led"))


def pair_of(stage: Stage, cluster: Cluster) -> tuple[Coordinator, Coordinator]:
    """A leader of everything, and a hot standby."""
    leader = cluster.serve()
    until(lambda: leads(leader) == 1, "a leader")
    standby = cluster.serve()
    return leader, standby


def running(stage: Stage, *coordinators: Coordinator) -> tuple[Agent, int]:
    """Start two agents with the endpoints of all these coordinators; return the primary and its epoch."""
    agents = [stage.run(name, *coordinators, timing=TIMING) for name in ("host-a", "host-b")]
    one = stage.until_primary(*agents, after_epoch=0)
    for agent in agents:
        agent.until_said("joined")
    return one, one.state["epoch"]


def check_unmoved(stage: Stage, agent: Agent, epoch: int, seconds: float) -> None:
    """For some time nothing changes: the same tenure goes on, and no hook runs."""
    events = len(stage.events())
    end_at = time.monotonic() + seconds
    while time.monotonic() < end_at:
        state = agent.state
        assert (state["role"], state["epoch"]) == ("Primary", epoch), agent.said()
        time.sleep(0.05)
    assert len(stage.events()) == events
    assert stage.check_promise() == [epoch]


def test_r19_a_killed_leader_costs_no_role(stage: Stage, etcd: EtcdServer) -> None:
    leader, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    agent, epoch = running(stage, leader, standby)
    leader.send(signal.SIGKILL)
    leader.wait()
    check_unmoved(stage, agent, epoch, 5.0)
    assert leads(standby) == 1
    assert standby.status()["Epoch"] == epoch


def test_r19_a_frozen_leader_costs_no_role_and_answers_nothing_afterwards(
    stage: Stage, etcd: EtcdServer
) -> None:
    leader, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    agent, epoch = running(stage, leader, standby)
    leader.send(signal.SIGSTOP)
    check_unmoved(stage, agent, epoch, 4.0)
    position = len(leader.said())
    leader.send(signal.SIGCONT)
    leader.until_said("leadership ended", after=position)
    until(lambda: leads(leader) + leads(standby) == 1, "one leader")
    check_unmoved(stage, agent, epoch, 2.0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_r19_a_leader_that_is_gone_costs_no_role_through_a_follower(
    stage: Stage, etcd: EtcdServer, number: signal.Signals
) -> None:
    """The follower has requests there, and connections, when the leader ends or freezes."""
    leader, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    agent, epoch = running(stage, standby)
    leader.send(number)
    check_unmoved(stage, agent, epoch, 5.0)
    assert leads(standby) == 1
    assert standby.status()["Epoch"] == epoch


def test_r19_an_orderly_stop_hands_over_at_once(stage: Stage, etcd: EtcdServer) -> None:
    leader, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    agent, epoch = running(stage, leader, standby)
    leader.send(signal.SIGTERM)
    began = time.monotonic()
    until(lambda: standby.lines("leadership acquired"), "the standby to lead")
    took_s = time.monotonic() - began
    assert leader.wait() == 0
    check_unmoved(stage, agent, epoch, 3.0)
    assert not leader.lines("not handed over")
    assert took_s < 5.0, "measured by docs/high-availability.md on an idle machine: under 0.3 s"


def test_r19_a_change_of_etcds_leader_costs_no_role(stage: Stage, tmp_path: Path) -> None:
    with an_etcd(tmp_path, members=3) as etcd:
        cluster = Cluster(stage, etcd, "--shards=1", "--leadership-ttl=3")
        leader, standby = pair_of(stage, cluster)
        agent, epoch = running(stage, leader, standby)
        etcd.kill(etcd.leader())
        check_unmoved(stage, agent, epoch, 5.0)
        assert leads(leader) == 1, "a blip shorter than the time to live moves no leadership"
        assert number(leader, "failover_coordinator_leaderships_total") == 1


def test_r19_a_slow_disk_of_etcd_costs_no_leadership(stage: Stage, tmp_path: Path) -> None:
    """Etcd always has a change to write, so it answers after up to 2 s, while its leases last 3 s.

    etcd 3.5 waits for a majority before it renews a lease, and so tolerates only a shorter fsync.
    """
    version = subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=True)
    fsync_s = 0.5 if "etcd Version: 3.4." in version.stdout else 0.35
    with an_etcd(tmp_path, flags=("--election-timeout=2000",)) as etcd, ExitStack() as stack:
        leader = Cluster(stage, etcd, "--shards=1", "--leadership-ttl=3").serve()
        until(lambda: leads(leader) == 1, "a leader")
        sessions = "groups/g/clientsessions"
        assert (
            leader.ask("POST", "groups", {"Id": "g", "FailoverTimeout": "00:00:30"}).status == 201
        )
        for name in "abcd":
            assert leader.ask("POST", sessions, {"Id": name}).status == 201
        stack.callback(slow_disk(etcd.pid(0), WRITES_OF_ETCD, fsync_s))
        end_at = time.monotonic() + 15.0

        def keep_writing(name: str) -> int:
            path, done = f"{sessions}/{name}/roleoverride", 0
            while time.monotonic() < end_at:
                done += leader.ask("POST", path, {"Value": 1 + done % 2}).status == 200
            return done

        with ThreadPoolExecutor() as pool:
            done = sum(pool.map(keep_writing, "abcd"))
        assert done > 3
        assert leads(leader) == 1
        assert not leader.lines("session with etcd ended")
        assert number(leader, "failover_coordinator_leaderships_total") == 1


def test_r19_shards_spread_over_coordinators_as_they_come_and_go(
    stage: Stage, etcd: EtcdServer
) -> None:
    cluster = Cluster(stage, etcd)
    first = cluster.serve()
    until(lambda: leads(first) == 8, "the first to lead everything")
    agent, epoch = running(stage, first)
    second = cluster.serve()
    until(lambda: (leads(first), leads(second)) == (4, 4), "half of them each")
    third = cluster.serve()
    until(lambda: sorted(map(leads, (first, second, third))) == [2, 3, 3], "a third each")
    assert second.end() == 0
    until(lambda: (leads(first), leads(third)) == (4, 4), "half of them each")
    check_unmoved(stage, agent, epoch, 1.0)


def test_r19_any_coordinator_serves_any_request(stage: Stage, etcd: EtcdServer) -> None:
    cluster = Cluster(stage, etcd)
    coordinators = [cluster.serve() for _ in range(2)]
    until(lambda: list(map(leads, coordinators)) == [4, 4], "half of them each")
    names = [f"g{n}" for n in range(12)]
    for at, name in enumerate(names):
        asked = coordinators[at % 2]
        body = {"Id": name, "FailoverTimeout": "00:00:30"}
        assert asked.ask("POST", "groups", body).status == 201
        other = coordinators[1 - at % 2]
        assert other.ask("POST", "groups", body).status == 200
        path = f"groups/{name}/clientsessions"
        assert other.ask("POST", path, {"Id": "s"}).status == 201
        assert asked.ask("POST", f"{path}/s/heartbeat", {"FailoverScore": 1}).status == 200
        answers = [c.ask("GET", f"groups/{name}/status").body for c in coordinators]
        assert answers[0] == answers[1]
        assert answers[0]["Leader"] in [c.endpoint.partition("/api")[0] for c in coordinators]
    for coordinator in coordinators:
        listed = coordinator.ask("GET", "groups?skip=2&count=5")
        assert listed.headers["total-count"] == "12"
        assert [group["Id"] for group in listed.body] == sorted(names)[2:7]
        forwarded = partial(number, coordinator, "failover_coordinator_forwarded_requests_total")
        until(forwarded, "a request to be forwarded")


def test_r19_a_blocking_read_is_forwarded_and_follows_the_leader(
    stage: Stage, etcd: EtcdServer
) -> None:
    leader, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    group = {"Id": "g", "FailoverTimeout": "00:00:30"}
    assert standby.ask("POST", "groups", group).status == 201
    began = time.monotonic()
    read = standby.ask("GET", "groups/g/status?after=1&wait=00:00:01")
    assert (read.status, read.body["Revision"]) == (200, 1)
    assert time.monotonic() - began >= 1.0
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(standby.ask, "GET", "groups/g/status?after=1&wait=00:00:25")
        until(lambda: number(standby, "failover_coordinator_forwarded_requests_total") > 2, "it")
        assert leader.end() == 0
        assert not reading.done()
        standby.ask("POST", "groups/g/clientsessions", {"Id": "s"})
        standby.ask("POST", "groups/g/clientsessions/s/heartbeat", {"FailoverScore": 1})
        assert reading.result(10).body["PendingPrimary"] == "s"


def test_r19_a_coordinator_is_asked_by_the_name_that_it_advertises(
    stage: Stage, etcd: EtcdServer
) -> None:
    """On loopback every other name is refused, since a web page may have brought it."""
    port = free_port()
    flags = Cluster(stage, etcd).flags
    named = f"--advertise=http://coordinator-1.example:{port}"
    stage.serve(*flags, named, "--insecure", port=port, store="etcd")

    def status(host: str) -> int:
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/healthz", headers={"Host": host})
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return int(error.code)

    assert status(f"coordinator-1.example:{port}") == 200
    assert status(f"coordinator-2.example:{port}") == 403


@pytest.mark.parametrize("frozen", ["leader", "follower"])
def test_a_change_is_not_carried_out_after_its_caller_has_hung_up(
    stage: Stage, etcd: EtcdServer, frozen: str
) -> None:
    """An override waits in a frozen coordinator. Its caller gives up, and another override is acknowledged."""
    leader, follower = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    override = an_override(follower)
    one, other = (leader, follower) if frozen == "leader" else (follower, leader)
    one.send(signal.SIGSTOP)
    ask_and_hang_up(one, override, {"Value": 1})
    until(lambda: other.ask("POST", override, {"Value": 0}).status == 200, "an override")
    one.send(signal.SIGCONT)
    until(lambda: one.ask("GET", "groups/g").status == 200, "the thawed coordinator to answer")
    check_override(other, 0)


@pytest.mark.parametrize("frozen", ["leader", "follower"])
def test_a_late_registration_brings_no_deleted_session_back(
    stage: Stage, etcd: EtcdServer, frozen: str
) -> None:
    """It would be of a member that nobody runs, without whom failsafe is off for up to `dead_session_retention`."""
    leader, follower = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    one, other = (leader, follower) if frozen == "leader" else (follower, leader)
    session = an_override(other).rpartition("/")[0]

    def registrations() -> float:
        return sum(answered(one, "create_session", code) for code in (201, 499))

    before = registrations()
    one.send(signal.SIGSTOP)
    ask_and_hang_up(one, "groups/g/clientsessions", {"Id": "s"})
    until(lambda: other.ask("DELETE", session).status == 204, "the deletion")
    one.send(signal.SIGCONT)
    until(lambda: registrations() > before, "the thawed one to find the late request")
    assert other.ask("GET", session).status == 404


def test_a_forwarded_change_is_not_carried_out_after_its_caller_has_hung_up(
    stage: Stage, etcd: EtcdServer
) -> None:
    leader, follower = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    override = an_override(follower)
    leader.send(signal.SIGSTOP)
    ask_and_hang_up(follower, override, {"Value": 1})
    until(lambda: answered(follower, "set_override", 499) == 1, "the follower to drop the request")
    leader.send(signal.SIGCONT)
    until(lambda: leader.ask("GET", "groups/g").status == 200, "the thawed leader to answer")
    check_override(follower, 0)


def test_a_change_that_waits_does_not_begin_after_its_caller_has_hung_up(
    stage: Stage, etcd: EtcdServer
) -> None:
    """It waits for an earlier one. The coordinator reads no more from its connection, which has another request."""
    leader = Cluster(stage, etcd, "--shards=1", "--leadership-ttl=30").serve()
    override = an_override(leader)
    etcd.send(0, signal.SIGSTOP)
    with ThreadPoolExecutor() as pool, Raw(leader.endpoint) as caller:
        try:
            earlier = pool.submit(leader.ask, "POST", "groups/g/clientsessions", {"Id": "t"})
            time.sleep(0.3)  # it comes first
            caller.request("POST", f"/api/v1/clientfailover/{override}", {"Value": 1})
            time.sleep(0.3)  # else both are read at once, and reading goes on
            caller.request("GET", "/healthz")
            time.sleep(0.3)
            caller.socket.close()
        finally:
            etcd.send(0, signal.SIGCONT)
        assert earlier.result(20).status == 201
    until(lambda: answered(leader, "set_override", 499) == 1, "the leader to drop the request")
    check_override(leader, 0)


def an_override(coordinator: Coordinator) -> str:
    """The path of the override of a new session."""
    group = {"Id": "g", "FailoverTimeout": "00:00:30"}
    assert coordinator.ask("POST", "groups", group).status == 201
    assert coordinator.ask("POST", "groups/g/clientsessions", {"Id": "s"}).status == 201
    return "groups/g/clientsessions/s/roleoverride"


def ask_and_hang_up(coordinator: Coordinator, path: str, body: object) -> None:
    with pytest.raises(OSError, match="timed out"):
        request("POST", f"{coordinator.endpoint}/{path}", body, timeout_s=0.3)


def check_override(coordinator: Coordinator, value: int) -> None:
    """For a second it keeps this value."""
    end_at = time.monotonic() + 1.0
    while time.monotonic() < end_at:
        assert coordinator.ask("GET", "groups/g/clientsessions/s").body["RoleOverride"] == value
        time.sleep(0.05)


def test_r19_a_forwarded_request_is_not_forwarded_again(stage: Stage, etcd: EtcdServer) -> None:
    _, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    request = urllib.request.Request(
        f"{standby.endpoint}/groups/g/status", headers={"Failover-Forwarded": "somebody"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 503
    assert refused.value.headers["Retry-After"] == "1"
    with refused.value:
        assert b"does not lead" in refused.value.read()


def test_r19_a_follower_sends_on_one_request_for_one(stage: Stage, etcd: EtcdServer) -> None:
    """What could be read as two requests, or as another one, by the leader."""
    leader, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1"))
    url, base = standby.endpoint.split("/api")[0], "/api/v1/clientfailover/groups"
    smuggled = b'POST /api/v1/clientfailover/groups HTTP/1.1\r\nHost: localhost\r\n\r\n{"Id":"x"}'
    with Raw(url) as one:
        group = {"Id": "g", "FailoverTimeout": "00:00:30"}
        assert one.request("POST", base, group).answer().status == 201
        head = f"POST {base}/g/clientsessions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked"
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(smuggled), smuggled)
        assert one.send(f"{head}\r\n\r\n".encode() + chunks).answer().status == 400
        asked = one.request("GET", f"{base}/g%20HTTP%2e1", headers="Failover-Forwarded: 1\r\n")
        assert asked.answer().status == 503
        answer = one.request("GET", f"{base}/g%20HTTP%2e1").answer()
        assert (answer.status, "failover-forwarded" in answer.headers) == (404, False)
    for target in (
        b"GET %b/g/status?after=\xff",
        b"GET %b/g/status?a=\x80b",
        b"GET %b/g\x01/status",
    ):
        with Raw(url) as one:
            wrong = target % base.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
            assert one.send(wrong).answer().status == 400
    for lines in ("Content-Length: 2\r\nTransfer-Encoding: chunked", "Authorization: a\r\n b"):
        with Raw(url) as one:
            head = f"GET {base}/g/status HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n\r\n"
            assert one.send(head.encode()).answer().status == 400
    assert [group["Id"] for group in leader.ask("GET", "groups").body] == ["g"]
    with Raw(url) as one:  # HEAD has no body, and the next answer on the connection is whole
        answer = one.request("HEAD", f"{base}/g/status").answer(bodyless=True)
        assert (answer.status, one.unread) == (200, b"")
        assert one.request("GET", f"{base}/g").answer().status == 200


def test_another_number_of_shards_is_refused(stage: Stage, etcd: EtcdServer) -> None:
    cluster = Cluster(stage, etcd)
    cluster.serve("--shards=4").end()
    words = ("--store=etcd", "--advertise=http://127.0.0.1:1", "--listen=127.0.0.1:0")
    refused = stage.process("other", "serve", *cluster.flags, *words, "--shards=5")
    assert refused.wait() == 12
    assert "shards is 5" in refused.said()
    assert "made with 4" in refused.said()


def test_a_start_without_etcd_names_what_is_wrong(stage: Stage) -> None:
    port = free_port()
    words = ("--store=etcd", "--advertise=http://127.0.0.1:1", "--listen=127.0.0.1:0")
    process = stage.process("alone", "serve", f"--etcd-endpoint=http://127.0.0.1:{port}", *words)
    process.until_said("etcd cannot be used yet, retrying")
    assert f"etcd at http://127.0.0.1:{port} cannot be connected to" in process.said()


def test_readiness_names_a_lost_session_with_etcd(stage: Stage, tmp_path: Path) -> None:
    with an_etcd(tmp_path) as etcd:
        coordinator = Cluster(stage, etcd).serve()
        base = coordinator.endpoint.removesuffix("/api/v1/clientfailover")
        until(lambda: leads(coordinator) == 8, "a leader")
        ready = ask("GET", f"{base}/readyz")
        assert ready.status == 200
        assert ready.body == {
            "Status": "ok",
            "Url": base,
            "Coordinators": [base],
            "ShardsLed": list(range(8)),
            "ShardsWithoutLeader": [],
        }
        etcd.kill(0)
        until(lambda: ask("GET", f"{base}/readyz").status == 503, "not ready")
        assert "etcd" in ask("GET", f"{base}/readyz").body["Reason"]
        assert number(coordinator, "failover_coordinator_leadership_remaining_seconds") >= 0
        etcd.start(0)
        until(lambda: ask("GET", f"{base}/readyz").status == 200, "ready again")


def test_agents_go_on_with_a_store_that_was_copied_to_etcd(stage: Stage, etcd: EtcdServer) -> None:
    """The way of an upgrade to several coordinators, while agents run."""
    alone = stage.serve(store="sqlite")
    cluster = Cluster(stage, etcd)
    port = free_port()
    later = f"http://127.0.0.1:{port}/api/v1/clientfailover"
    agent = stage.run("host-a", alone.endpoint, later, timing=("--failover-timeout=10",))
    epoch = agent.until_role("Primary")["epoch"]
    backup = stage.directory / "backup.db"
    data = f"--data-dir={stage.directory / 'data'}"
    assert stage.process("backup", "store", "backup", data, f"--to={backup}").wait() == 0
    assert backup.exists()
    assert alone.end() == 0
    flags = [flag for flag in cluster.flags if flag != TTL]
    words = ("store", "copy", f"--from={stage.directory / 'data'}", "--to=etcd", *flags)
    copying = stage.process("copy", *words)
    assert copying.wait() == 0, copying.said()
    served = cluster.serve(port=port)
    agent.until_role("Primary", after_epoch=epoch - 1)
    until(lambda: served.status().get("Primary") == "host-a", "the primary in etcd")
    assert served.history()[0]["Epoch"] == 1, "the history was copied too"
    again = stage.process("again", "serve", f"--listen=127.0.0.1:{free_port()}", data)
    assert again.wait() == 36
    assert "must not be served beside the copy" in again.said()
    assert not agent.lines("another store")
    stage.check_promise()


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (("--from=/x", "--to=/y"), "one of --from and --to must be etcd"),
        (
            ("--from=/absent", "--to=etcd"),
            "etcd_endpoint is not set: name one with --etcd-endpoint",
        ),
        (
            ("--from=/absent", "--to=etcd", "--etcd-endpoint=http://127.0.0.1:1"),
            "/absent has no coordinator.db",
        ),
    ],
)
def test_a_wrong_copy_is_one_error(stage: Stage, words: tuple[str, ...], wrong: str) -> None:
    process = stage.process("copy", "store", "copy", *words)
    assert process.wait() != 0
    assert wrong in process.said()
    assert len(process.said().splitlines()) == 1


def test_r19_a_forwarded_request_carries_the_callers_credentials(
    stage: Stage, etcd: EtcdServer
) -> None:
    """Both check them: the first before it forwards, the leader before it answers."""
    users = stage.directory / "users"
    users.touch(0o600)
    users.write_text(f"ann:{hash_password('secret', ())}\n")
    cluster = Cluster(stage, etcd, "--shards=1", f"--users-file={users}")
    leader, standby = pair_of(stage, cluster)
    for coordinator, user, status in (
        (standby, "ann:secret", 404),
        (leader, "ann:secret", 404),
        (standby, "ann:wrong", 401),
        (standby, None, 401),
        (leader, "ann:wrong", 401),
    ):
        request = urllib.request.Request(f"{coordinator.endpoint}/groups/absent")
        if user is not None:
            basic = base64.b64encode(user.encode()).decode()
            request.add_header("Authorization", f"Basic {basic}")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        with refused.value:
            assert refused.value.code == status
    assert number(standby, "failover_coordinator_forwarded_requests_total") == 1


def state_of_new_group(coordinator: Coordinator, group: str) -> object:
    """Failsafe's state of a group that is created now, with one session."""
    coordinator.ask("POST", "groups", {"Id": group, "FailoverTimeout": "00:00:02"})
    session = f"groups/{group}/clientsessions"
    coordinator.ask("POST", session, {"Id": "a"})
    beat = {"FailoverScore": 100, "Instance": "a1", "FailsafeUrl": "http://a:9"}
    coordinator.ask("POST", f"{session}/a/heartbeat", beat)
    failsafe = coordinator.ask("GET", f"groups/{group}/status").body["Failsafe"]
    return failsafe["State"]


def test_r34_a_restored_store_is_declared_while_no_other_coordinator_serves_it(
    stage: Stage, etcd: EtcdServer
) -> None:
    """Its groups are restricted at every coordinator, until one of them lifts that."""
    cluster = Cluster(stage, etcd, "--shards=2")
    first = cluster.serve("--leadership-ttl=8")
    until(lambda: leads(first) == 2, "a leader")
    agent = stage.run("host-a", first, timing=TIMING)
    stage.until_primary(agent, after_epoch=0)
    agent.send(signal.SIGTERM)
    agent.wait()
    first.send(signal.SIGSTOP)
    second = cluster.serve("--restored")
    assert second.lines("waiting for them to stop"), "the first has a session until its lease ends"
    assert second.lines("restored store declared")
    first.send(signal.SIGKILL)
    first.wait()
    third = cluster.serve()
    for coordinator in (second, third):
        status = coordinator.status()
        assert status["Failsafe"]["State"] == "Restricted"
        assert status["Epoch"] > 2**30
    second.send(signal.SIGKILL)
    second.wait()
    until(lambda: leads(third) == 2, "a leader")
    assert state_of_new_group(third, "made-later") == "Restricted", "it may be missing in the copy"
    flags = [flag for flag in cluster.flags if flag.startswith("--etcd-")]
    trusting = stage.process("trust", "store", "trust", "etcd", *flags)
    assert trusting.wait() == 0, trusting.said()
    assert state_of_new_group(third, "made-at-last") == "Off"


def test_r23_another_leader_knows_whom_the_primary_asks_and_resumes_its_tenure(
    stage: Stage, etcd: EtcdServer
) -> None:
    """The sets and what is cleared are durable: the former leader is killed right after it answered."""
    leader, standby = pair_of(stage, Cluster(stage, etcd, "--shards=1"))

    def beat(one: Coordinator, session: str, **more: object) -> dict[str, object]:
        body = {"FailoverScore": 100, "Instance": f"{session}1", **more}
        body |= {"FailsafeUrl": f"http://{session}:9"}
        path = f"groups/{stage.group}/clientsessions/{session}/heartbeat"

        def answered() -> dict[str, object] | None:
            said = one.ask("POST", path, body)
            assert said.status in {200, 429}, said
            return said.body if said.status == 200 else None  # 429: within the minimum interval

        return until(answered, "an answer")

    leader.ask("POST", "groups", {"Id": stage.group, "FailoverTimeout": "00:00:03"})
    for session in ("a", "b"):
        leader.ask("POST", f"groups/{stage.group}/clientsessions", {"Id": session})
    until(lambda: beat(leader, "a")["Role"] == 1, "a primary")
    beat(leader, "b")
    offered = beat(leader, "a", Holds=1, Epoch=1)["Failsafe"]
    assert isinstance(offered, dict)
    beat(leader, "a", Holds=1, Epoch=1, FailsafeRevision=offered["Revision"])
    leader.send(signal.SIGKILL)
    leader.wait()
    until(lambda: leads(standby) == 1, "another leader")
    status = standby.status()
    assert (status["Primary"], status["Failsafe"]["State"]) == ("a", "Ready")
    assert status["Failsafe"]["Members"] == offered["Members"]
    until(lambda: "Primary" not in standby.status(), "the end of the lease")
    assert standby.status()["Failsafe"]["State"] == "Restricted"
    answer = beat(standby, "a", Holds=1, Epoch=1, FailsafeRevision=offered["Revision"])
    assert (answer["Role"], answer["Epoch"]) == (1, 1)
    assert standby.tenure(1)["WhyStarted"] == "chosen, resumed"
