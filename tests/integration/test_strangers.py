"""A stranger with the right Write tries every call against a live holder: none shortens a lease (R15, R16).

Real agents with a workload that writes lines, one by ``exec`` and one by hooks, and a real coordinator. The stranger has
the credential of the agents, knows sessions and epochs, and does not know the ``Instance`` of a process. A second one
has a credential of its own. Meanwhile the primary may be cut off from the coordinator, so that it writes until its own
deadline: whoever gets the role before is caught by the lines. FAILOVER_SOAK_SEED is another order of the acts.
"""

import base64
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from agent.coordinator.auth import hash_password
from tests.etcd import an_etcd
from tests.odd_json import ODD, WRONG, with_value

from .stage import Agent, Coordinator, Gate, Said, Stage, ask, free_port, until
from .workloads import by_exec, by_hooks, demote_slacks_s, output
from .writer import overlap_s, written

LEASE_S = 3.0
BEAT_S = 1.4 / 3
WITHIN_S = LEASE_S + 2 * BEAT_S + 6.0
"""L and two beats, and what a busy machine takes, where a heartbeat may be late for R."""

NAMES = ("host-a", "host-b")
SEED = int(os.environ.get("FAILOVER_SOAK_SEED", "20261129"))
AGENTS, OTHER, ADMINISTRATOR = "agents", "other", "ops"
REASON = "by a stranger"
LARGEST_STEP = 2**33


def header_of(user: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{user}".encode()).decode()


@dataclass
class Stranger:
    """Every call, with the statuses that each act has got."""

    coordinator: Coordinator
    chance: random.Random
    output: Path
    seen: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))

    def call(
        self,
        act: str,
        expected: set[int],
        method: str,
        path: str,
        body: object = None,
        *,
        user: str = AGENTS,
    ) -> Said:
        """One call, by one of the forms of its path. Every status but the expected ones is a failure.

        It is made again, a few times, while it is too soon.
        """
        base = self.coordinator.endpoint.removesuffix("/api/v1/clientfailover")
        cloud = f"{base}/API/v1/Tenants/default/Namespaces/default"
        on_premises = f"{base}/api/v1"
        if path.startswith("accesscontrol/"):
            url = f"{cloud}/{path}"
        else:
            form = self.chance.choice((f"{cloud}/ClientFailover", f"{on_premises}/clientfailover"))
            url = f"{form}/{path}"
        for _ in range(4):
            answer = ask(method, url, body, Authorization=header_of(user))
            assert answer.status in expected, (act, method, path, body, answer)
            self.seen[act][answer.status] += 1
            if answer.status != HTTPStatus.TOO_MANY_REQUESTS:
                break
            time.sleep(LEASE_S / 20)
        return answer

    @property
    def group(self) -> str:
        return f"groups/{self.coordinator.group}"

    def status(self) -> dict[str, Any]:
        return dict(self.call("read", {200}, "GET", f"{self.group}/status").body)

    def history(self) -> list[dict[str, Any]]:
        return list(self.call("read", {200}, "GET", f"{self.group}/history").body)

    def holder(self) -> str:
        return str(self.status().get("Primary", "host-a"))

    def session(self, *names: str) -> str:
        """The path of a session: one of these, or of the holder, mostly. It exists."""
        holder = self.holder()
        name = self.chance.choice(names or (holder, holder, "host-a", "host-b"))
        path = f"{self.group}/clientsessions"
        self.call("duplicate", {200, 201, 409}, "POST", path, {"Id": name, "Name": name})
        return f"{path}/{name}"

    def instance(self) -> dict[str, str]:
        return self.chance.choice(
            ({}, {"Instance": ""}, {"Instance": "stranger"}, {"Instance": "x" * 128})
        )

    # -- acts -----------------------------------------------------------------------------------

    def release(self) -> None:
        epoch, path = self.status()["Epoch"], f"{self.session(self.holder())}/release"
        for instance in ({}, {"Instance": ""}, {"Instance": "stranger"}):
            for which in (epoch, epoch + 1, max(0, epoch - 1)):
                body: dict[str, Any] = {"Epoch": which, "Reason": REASON, **instance}
                body |= self.chance.choice(({}, {"HoldOffPeriod": "1.00:00:00"}))
                body |= self.chance.choice(({}, {"Held": False}))
                self.call("release", {204}, "POST", path, body)
        body["HoldOffPeriod"] = "1000000.00:00:00"
        self.call("release for ever", {400}, "POST", path, body)
        self.call("release, other", {403}, "POST", path, {"Epoch": epoch}, user=OTHER)

    def heartbeat(self) -> None:
        path = f"{self.session()}/heartbeat"
        body: dict[str, Any] = {"FailoverScore": self.chance.choice((0, 100, 1e-300))}
        body |= self.instance() | self.chance.choice(({}, {"Epoch": 0}, {"Promised": True}))
        self.beat("heartbeat", path, body)
        self.call("heartbeat, other", {403}, "POST", path, body, user=OTHER)

    def beat(self, act: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A heartbeat. If its answer is Primary, the stranger is active, and writes a line."""
        answer = self.call(act, {200, 429}, "POST", path, body)
        if answer.status == 200 and answer.body["Role"] == 1:
            with self.output.open("a") as file:
                file.write(f"{answer.body['Epoch']} stranger {time.monotonic_ns()} 0\n")
        return dict(answer.body)

    def teach(self) -> None:
        path, epoch = f"{self.session()}/heartbeat", self.status()["Epoch"]
        step = self.chance.choice((1, 1000, LARGEST_STEP))
        body = {"FailoverScore": 100, "Epoch": epoch + step, **self.instance()}
        self.beat("teach", path, body)
        for far in (epoch + 3 * LARGEST_STEP, 2**52 + 1, 2**53 - 1):
            body = {"FailoverScore": 100, "Epoch": far, "Instance": str(far)}
            self.call("teach too much", {400, 429}, "POST", path, body)

    def delete(self) -> None:
        path = self.session(self.holder())
        self.call("delete, other", {403}, "DELETE", path, user=OTHER)
        self.call("delete if inactive", {204, 409}, "DELETE", f"{path}?inactive=true")
        self.call("delete", {204, 404}, "DELETE", path)

    def recreate(self) -> None:
        path = self.session()
        name = path.rpartition("/")[2]
        self.call("delete", {204}, "DELETE", path)
        body = {"Id": name} | self.chance.choice(({}, {"Name": name}, {"Name": REASON}))
        self.call("create again", {200, 201, 409}, "POST", f"{self.group}/clientsessions", body)
        self.beat("heartbeat", f"{path}/heartbeat", {"FailoverScore": 100, **self.instance()})

    def duplicate(self) -> None:
        path = self.session()
        body = {"Id": path.rpartition("/")[2], "Name": f"{REASON} too"}
        self.call("duplicate otherwise", {409}, "POST", f"{self.group}/clientsessions", body)
        self.call("put", {405}, "PUT", path, body)

    def override(self) -> None:
        others = [name for name in NAMES if name != self.holder()]
        path = f"{self.session(*others)}/roleoverride"
        user = self.chance.choice((AGENTS, OTHER))
        body = {"Value": 1} | self.chance.choice(({}, {"ExpirationPeriod": "00:00:01"}))
        self.call("override", {200}, "POST", path, body, user=user)

    def end_override(self) -> None:
        path = f"{self.session()}/roleoverride"
        self.call("override ended", {200}, "POST", path, {"Value": "Off"}, user=OTHER)

    def remake_group(self) -> None:
        """Without its sessions, too, a group with a lease is not deleted: a new one would not know the lease."""
        for name in NAMES:
            self.call("delete", {204, 404}, "DELETE", f"{self.group}/clientsessions/{name}")
        body = {"Id": self.coordinator.group, "FailoverTimeout": "00:00:03"}
        self.call("put", {405}, "PUT", self.group, body)
        gone = self.call("delete group", {204, 409}, "DELETE", self.group).status == 204
        self.call("create group", {200, 201} if gone else {200}, "POST", "groups", body)
        body["FailoverTimeout"] = "00:00:04"
        self.call("create group otherwise", {409}, "POST", "groups", body)

    def own_session(self) -> None:
        """A member that claims the best score and the newest data, and takes what it gets."""
        path = f"{self.group}/clientsessions"
        self.call("own session", {200, 201}, "POST", path, {"Id": "stranger"})
        body = {
            "FailoverScore": 100,
            "Instance": "stranger",
            "LastDataProcessedTime": "9999-12-31T23:59:59Z",
        }
        for _ in range(2):
            answer = self.beat("own heartbeat", f"{path}/stranger/heartbeat", body)
        if answer.get("Role") == 1:
            body = {"Epoch": answer["Epoch"], "Instance": "stranger", "Reason": "its own"}
            self.call("own release", {204}, "POST", f"{path}/stranger/release", body)
        self.call("own session deleted", {204}, "DELETE", f"{path}/stranger")

    def access(self) -> None:
        """Only an administrator may change lists; while the agents are denied, nobody acts for their sessions."""
        path = self.chance.choice(
            (f"{self.group}/accesscontrol", "accesscontrol/clientfailover/groups")
        )
        entries = [
            {
                "Trustee": {"Type": 1, "ObjectId": who},
                "AccessType": 0,
                "AccessRights": rights,
            }
            for who, rights in ((ADMINISTRATOR, 31), (AGENTS, 1))
        ]
        body = {"RoleTrusteeAccessControlEntries": entries}
        session = self.session()
        for user in (AGENTS, OTHER):
            self.call("access", {403}, "PUT", path, body, user=user)
            self.call("access", {403}, "DELETE", path, user=user)
        self.call("access, by an administrator", {204}, "PUT", path, body, user=ADMINISTRATOR)
        self.call("denied", {403}, "DELETE", session)
        self.call("denied", {403}, "POST", f"{session}/heartbeat", {"FailoverScore": 1})
        self.call("access, by an administrator", {204}, "DELETE", path, user=ADMINISTRATOR)

    def dangerous(self) -> list[Callable[[], None]]:
        """Acts that change whose role it is, or could do so by mistake."""
        return [
            self.release,
            self.delete,
            self.teach,
            self.override,
            self.remake_group,
            self.heartbeat,
            self.recreate,
        ]

    def acts(self) -> list[Callable[[], None]]:
        others = [self.duplicate, self.end_override, self.own_session, self.access]
        every = [*self.dangerous(), *others]
        return self.chance.sample(every, len(every))


EFFECTIVE = {
    "release": 204,
    "release for ever": 400,
    "release, other": 403,
    "heartbeat": 200,
    "heartbeat, other": 403,
    "teach too much": 400,
    "teach": 200,
    "delete": 204,
    "delete, other": 403,
    "delete if inactive": 409,
    "create again": 201,
    "duplicate otherwise": 409,
    "override": 200,
    "override ended": 200,
    "delete group": 409,
    "create group": 200,
    "create group otherwise": 409,
    "own session": 201,
    "own heartbeat": 200,
    "access": 403,
    "denied": 403,
}
"""The status by which each act has reached what it is about: others alone would be a vacuous test."""


@pytest.fixture(params=["sqlite", "etcd"])
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[str]]:
    """The flags of a coordinator with this store."""
    if request.param == "sqlite":
        yield ["sqlite"]
        return
    with an_etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield ["etcd", *(f"--etcd-endpoint={url}" for url in server.urls)]


def serve(stage: Stage, store: list[str], *more: str, port: int | None = None) -> Coordinator:
    name, *flags = store
    port = port or free_port()
    if name == "etcd":
        prefix = f"--etcd-prefix=/{stage.directory.name}"
        flags += [prefix, f"--advertise=http://127.0.0.1:{port}", "--shards=1"]
    return stage.serve(*flags, *more, port=port, store=name)


def serve_known(stage: Stage, store: list[str]) -> Coordinator:
    """A coordinator that knows its callers, each by its name as the password."""
    users = stage.directory / "users"
    users.touch(0o600)
    names = (AGENTS, OTHER, ADMINISTRATOR)
    users.write_text("".join(f"{name}:{hash_password(name)}\n" for name in names))
    return serve(stage, store, f"--users-file={users}", f"--administrator=user:{ADMINISTRATOR}")


@dataclass
class Pair:
    """Two agents, each behind a gate of its own, and the stranger."""

    stage: Stage
    stranger: Stranger
    agents: list[Agent]
    gates: dict[str, Gate]

    def active(self) -> Agent | None:
        """The agent that is primary, and that the coordinator takes for it, while its workload writes."""
        status = self.stranger.status()
        for agent in self.agents:
            assert agent.popen.poll() is None, agent.said()
            state = agent.state
            if state.get("role") == "Primary" and status.get("Primary") == agent.name:
                lines = written(output(self.stage))[-1:]
                if state["epoch"] == status["Epoch"] == (lines and lines[0].epoch):
                    return agent
        return None

    def until_active(self) -> Agent:
        return until(self.active, "a primary within L and two beats", WITHIN_S)

    def round(self, first: Callable[[], None] | None) -> None:
        """Every act once. Given a first one, the primary has just been cut off, and writes until its deadline."""
        one, chance = self.until_active(), self.stranger.chance
        if first is not None:
            self.gates[one.name].close()
            first()
        for act in self.stranger.acts():
            time.sleep(chance.uniform(0, 0.2))
            act()
        if first is not None:
            self.gates[one.name].open()
        self.until_active()
        assert overlap_s(output(self.stage)) < 0


def pair_of(stage: Stage, coordinator: Coordinator) -> Pair:
    password = stage.directory / "password"
    password.touch(0o600)
    password.write_text(AGENTS)
    flags = (f"--username={AGENTS}", f"--password-file={password}")
    gates = {name: Gate(stage, coordinator.endpoint) for name in NAMES}
    agents = [
        how(stage, name, replace(coordinator, endpoint=gates[name].endpoint), *flags)
        for how, name in ((by_exec, "host-a"), (by_hooks, "host-b"))
    ]
    for agent in agents:
        agent.until_said("joined")
    return Pair(stage, Stranger(coordinator, random.Random(SEED), output(stage)), agents, gates)


def test_no_call_of_a_stranger_shortens_a_lease(stage: Stage, store: list[str]) -> None:
    pair = pair_of(stage, serve_known(stage, store))
    stranger = pair.stranger
    rounds: list[Callable[[], None] | None] = [*stranger.dangerous(), None]
    rounds = stranger.chance.sample(rounds, 3 if store == ["sqlite"] else 1)
    try:
        for first in rounds:
            pair.round(first)
    except AssertionError as error:
        said = "\n".join(agent.said() for agent in pair.agents)
        raise AssertionError(f"seed {SEED}: {error}\n{stranger.history()}\n{said}") from error
    for act, status in EFFECTIVE.items():
        assert stranger.seen[act][status], f"seed {SEED}: {act} {stranger.seen[act]}"
    assert REASON not in {tenure.get("WhyEnded") for tenure in stranger.history()}
    for agent in pair.agents:
        assert all(slack_s > 0 for slack_s in demote_slacks_s(agent)), f"seed {SEED}"
        assert agent.end() == 0
    assert overlap_s(output(stage)) < 0


# -- what a caller can teach ------------------------------------------------------------------------

CALLS = {
    "HeartbeatRequest": ("/{id}/heartbeat", {"FailoverScore": "1"}),
    "ReleaseRequest": ("/{id}/release", {"Epoch": "1"}),
    "RoleOverrideRequest": ("/{id}/roleoverride", {"Value": "0"}),
    "SessionRequest": ("/", {"Id": '"{id}"'}),
    "GroupRequest": ("", {"Id": '"{id}"', "FailoverTimeout": '"00:00:03"'}),
}
"""The path of each call below that of the sessions, or none, and a valid body."""


class Teacher:
    """Sends bodies whose values it writes as JSON itself, each about a session or a group of its own."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.number = 0

    def call(self, shape: str, name: str, text: str) -> Said:
        path, valid = CALLS[shape]
        self.number += 1
        one = f"odd-{self.number}"
        url = f"{self.coordinator.endpoint}/groups"
        if path:
            url = f"{self.coordinator.endpoint}/{self.sessions}{path.format(id=one)}"
        body = with_value({key: value.format(id=one) for key, value in valid.items()}, name, text)
        return ask("POST", url, body.encode())

    def check_refused(self, shape: str, name: str, text: str) -> None:
        answer = self.call(shape, name, text)
        assert answer.status == 400, (shape, name, text, answer)
        assert answer.body["Reason"].startswith(name), (text, answer)

    def check_accepted(self, shape: str, name: str, text: str) -> None:
        made = "{id}" in CALLS[shape][0]
        if made:
            body = {"Id": f"odd-{self.number + 1}"}
            assert self.coordinator.ask("POST", self.sessions, body).status == 201
        answer = self.call(shape, name, text)
        assert answer.status in {200, 201, 204}, (shape, name, text, answer)
        where = "groups" if shape == "GroupRequest" else self.sessions
        assert self.coordinator.ask("DELETE", f"{where}/odd-{self.number}").status == 204

    @property
    def sessions(self) -> str:
        return f"groups/{self.coordinator.group}/clientsessions"

    def beat(self, path: str, body: object) -> Said:
        """A heartbeat, again while it is too soon."""

        def answered() -> Said | None:
            answer = self.coordinator.ask("POST", path, body)
            return answer if answer.status != 429 else None

        return until(answered, "a heartbeat that is not too soon")

    def hold(self, epoch: int, last_data: str, instance: str) -> None:
        """Be primary after that epoch, with these data; then go without a release."""
        path = f"{self.sessions}/odd"
        assert self.coordinator.ask("POST", self.sessions, {"Id": "odd"}).status == 201
        value = {"Value": 1, "ExpirationPeriod": "1999999.23:59:59.9999999"}
        assert self.coordinator.ask("POST", f"{path}/roleoverride", value).status == 200
        body = {"FailoverScore": 100, "Instance": instance, "LastDataProcessedTime": last_data}

        def held() -> bool:
            answer = self.beat(f"{path}/heartbeat", body)
            assert answer.status == 200, answer
            return bool(answer.body["Role"] == 1 and answer.body["Epoch"] > epoch)

        until(held, "the stranger to be primary")
        until(held, "its data to be recorded")
        assert self.coordinator.status()["LastDataProcessedTime"].startswith(last_data[:19])
        assert self.coordinator.ask("DELETE", path).status == 204


def test_no_value_that_a_caller_sends_makes_a_group_unusable(
    stage: Stage, store: list[str]
) -> None:
    """Refused in words, or of a bounded effect: afterwards agents become primary, also in the group made anew."""
    port = free_port()
    coordinator = serve(stage, store, port=port)
    agents = [by_hooks(stage, name, coordinator) for name in NAMES]
    epoch = stage.until_primary(*agents, after_epoch=0).state["epoch"]
    teacher = Teacher(coordinator)
    for check, table in ((teacher.check_refused, WRONG), (teacher.check_accepted, ODD)):
        for shape, properties in table.items():
            for name, texts in properties.items():
                for text in texts:
                    check(shape, name, text)
    path = f"{teacher.sessions}/host-a/heartbeat"
    for far in (epoch + 2 * LARGEST_STEP, 2**52 + 1, 2**53 - 1):
        answer = teacher.beat(path, {"FailoverScore": 1, "Epoch": far, "Instance": str(far)})
        assert answer.status == 400
        assert f"Epoch is {far}: it must be at most " in answer.body["Reason"]
    assert coordinator.status()["Epoch"] < epoch + 10

    for last_data, instance in (
        ("9999-12-31T23:59:59.999999Z", "x" * 128),
        ("0001-01-01T00:00:01Z", "\0\n\u2028"),
    ):
        epoch = coordinator.status()["Epoch"]
        teacher.hold(epoch, last_data, instance)
        one = stage.until_primary(*agents, after_epoch=epoch + 1)
        begun = [e for e in stage.events(one.name) if (e.what, e.which) == ("begin", "primary")]
        assert begun[-1].facts["last_data_processed_time"].startswith(last_data[:19])
        epoch = one.state["epoch"]
        coordinator.end()
        coordinator = serve(stage, store, port=port)
        stage.until_primary(*agents, after_epoch=epoch - 1)

    assert [agent.end() for agent in agents] == [0, 0]
    group = f"groups/{coordinator.group}"
    until(lambda: coordinator.ask("DELETE", group).status == 204, "the group to be idle")
    agents = [by_hooks(stage, name, coordinator) for name in NAMES]
    stage.until_primary(*agents, after_epoch=epoch)
    stage.check_promise()
    assert overlap_s(output(stage)) < 0
