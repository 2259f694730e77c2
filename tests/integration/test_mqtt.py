"""Real agents that announce to a real mosquitto by TLS, with a password and client certificates.

Broken brokers may not touch the role: each such test also asks the coordinator's history and the
agent's log.
"""

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mosquitto import PATIENCE_S, Broker, Watcher, a_broker, watching

from .stage import TIMING, Agent, Coordinator, Stage, until

STATE = "spBv1.0/STATE/plant"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with a_broker(tmp_path) as broker:
        broker.secure()
        broker.start()
        yield broker


@pytest.fixture
def watcher(broker: Broker) -> Iterator[Watcher]:
    with watching(broker) as watcher:
        yield watcher


def flags(table: dict[str, Any], *more: str) -> tuple[str, ...]:
    return (f"--mqtt={json.dumps(table)}", *more)


def end(broker: Broker) -> None:
    """By SIGTERM, at which it saves what is retained."""
    assert broker.process is not None
    broker.send(signal.SIGTERM)
    broker.process.wait(PATIENCE_S)
    assert (broker.directory / "kept/mosquitto.db").stat().st_size > 0


def start(stage: Stage, coordinator: Coordinator, name: str, table: dict[str, Any]) -> Agent:
    return stage.run(name, coordinator, flags=flags(table, "--no-guard"), timing=TIMING)


def holds_the_role(agent: Agent, coordinator: Coordinator, epoch: int) -> None:
    """It is still the same tenure, no heartbeat failed, and nothing came of it."""
    heard_at = session(coordinator, agent)["Heartbeat"]["HeartbeatTime"]
    until(
        lambda: session(coordinator, agent)["Heartbeat"]["HeartbeatTime"] > heard_at,
        "a further heartbeat",
    )
    assert (agent.state["role"], agent.state["epoch"]) == ("Primary", epoch)
    assert [t for t in coordinator.history() if "Until" in t] == []
    assert not agent.lines("after=Secondary")
    assert not agent.lines("no contact", "stopped", "heartbeat")


def session(coordinator: Coordinator, agent: Agent) -> dict[str, Any]:
    path = f"groups/{coordinator.group}/clientsessions/{agent.name}"
    return dict(coordinator.ask("GET", path).body)


def alone(stage: Stage, coordinator: Coordinator, table: dict[str, Any]) -> tuple[Agent, int]:
    """A primary, and its epoch."""
    agent = start(stage, coordinator, "host-a", table)
    return agent, agent.until_role("Primary")["epoch"]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_subscriber_receives_a_takeover_after_a_sigkill(
    stage: Stage, coordinator: Coordinator, broker: Broker, watcher: Watcher, protocol: str
) -> None:
    table = broker.table(protocol=protocol)
    one = start(stage, coordinator, "host-a", table)
    epoch = one.until_role("Primary")["epoch"]
    born = watcher.until(
        f"failover/{stage.group}/sessions/host-a", role="Primary", epoch=epoch, online=True
    )
    watcher.until(f"failover/{stage.group}/primary", session="host-a", epoch=epoch)
    other = start(stage, coordinator, "host-b", table)
    watcher.until(f"failover/{stage.group}/sessions/host-b", role="Secondary", online=True)
    other.until_said("joined")
    stage.kill(one)
    will = watcher.until(f"failover/{stage.group}/sessions/host-a", online=False)
    assert will == {"online": False, "timestamp": born["timestamp"]}
    told = watcher.until(f"failover/{stage.group}/primary", session="host-b")
    assert told["epoch"] > epoch
    watcher.until(f"failover/{stage.group}/sessions/host-b", role="Primary", epoch=told["epoch"])
    assert other.until_role("Primary")["since"] == told["since"]


def test_a_graceful_stop_publishes_secondary_and_then_offline(
    stage: Stage, coordinator: Coordinator, broker: Broker, watcher: Watcher
) -> None:
    agent, epoch = alone(stage, coordinator, broker.table())
    topic = f"failover/{stage.group}/sessions/host-a"
    born = watcher.until(topic, role="Primary", epoch=epoch)
    assert agent.end() == 0
    left = watcher.until(topic, online=False)
    assert left["timestamp"] >= born["timestamp"]
    last, end = [heard.content for heard in watcher.of(topic)][-2:]
    assert last["role"] == "Secondary"
    assert end == left


def test_a_demotion_is_announced_before_its_hook_has_ended(
    stage: Stage, coordinator: Coordinator, broker: Broker, watcher: Watcher
) -> None:
    go = stage.directory / "go"
    body = f"[ -e {stage.directory}/first ] || {{ touch {stage.directory}/first; exit 0; }}"
    body += f"; while [ ! -e {go} ]; do sleep 0.01; done"
    long = ("--failover-timeout=120", "--demote=40", "--margin=5")
    agent = stage.run(
        "host-a",
        coordinator,
        flags=flags(broker.table(), "--no-guard"),
        timing=long,
        secondary=body,
    )
    epoch = agent.until_role("Primary")["epoch"]
    watcher.until(f"failover/{stage.group}/sessions/host-a", role="Primary", epoch=epoch)
    agent.send(signal.SIGTERM)
    watcher.until(f"failover/{stage.group}/sessions/host-a", role="Secondary", online=True)
    go.touch()
    assert agent.wait() == 0


def test_a_killed_broker_receives_the_state_at_its_return_and_the_role_stays(
    stage: Stage, coordinator: Coordinator, broker: Broker, watcher: Watcher
) -> None:
    agent, epoch = alone(stage, coordinator, broker.table())
    born = watcher.until(f"failover/{stage.group}/sessions/host-a", role="Primary", online=True)
    broker.kill()
    agent.until_said("role is not announced by MQTT")
    holds_the_role(agent, coordinator, epoch)
    broker.start()  # without persistence: it has forgotten everything
    with watching(broker) as late:
        again = late.until(
            f"failover/{stage.group}/sessions/host-a", role="Primary", epoch=epoch, online=True
        )
        late.until(f"failover/{stage.group}/primary", session="host-a", epoch=epoch)
    assert again["timestamp"] > born["timestamp"]
    holds_the_role(agent, coordinator, epoch)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_restarted_broker_keeps_retained_messages_until_the_next_primary_replaces_them(
    stage: Stage, coordinator: Coordinator, broker: Broker, protocol: str
) -> None:
    """The role changes while it is down: what it kept is of before, and is replaced at its return."""
    broker.kill()
    kept_in = broker.directory / "kept"
    kept_in.mkdir()
    kept_in.chmod(0o777)  # mosquitto writes there, under its own user
    broker.lines += ["persistence true", f"persistence_location {kept_in}/"]
    broker.start()
    table = broker.table(protocol=protocol)
    one = start(stage, coordinator, "host-a", table)
    epoch = one.until_role("Primary")["epoch"]
    topics = [f"failover/{stage.group}/sessions/{name}" for name in ("host-a", "host-b")]
    primary = f"failover/{stage.group}/primary"
    with watching(broker) as before:
        before.until(primary, session="host-a", epoch=epoch)
        other = start(stage, coordinator, "host-b", table)
        before.until(topics[1], role="Secondary", online=True)
        other.until_said("joined")
    end(broker)
    other.until_said("role is not announced by MQTT")
    stage.kill(one)
    later = other.until_role("Primary", after_epoch=epoch)["epoch"]
    broker.start()
    with watching(broker) as after:
        after.until(topics[1], role="Primary", epoch=later, online=True)
        after.until(primary, session="host-b", epoch=later)
        kept = after.until(topics[0], online=False)  # its last will; nobody says it again
        assert "role" not in kept
    assert (other.state["role"], other.state["epoch"]) == ("Primary", later)
    assert stage.check_promise() == [epoch, later]
    assert other.end() == 0


def test_a_frozen_broker_affects_neither_role_nor_stop(
    stage: Stage, coordinator: Coordinator, broker: Broker, watcher: Watcher
) -> None:
    agent, epoch = alone(stage, coordinator, broker.table(keepalive=1) | {"limit": 1})
    watcher.until(f"failover/{stage.group}/sessions/host-a", role="Primary", online=True)
    broker.send(signal.SIGSTOP)
    agent.until_said("role is not announced by MQTT")
    holds_the_role(agent, coordinator, epoch)
    broker.send(signal.SIGCONT)
    until(lambda: len(agent.lines("role is announced by MQTT")) == 2, "the broker's return")
    holds_the_role(agent, coordinator, epoch)
    broker.send(signal.SIGSTOP)
    assert agent.end() == 0
    assert coordinator.ask("GET", f"groups/{stage.group}/clientsessions").body == []
    broker.send(signal.SIGCONT)
    watcher.until(f"failover/{stage.group}/sessions/host-a", online=False)


def test_a_wrong_broker_password_is_logged_once_and_does_not_affect_the_role(
    stage: Stage, coordinator: Coordinator, broker: Broker, watcher: Watcher
) -> None:
    agent, epoch = alone(stage, coordinator, broker.table(password="not this one"))
    agent.until_said("Not authorized")
    for _ in range(3):
        holds_the_role(agent, coordinator, epoch)
    assert len(agent.lines("MQTT")) == 1
    assert "not this one" not in agent.said()
    assert watcher.heard == []


def test_retained_garbage_on_every_topic_is_replaced_and_does_not_affect_the_role(
    stage: Stage, coordinator: Coordinator, broker: Broker, watcher: Watcher
) -> None:
    topics = [f"failover/{stage.group}/sessions/host-a", f"failover/{stage.group}/primary"]
    for topic in topics:
        watcher.publish(topic, b'\xff{"epoch": 1e999')
    agent, epoch = alone(stage, coordinator, broker.table())
    for topic in topics:
        watcher.until(topic, epoch=epoch)
        before = len(watcher.of(topic))
        watcher.publish(topic, b"[" * 100_000)
        until(lambda t=topic, n=before: len(watcher.of(t)) >= n + 2, "a correction")  # type: ignore[misc] # of the loop's topic
        watcher.until(topic, epoch=epoch)
    holds_the_role(agent, coordinator, epoch)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_the_sparkplug_host_is_online_while_there_is_a_primary(
    stage: Stage, coordinator: Coordinator, broker: Broker, watcher: Watcher, protocol: str
) -> None:
    table = broker.table(payload="sparkplug", sparkplug_host_id="plant", protocol=protocol)
    one = start(stage, coordinator, "host-a", table)
    one.until_role("Primary")
    born = watcher.until(STATE, online=True)
    other = start(stage, coordinator, "host-b", table)
    other.until_said("role is announced by MQTT")
    other.until_said("joined")
    stage.kill(one)
    assert watcher.until(STATE, online=False) == {"online": False, "timestamp": born["timestamp"]}
    again = watcher.until(STATE, online=True)
    assert again["timestamp"] > born["timestamp"]
    assert other.state["role"] == "Primary"
    assert other.end() == 0
    watcher.until(STATE, online=False)
    assert {heard.topic for heard in watcher.heard} == {STATE}
    assert [heard.content["online"] for heard in watcher.of(STATE)] == [True, False, True, False]


@pytest.mark.parametrize("command", ["run", "check-config"])
def test_certificates_that_cannot_be_used_are_refused_at_the_start(
    stage: Stage, broker: Broker, command: str
) -> None:
    config = stage.directory / "agent.toml"
    lines = [f'{key} = "{value}"' for key, value in broker.table().items() if key != "key"]
    config.write_text("\n".join(['group = "g"', "[mqtt]", *lines]))
    process = stage.process("wrong", command, f"--config={config}")
    assert process.wait() == 12
    assert "mqtt: certificate" in process.said()
    assert "must be a certificate chain and its private key" in process.said()


def test_a_reload_while_the_broker_of_progress_is_silent_does_not_affect_the_role(
    stage: Stage, coordinator: Coordinator, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        file = tmp_path / "agent.toml"
        broker = f"mqtt://127.0.0.1:{silent.getsockname()[1]}"

        def configure(topic: str) -> None:
            table = f'type = "mqtt"\nbroker = "{broker}"\ntopic = "{topic}"\n'
            file.write_text(f"[progress]\n{table}limit = {PATIENCE_S}\n")

        configure("first")
        agent = stage.run("host-a", coordinator, flags=(f"--config={file}",), timing=TIMING)
        epoch = agent.until_role("Primary")["epoch"]
        for number in range(3):
            asking, _ = silent.accept()  # the source waits for an answer
            configure(f"another-{number}")
            agent.send(signal.SIGHUP)
            until(lambda: len(agent.lines("configuration read again")) > number, "the reload")  # noqa: B023 - called at once
            asking.close()
        holds_the_role(agent, coordinator, epoch)
    assert not agent.lines("ERROR")
