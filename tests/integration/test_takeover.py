"""What happens when a primary is killed, stopped or frozen: real agents and a real coordinator."""

import signal

import pytest

from .stage import Coordinator, Relay, Stage, until


@pytest.mark.parametrize("guard", ["--guard", "--no-guard"])
def test_the_secondary_takes_over_after_a_sigkill(
    stage: Stage, coordinator: Coordinator, guard: str
) -> None:
    """With the guard, the demotion hook has ended before the other's promotion hook begins."""
    one, other, epoch = stage.pair(coordinator, guard)
    stage.kill(one)
    assert other.until_role("Primary", after_epoch=epoch)["epoch"] > epoch
    why = "demoted by the guard" if guard == "--guard" else "its lease ended without a heartbeat"
    assert coordinator.tenure(epoch)["WhyEnded"] == why
    stage.check_promise()


def test_a_restarted_agent_demotes_first_and_is_secondary(
    stage: Stage, coordinator: Coordinator
) -> None:
    one, other, epoch = stage.pair(coordinator, "--no-guard")
    stage.kill(one)
    before = len(stage.events(one.name))
    assert one.state["role"] == "Primary"  # what its death left behind
    again = stage.run(one.name, coordinator)
    again.until_said("joined")
    first = stage.events(one.name)[before]
    assert (first.what, first.which, first.facts["reason"]) == ("begin", "secondary", "starting")
    stage.until_primary(again, other, after_epoch=epoch)
    stage.check_promise()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_graceful_stop_demotes_then_releases_then_deletes_the_session(
    stage: Stage, coordinator: Coordinator, number: signal.Signals
) -> None:
    relay = Relay(stage, coordinator.endpoint)
    one = stage.run("host-a", relay.endpoint)
    epoch = one.until_role("Primary")["epoch"]
    other = stage.run("host-b", coordinator)
    other.until_said("joined")
    stage.note("test", "stop")
    assert one.end(number) == 0
    other.until_role("Primary", after_epoch=epoch)
    happened = [(e.what, e.which) for e in stage.events() if e.who in ("host-a", "relay", "test")]
    after = [e for e in happened[happened.index(("stop", "")) :] if e != ("GET", "status")]
    assert [e for e in after if e != ("POST", "heartbeat")] == [
        ("stop", ""),
        ("begin", "secondary"),
        ("end", "secondary"),
        ("POST", "release"),
        ("DELETE", "host-a"),
    ]
    assert coordinator.tenure(epoch)["WhyEnded"] == "stopping"
    assert coordinator.ask("GET", f"groups/{stage.group}/clientsessions/host-a").status == 404
    assert (one.state["role"], one.state["reason"]) == ("Secondary", "stopped")
    stage.check_promise()


def test_a_stopping_secondary_does_not_disturb_the_primary(
    stage: Stage, coordinator: Coordinator
) -> None:
    one, other, epoch = stage.pair(coordinator)
    assert other.end() == 0
    assert coordinator.ask("GET", f"groups/{stage.group}/clientsessions/{other.name}").status == 404
    assert (one.state["role"], one.state["epoch"]) == ("Primary", epoch)


def test_a_thawed_primary_demotes_before_anything_else(
    stage: Stage, coordinator: Coordinator
) -> None:
    one, other, epoch = stage.pair(coordinator, "--no-guard")
    one.send(signal.SIGSTOP)
    newer = other.until_role("Primary", after_epoch=epoch)["epoch"]
    said, happened = len(one.said()), len(stage.events(one.name))
    one.send(signal.SIGCONT)
    woken = until(lambda: one.lines("hook ended", after=said), "the demotion hook to end")
    assert "hook=secondary" in woken[0]
    changes = one.lines("role changed", "hook started", after=said)
    assert "before=Primary after=Secondary" in changes[0]
    assert "hook started hook=secondary" in changes[1]
    first = stage.events(one.name)[happened]
    assert (first.what, first.which, first.facts["old_role"]) == ("begin", "secondary", "Primary")
    assert first.facts["epoch"] == epoch
    stage.kill(other)
    assert one.until_role("Primary", after_epoch=newer)["epoch"] > newer
    epochs = [e.facts["epoch"] for e in stage.events() if (e.what, e.which) == ("begin", "primary")]
    assert epochs == sorted(set(epochs)), f"epochs do not increase: {epochs}"


def test_the_guard_demotes_and_kills_a_frozen_primary(
    stage: Stage, coordinator: Coordinator
) -> None:
    """R12: by the guard, before the other becomes active."""
    one, other, epoch = stage.pair(coordinator)
    one.send(signal.SIGSTOP)
    other.until_role("Primary", after_epoch=epoch)
    stage.check_promise()
    assert one.wait() == -signal.SIGKILL
    assert one.state["role"] == "Secondary"
