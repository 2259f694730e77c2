"""When the effect runner publishes although no step of the session has changed anything."""

from types import SimpleNamespace
from typing import Any

from agent.daemon.effect_runner import REFRESH_S, EffectRunner


def test_what_changes_without_a_step_is_published_every_two_seconds() -> None:
    """A status line that systemd's queue had no room for, or the end of a promise of an unfit member."""
    moment, published = [100.0], []
    member: Any = SimpleNamespace(
        clock=SimpleNamespace(boottime=lambda: moment[0]),
        session=SimpleNamespace(lease_until=0.0, options=SimpleNamespace(failsafe=None)),
        requests=SimpleNamespace(joined_once=False),
    )
    publisher: Any = SimpleNamespace(write=lambda: published.append(moment[0]))
    guard: Any = SimpleNamespace(update=lambda: None)
    unused: Any = None
    runner = EffectRunner(
        member, publisher, unused, guard, unused, post_event=unused, started=unused
    )
    for _ in range(9):
        runner.refresh(moment[0])
        moment[0] += REFRESH_S / 4
    assert published == [100.0, 100.0 + REFRESH_S, 100.0 + 2 * REFRESH_S]
    moment[0] -= REFRESH_S / 4
    runner.perform((), 0.0)  # a step of the session publishes at once, and begins the interval anew
    runner.refresh(moment[0] + 0.9 * REFRESH_S)
    assert published[3:] == [moment[0]]
