"""When the effect runner publishes although no step of the session has changed anything, and what it releases."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from agent.core.effects import Cause, Publish, Release
from agent.core.events import Event, Released
from agent.daemon.effect_runner import REFRESH_S, EffectRunner
from agent.model import Role


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


@pytest.mark.parametrize(
    ("before", "after", "released"), [([], list(Role), False), (list(Role), [], True)]
)
async def test_a_reload_does_not_change_what_has_demoted(
    before: list[Role], after: list[Role], *, released: bool
) -> None:
    """Without a hook the state file makes a workload inactive; with hooks that came later, nobody had run one."""
    member, publisher, posted = MagicMock(), MagicMock(), list[Event]()
    publisher.flush = AsyncMock(return_value=False)
    member.requests.release = AsyncMock()
    member.clock.boottime.return_value = 100.0
    started = AsyncMock(return_value=True)
    runner = EffectRunner(
        member, publisher, MagicMock(), MagicMock(), MagicMock(), posted.append, started
    )
    member.role_runner.roles = frozenset(before)
    runner._publish(Publish(Role.SECONDARY, Role.PRIMARY, 1, Cause.CHOSEN, "chosen"), 110.0)
    member.role_runner.roles = frozenset(after)
    runner._publish(Publish(Role.PRIMARY, Role.SECONDARY, 1, Cause.STOPPING, "stopping"), 110.0)
    await runner._release(Release(1, "stopping", 0.0))
    assert member.requests.release.called is released
    assert posted == ([] if released else [Released()])
