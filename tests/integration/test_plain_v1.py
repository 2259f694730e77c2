"""Both sides of version 1: our agent at a plain v1 server, a v1 client beside our agent."""

import itertools
import signal

import pytest

from .plain_v1 import PENDING_PRIMARY, PRIMARY, SECONDARY, Member, PlainV1
from .stage import Coordinator, Relay, Stage, ask, until

SLOW = ("--failover-timeout=6", "--demote=0.5", "--margin=0.5")
"""R is 5 s, the beat 1.7 s, and the longest wait that a server may ask for 2.5 s."""


def test_an_agent_works_with_a_plain_v1_server(stage: Stage) -> None:
    plain = PlainV1(stage)
    one = stage.run("host-a", plain.endpoint)
    state = one.until_role("Primary")
    assert state["epoch"] is None
    other = stage.run("host-b", plain.endpoint)
    other.until_said("joined")
    answer = ask("POST", f"{state['probe']}/data-processed", {"time": "2026-01-31T12:00:00Z"})
    assert answer.status == 200
    until(lambda: plain.members["host-a"].last_data is not None, "the time to reach the server")
    other.until_said("joined")
    until(lambda: plain.heartbeats("host-b"), "a heartbeat of the other")
    stage.note("test", "stop")
    assert one.end() == 0
    other.until_role("Primary")
    assert "host-a" not in plain.members
    assert not [asked for asked in plain.asked if asked.path.endswith("/release")]
    began = [e for e in stage.events("host-b") if (e.what, e.which) == ("begin", "primary")]
    assert began[0].facts["epoch"] is None
    order = [(e.who, e.what, e.which) for e in stage.events()]
    assert order.index(("host-a", "end", "secondary"), order.index(("test", "stop", ""))) < (
        order.index(("host-b", "begin", "primary"))
    )
    assert other.end() == 0
    assert not plain.members
    deleted = [asked.path.rpartition("/")[2] for asked in plain.asked if asked.method == "DELETE"]
    assert deleted == ["host-a", "host-b"]


def test_a_strict_v1_server_makes_an_agent_primary(stage: Stage) -> None:
    """Fault 19: a server that answers 400 to what version 1 has not."""
    plain = PlainV1(stage, strict=True)
    one = stage.run("host-a", plain.endpoint)
    one.until_role("Primary")
    other = stage.run("host-b", plain.endpoint)
    until(lambda: plain.heartbeats("host-b"), "a heartbeat of the other")
    assert one.end() == 0
    other.until_role("Primary")
    assert other.end() == 0
    assert {asked.status for asked in plain.asked} <= {200, 201, 204, 409}


def test_a_killed_primary_is_replaced_at_a_v1_server(stage: Stage) -> None:
    plain = PlainV1(stage)
    one = stage.run("host-a", plain.endpoint)
    one.until_role("Primary")
    other = stage.run("host-b", plain.endpoint)
    until(lambda: plain.heartbeats("host-b"), "a heartbeat of the other")
    stage.kill(one)
    other.until_role("Primary")
    assert plain.primary == "host-b"


def test_heartbeats_are_not_more_than_a_v1_server_allows(stage: Stage) -> None:
    """L / 20 apart, at most 1 s, but for confirmations of PendingPrimary, which are 10 at most."""
    plain = PlainV1(stage)
    agent = stage.run("host-a", plain.endpoint)
    agent.until_role("Primary")
    until(lambda: len(plain.heartbeats("host-a")) >= 8, "some heartbeats")
    pairs = list(itertools.pairwise(plain.heartbeats("host-a")))
    hasty = [
        earlier.said["Role"]
        for earlier, later in pairs
        if later.at - earlier.at < plain.lease_s / 20
    ]
    assert set(hasty) <= {PENDING_PRIMARY}
    assert len(hasty) <= 10
    assert agent.end() == 0


def test_the_timeout_of_an_existing_group_is_adopted(stage: Stage) -> None:
    plain = PlainV1(stage)
    plain.answer("POST", ["groups"], {"Id": stage.group, "FailoverTimeout": "00:00:03"})
    agent = stage.run("host-a", plain.endpoint)
    assert agent.until_role("Primary")["failover_timeout_s"] == 3.0
    assert agent.lines("adopted the group's failover timeout")
    assert [a.status for a in plain.asked if a.path == "groups"] == [409]


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed(stage: Stage, status: int) -> None:
    plain = PlainV1(stage)
    agent = stage.run("host-a", plain.endpoint, timing=SLOW)
    agent.until_role("Primary")
    plain.refuse = (status, "2")
    until(lambda: plain.heartbeats("host-a")[-1].status == status, "the refusal")
    refused = len(plain.heartbeats("host-a"))
    until(lambda: len(plain.heartbeats("host-a")) > refused, "the next heartbeat")
    before, after = plain.heartbeats("host-a")[refused - 1 : refused + 1]
    assert after.at - before.at >= 2.0
    assert agent.state["role"] == "Primary"


def test_a_member_whose_session_a_v1_server_lost_demotes_and_registers_again(
    stage: Stage,
) -> None:
    plain = PlainV1(stage)
    agent = stage.run("host-a", plain.endpoint)
    agent.until_role("Primary")
    agent.until_said("after=Primary")
    said = len(agent.said())
    plain.answer("DELETE", ["groups", stage.group, "clientsessions", "host-a"], None)
    until(lambda: len(agent.lines("role changed", after=said)) >= 3, "to be primary again")
    first, *_, last = agent.lines("role changed", after=said)
    assert "before=Primary after=Secondary" in first
    assert "after=Primary" in last
    assert isinstance(plain.members["host-a"], Member)


def test_an_agent_takes_over_from_a_v1_client_and_the_other_way_round(
    stage: Stage, coordinator: Coordinator
) -> None:
    """The exact words of a published client (docs/api.md, "What v1 clients do, and what they get") against ours, beside our agent."""
    session = f"groups/{stage.group}/clientsessions/adapter"

    def register() -> None:
        body: dict[str, str] = {"Id": stage.group, "FailoverTimeout": "00:01:00"}
        made = coordinator.ask("POST", "groups/", body)
        if made.status == 409:
            made = coordinator.ask("GET", f"groups/{stage.group}")
        assert made.status in {200, 201}
        body = {"Id": "adapter", "Name": "Adapter"}
        assert coordinator.ask("POST", f"groups/{stage.group}/clientsessions", body).status == 201

    def beat(last_data: str = "0001-01-01T00:00:00") -> int:
        role = PENDING_PRIMARY
        for _ in range(10):
            body = {"FailoverScore": 100.0, "LastDataProcessedTime": last_data, "Unknown": [1]}
            told = coordinator.ask("POST", f"{session}/heartbeat", body)
            if told.status == 429:
                assert float(told.headers["retry-after"]) > 0
                return SECONDARY
            assert told.status == 200
            assert None not in told.body.values()
            role = told.body["Role"]
            if role != PENDING_PRIMARY:
                break
        return role

    coordinator.ask("POST", "groups", {"Id": stage.group, "FailoverTimeout": "00:00:08"})
    register()
    assert beat() == PRIMARY
    relay = Relay(stage, coordinator.endpoint)  # tells when the agent has sent a heartbeat
    agent = stage.run("host-a", relay.endpoint)
    agent.until_said("joined")
    processed = "2026-01-31T12:00:00.1234567Z"
    until(lambda: beat(processed) == PRIMARY, "a heartbeat that is not too soon")
    until(
        lambda: ("POST", "heartbeat") in [(e.what, e.which) for e in stage.events("relay")],
        "a heartbeat of the agent",
    )
    assert coordinator.status()["Primary"] == "adapter"
    assert coordinator.ask("DELETE", session).status == 204
    state = agent.until_role("Primary")
    assert coordinator.tenure(state["epoch"] - 1)["WhyEnded"] == "its client session was deleted"
    began = [e for e in stage.events("host-a") if (e.what, e.which) == ("begin", "primary")]
    assert began[0].facts["last_data_processed_time"] == "2026-01-31T12:00:00.123456Z"
    register()
    assert beat() == SECONDARY
    assert agent.end(signal.SIGTERM) == 0
    until(lambda: beat() == PRIMARY, "the v1 client to take over")
    assert coordinator.ask("DELETE", session).status == 204
    assert coordinator.ask("POST", f"{session}/heartbeat", {"FailoverScore": 1}).status == 404
