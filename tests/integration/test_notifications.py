"""The notification hooks joined, lost and left: right payload, no delay (R10)."""

import signal
from collections.abc import Sequence

from .stage import Coordinator, Stage


def flags(stage: Stage, **bodies: str) -> Sequence[str]:
    """Notification hooks that record, of host-a."""
    events = ("joined", "lost", "left")
    return [
        f"--hook-{event}={stage.hook('host-a', event, bodies.get(event, ''))}" for event in events
    ]


def test_joined_runs_at_the_start_and_left_after_the_session_is_deleted(
    stage: Stage, coordinator: Coordinator
) -> None:
    one = stage.run("host-a", coordinator, flags=flags(stage))
    epoch = one.until_role("Primary")["epoch"]
    joined = stage.until_event("host-a", "end", "joined")
    assert (joined.facts["event"], joined.facts["session"]) == ("joined", "host-a")
    assert (joined.facts["new_role"], joined.facts["state_file"]) == (
        "Secondary",
        str(one.state_file),
    )
    assert one.end() == 0
    happened = [(event.what, event.which) for event in stage.events("host-a")]
    assert happened[-2:] == [("begin", "left"), ("end", "left")]
    assert happened.index(("end", "secondary")) < happened.index(("begin", "left"))
    assert ("begin", "lost") not in happened
    left = stage.until_event("host-a", "end", "left")
    assert (left.facts["new_role"], left.facts["reason"]) == ("Secondary", "stopping")
    assert epoch is not None


def test_lost_runs_without_contact_with_the_epoch_and_the_previous_role(
    stage: Stage,
) -> None:
    coordinator = stage.serve()  # not the one that other tests share: it is killed
    one = stage.run("host-a", coordinator, flags=flags(stage))
    epoch = one.until_role("Primary")["epoch"]
    coordinator.end(signal.SIGKILL)
    lost = stage.until_event("host-a", "end", "lost")
    assert (lost.facts["epoch"], lost.facts["old_role"]) == (epoch, "Primary")
    assert "no renewal" in lost.facts["reason"]
    assert one.until_role("Secondary")


def test_notifications_that_hang_delay_neither_promotion_nor_demotion(
    stage: Stage,
) -> None:
    coordinator = stage.serve()  # not the one that other tests share: it is killed
    hang = "exec sleep 1000"
    one = stage.run(
        "host-a",
        coordinator,
        flags=[*flags(stage, joined=hang, lost=hang), "--hook-limit=600"],
    )
    one.until_role("Primary")
    coordinator.end(signal.SIGKILL)
    stage.until_event("host-a", "end", "primary")
    one.until_role("Secondary")
    begun = [e.which for e in stage.events("host-a") if e.what == "begin"]
    assert begun.count("joined") == 1
    assert "lost" not in begun  # it waits behind the one that hangs
    assert one.end(signal.SIGTERM) == 0
