"""The table of phases: its transitions, its ignored events, and that nothing else is possible."""

from itertools import product

import pytest

from agent.core.effects import Effect, Exit
from agent.core.events import (
    Event,
    FitnessChanged,
    HeartbeatAnswered,
    HeartbeatFailed,
    HeartbeatFailure,
    HookEnded,
    Joined,
    Left,
    Released,
    Stalled,
    Stop,
    Tick,
)
from agent.core.phases import (
    FIRST_SENTENCE,
    IGNORED,
    TABLE,
    Phase,
    Trigger,
    next_phase,
)
from agent.core.session import PreviousTenure, Session
from tests.reference import phase_diagram

from .session_bench import LEASE_S, STORE, TIMING, Answer, Bench, P, S, W, status

NEXT: dict[str, dict[str, str]] = {
    "starting": {
        "demoted": "joining",
        "previous_tenure": "returning",
        "stop": "stopping",
        "demotion_failed": "ended",
    },
    "returning": {"previous_released": "joining", "stop": "stopping"},
    "joining": {
        "registered": "member",
        "registered_again": "member",
        "stop": "stopping",
        "demotion_failed": "ended",
    },
    "member": {
        "unknown": "joining",
        "retimed": "joining",
        "replaced": "joining",
        "cool_down": "cooling",
        "stop": "stopping",
        "demotion_failed": "ended",
    },
    "cooling": {"cooled_down": "joining", "stop": "stopping"},
    "stopping": {"demoted": "releasing", "demotion_failed": "ended"},
    "releasing": {"settled": "leaving"},
    "leaving": {"left": "ended"},
}
"""Every transition, written out once more."""


@pytest.mark.parametrize(("phase", "trigger"), list(product(Phase, Trigger)))
def test_a_trigger_leads_to_its_phase_or_raises(phase: Phase, trigger: Trigger) -> None:
    expected = NEXT.get(phase, {}).get(trigger)
    if expected is not None:
        assert next_phase(phase, trigger).phase == expected
    else:
        with pytest.raises(AssertionError, match=f"from {phase} by {trigger}"):
            next_phase(phase, trigger)


def test_every_phase_is_reachable_and_every_phase_but_the_last_can_be_left() -> None:
    assert {row.phase for row in TABLE.values()} | {Phase.STARTING} == set(Phase)
    assert {before for before, _ in TABLE} | {Phase.ENDED} == set(Phase)
    assert {trigger for _, trigger in TABLE} == set(Trigger)


def test_every_row_has_a_sentence_for_operators() -> None:
    for row in TABLE.values():
        assert row.sentence
        assert "\n" not in row.sentence
        assert row.sentence[0].islower()


def test_every_row_is_in_the_diagram() -> None:
    lines = phase_diagram().splitlines()
    for (before, trigger), row in TABLE.items():
        assert f"    {before} --> {row.phase}: {trigger.replace('_', ' ')}" in lines


EVENTS: list[Event] = [
    HeartbeatAnswered(1, Answer(P).build()),
    HeartbeatFailed(1, HeartbeatFailure.GONE, "404"),
    FitnessChanged(fit=False, reason="disk full"),
    HookEnded(99, ok=True, why="exit 0"),
    Joined(TIMING, STORE),
    Left(),
    Released(),
    Stalled(2.0),
    Stop(),
    Tick(),
    status("other", None, 9, 9),
]


def in_phase(phase: Phase) -> Bench:
    """A session in this phase."""
    bench = Bench(hooks={S, P, W})
    match phase:
        case Phase.STARTING:
            bench.begin()
        case Phase.RETURNING:
            bench.keep(bench.session.start(bench.now, PreviousTenure(7, "before")))
            bench.ends()
        case Phase.JOINING:
            bench.begin()
            bench.ends()
        case Phase.MEMBER:
            bench.member()
        case Phase.COOLING:
            bench.pending()
            bench.ends(ok=False)
            bench.ends()
        case Phase.STOPPING:
            bench.primary().step(Stop())
        case Phase.RELEASING:
            bench.primary().step(Stop())
            bench.ends()
        case Phase.LEAVING:
            bench.primary().step(Stop())
            bench.ends()
            bench.wake()
            bench.step(Released())
        case Phase.ENDED:
            bench.begin()
            bench.step(Stop())
            bench.ends()
            bench.step(Left())
    assert bench.session.phase is phase
    return bench


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("phase", Phase)
def test_an_ignored_event_changes_no_more_than_a_tick(phase: Phase, event: Event) -> None:
    if (phase, type(event)) in IGNORED:
        ignoring, ticking = in_phase(phase), in_phase(phase)
        assert ignoring.step(event) == ticking.step(Tick())
        assert ignoring.session.phase is ticking.session.phase is phase
    else:
        in_phase(phase).step(event)


def test_the_sentence_follows_the_phase() -> None:
    bench = Bench(hooks={S})
    seen = [bench.session.sentence]
    bench.begin()
    bench.ends()
    seen.append(bench.session.sentence)
    bench.step(Joined(TIMING, STORE))
    seen.append(bench.session.sentence)
    bench.answered(Answer(P))
    bench.step(Stop())
    seen.append(bench.session.sentence)
    bench.ends()
    seen.append(bench.session.sentence)
    bench.step(Released())
    seen.append(bench.session.sentence)
    bench.step(Left())
    assert [*seen, bench.session.sentence] == [
        FIRST_SENTENCE,
        "joining the group",
        "registered in the group",
        "demoting: stopping",
        "stopping: demoted, waiting for heartbeats and releases in flight",
        "stopping: leaving the group",
        "stopped",
    ]


def test_the_last_sentence_is_that_of_the_failed_demotion() -> None:
    bench = Bench(hooks={S}).primary()
    bench.answered(Answer(S, 1, 6))
    while bench.session.phase is not Phase.ENDED:
        bench.wake()
    assert bench.session.sentence == "demotion failed: exiting without releasing the role"


class Breaks(Session):
    """Raises at the end of a step, after every change."""

    broken = False

    def _advance(self, now: float, effects: list[Effect]) -> None:
        super()._advance(now, effects)
        assert not self.broken, "for the test"


STAGES = [Phase.STARTING, Phase.RETURNING, Phase.JOINING, Phase.MEMBER, Phase.STOPPING]


def state(session: Session) -> dict[str, object]:
    return {
        name: dict(vars(value)) if hasattr(value, "__dict__") else value
        for name, value in vars(session).items()
        if name != "broken"
    }


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("stage", [*STAGES, "primary", "pending", "demoting"])
def test_a_step_that_raises_has_changed_nothing(
    stage: str, event: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon then ends the tenure in order, for which it needs a consistent session."""
    monkeypatch.setattr("tests.core.session_bench.Session", Breaks)
    match stage:
        case "primary":
            bench = Bench(hooks={S}).primary()
        case "pending":
            bench = Bench(hooks={S}).pending()
        case "demoting":
            bench = Bench(hooks={S}).primary()
            bench.answered(Answer(S, 1, 6))
        case _:
            bench = in_phase(Phase(stage))
    session = bench.session
    assert isinstance(session, Breaks)
    before = state(session)
    session.broken = True
    with pytest.raises(AssertionError, match="for the test"):
        bench.step(event, after_s=LEASE_S)
    assert state(session) == before
    session.broken = False
    bench.step(Stop())
    while session.phase is not Phase.ENDED:
        bench.wake()
    assert isinstance(bench.log[-1], Exit)
