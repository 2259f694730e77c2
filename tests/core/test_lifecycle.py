"""R5, R6: from the first demotion to the exit, with any request in flight or unanswered."""

from collections.abc import Callable
from itertools import product

import pytest

from agent.core.effects import (
    UNREQUESTED_DEMOTIONS,
    Cause,
    Effect,
    Escalate,
    Exit,
    Join,
    KillHook,
    Leave,
    Publish,
    Release,
    SendHeartbeat,
    StartHook,
    TermHook,
)
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
)
from agent.core.lifecycle import STOP_WAIT_REQUESTS
from agent.core.phases import Phase
from agent.core.session import PreviousTenure
from agent.core.timing import plan
from agent.errors import ExitCode
from agent.model import Role

from .session_bench import LEASE_S, STORE, TIMING, Answer, Bench, P, S, W, kinds, status, v1

FORMER = PreviousTenure(7, "the-process-before")
TIMEOUT_S = TIMING.request_timeout_s


def releases(bench: Bench) -> list[int]:
    return [effect.epoch for effect in bench.log if isinstance(effect, Release)]


# -- the code and the reason of a stop ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (ExitCode.OK, Cause.STOPPING),
        (ExitCode.TASK_FAILED, Cause.TASK_FAILED),
        (ExitCode.OTHER_STORE, Cause.OTHER_STORE),
        (ExitCode.UNREACHABLE, Cause.STOPPING),
    ],
)
def test_r5_a_failed_task_ends_the_tenure_in_order(code: ExitCode, cause: Cause) -> None:
    bench = Bench(hooks={S}).primary()
    (publish, hook) = bench.step(Stop(code, "the reader of the status has died"))
    assert publish == Publish(P, S, 1, cause, "the reader of the status has died")
    assert isinstance(hook, StartHook)
    assert kinds(bench.ends()) == [Release]
    assert kinds(bench.step(Released())) == [Leave]
    assert bench.step(Left()) == [Exit(code)]


def test_r5_a_failure_during_a_stop_is_the_exit_code() -> None:
    bench = Bench(hooks={S}).primary()
    bench.step(Stop())
    bench.step(Stop(ExitCode.TASK_FAILED, "the release has died"))
    bench.step(Stop(ExitCode.UNREACHABLE, "later"))
    bench.step(Stop())
    bench.ends()
    bench.step(Released())
    assert bench.step(Left()) == [Exit(ExitCode.TASK_FAILED)]


def test_the_lost_hook_runs_after_a_failure_of_the_agent() -> None:
    assert {Cause.TASK_FAILED, Cause.OTHER_STORE} <= UNREQUESTED_DEMOTIONS
    assert not UNREQUESTED_DEMOTIONS & {Cause.STOPPING, Cause.REVOKED}


# -- tenures that this session does not accept -------------------------------------------------------


def test_r5_a_stop_during_the_confirming_heartbeat_releases_the_assigned_tenure() -> None:
    """It cost a full L: the coordinator had a holder that was gone."""
    bench = Bench(hooks={S}).pending()
    assert kinds(bench.step(Stop())) == [(Publish, S), (StartHook, S)]
    bench.answered(Answer(P))
    assert releases(bench) == [], "not before the demotion is done"
    assert bench.ends() == [Release(1, "stopping", LEASE_S)]
    assert kinds(bench.step(Released())) == [Leave]


def test_r5_a_stop_waits_for_the_confirming_heartbeat() -> None:
    bench = Bench().pending()
    assert kinds(bench.step(Stop())) == [(Publish, S)]
    assert bench.answered(Answer(P), after_s=TIMEOUT_S / 2) == [Release(1, "stopping", LEASE_S)]
    assert kinds(bench.step(Released())) == [Leave]


@pytest.mark.parametrize("how", ["failed", "silent", "Secondary", "PendingPrimary"])
def test_r5_a_stop_waits_for_heartbeats_only_until_their_timeout(how: str) -> None:
    bench = Bench().member()
    stopped_at = bench.now
    assert bench.step(Stop()) == []
    match how:
        case "failed":
            effects = bench.fails(HeartbeatFailure.OTHER)
        case "silent":
            effects = bench.wake()
        case _:
            effects = bench.answered(Answer(Role(how), 0, 4))
    assert kinds(effects) == [Leave]
    assert bench.now <= stopped_at + TIMEOUT_S


def test_r5_a_stop_at_a_plain_v1_server_has_nothing_to_wait_for() -> None:
    """It has no epoch to release: leaving ends the tenure."""
    bench = Bench().member(v1_server=True)
    assert kinds(bench.step(Stop())) == [Leave]


def test_r5_a_tenure_assigned_after_the_deletion_is_released_before_the_exit() -> None:
    bench = Bench().member()
    bench.step(Stop())
    assert kinds(bench.wake()) == [Leave]
    assert kinds(bench.answered(Answer(P))) == [Release]
    assert bench.step(Left()) == []
    assert bench.step(Released()) == [Exit(ExitCode.OK)]


def test_r5_a_tenure_after_the_released_one_is_also_released() -> None:
    bench = Bench(hooks={S}).primary()
    bench.wake()
    bench.step(Stop())
    bench.ends()
    bench.answered(Answer(P, 2, 8))
    assert releases(bench) == [1, 2]
    assert bench.step(Released()) == []
    assert kinds(bench.step(Released())) == [Leave]


def test_r5_the_tenure_that_is_being_released_is_not_released_twice() -> None:
    bench = Bench(hooks={S}).primary()
    bench.wake()
    bench.step(Stop())
    bench.answered(Answer(P))
    bench.ends()
    bench.answered(Answer(P), beat=999)
    assert releases(bench) == [1]


def test_r8_a_tenure_assigned_while_leaving_to_cool_down_is_released() -> None:
    bench = Bench(hooks={W}).pending()
    assert kinds(bench.ends(ok=False)) == [(Publish, S), Leave]
    (release,) = bench.answered(Answer(P))
    assert release == Release(1, "promotion failed: exit 1", 5.0)


def test_r8_a_tenure_assigned_during_a_demotion_is_released_if_a_cool_down_follows() -> None:
    bench = Bench(hooks={W, S}).pending()
    bench.ends(ok=False)
    assert bench.answered(Answer(P)) == []
    assert kinds(bench.ends())[-1:] == [Release]


def test_r8_a_tenure_assigned_during_a_demotion_is_accepted_at_the_next_heartbeat() -> None:
    """R3: the answer from before the demotion does not promote."""
    bench = Bench(hooks={S}).pending()
    before = bench.beat
    bench.answered(Answer(S, 0, 5), beat=999)
    bench.answered(Answer(P, 1, 6), beat=before)
    assert bench.session.role is S
    assert kinds(bench.ends()) == [SendHeartbeat]
    bench.answered(Answer(P, 1, 6))
    assert bench.session.role is P
    bench.answered(Answer(S, 1, 7))
    bench.ends()
    assert releases(bench) == [1]


def test_r9_a_tenure_assigned_to_an_unfit_member_is_released() -> None:
    bench = Bench().member()
    bench.step(Stalled(1.5), after_s=0.1)  # forgets the heartbeat
    bench.step(FitnessChanged(fit=False, reason="disk full"))
    assert bench.answered(Answer(P), beat=1) == [Release(1, "unfit: disk full", 0.0)]


def test_r8_a_tenure_with_too_little_of_the_lease_left_is_released() -> None:
    bench = Bench().member()
    effects = bench.answered(Answer(P), after_s=0.8 * TIMING.renew_s)
    assert effects[0] == Release(1, "too little of the lease is left", 0.0)


def test_r8_a_pending_primary_with_too_little_of_the_lease_left_sends_another_heartbeat() -> None:
    """It has to demote first; the group does not wait for it."""
    bench = Bench().pending()
    before = bench.session.renew_by
    assert kinds(bench.answered(Answer(P, 1, 5), after_s=0.8 * TIMING.renew_s)) == [SendHeartbeat]
    assert (bench.session.role, bench.session.renew_by) == (W, before)
    bench.answered(Answer(P, 1, 5))
    assert bench.session.role is P


def test_r5_a_tenure_that_only_a_status_shows_is_released() -> None:
    """The heartbeat's answer was lost."""
    bench = Bench().member()
    bench.fails(HeartbeatFailure.OTHER)
    bench.step(status("me", None, 1, 5))
    bench.fails(HeartbeatFailure.OTHER)
    assert bench.step(Stop()) == [Release(1, "stopping", LEASE_S)]


def test_r8_a_tenure_assigned_before_the_session_was_forgotten_is_kept_for_the_next_heartbeat() -> (
    None
):
    bench = Bench().member()
    first = bench.beat
    bench.wake()
    bench.fails(HeartbeatFailure.GONE)
    bench.answered(Answer(P), beat=first)
    bench.step(Joined(TIMING, STORE))
    assert releases(bench) == []
    bench.answered(Answer(P))
    assert bench.session.role is P


# -- the tenure of the previous process --------------------------------------------------------------


def begun(
    *, hooks: frozenset[Role] = frozenset({S}), former: PreviousTenure | None = FORMER
) -> Bench:
    bench = Bench(hooks=hooks)
    bench.keep(bench.session.start(bench.now, former))
    return bench


def test_r6_the_previous_tenure_is_released_between_the_first_demotion_and_joining() -> None:
    bench = begun()
    assert kinds(bench.log) == [(StartHook, S)]
    (release,) = bench.ends()
    assert isinstance(release, Release)
    assert (release.epoch, release.instance, release.hold_off_s) == (7, FORMER.instance, 0.0)
    assert kinds(bench.step(Released())) == [Join]
    assert kinds(bench.step(Joined(TIMING, STORE))) == [SendHeartbeat]


def test_r6_joining_waits_for_the_release_for_one_request_timeout_at_most() -> None:
    bench = begun()
    bench.ends()
    began_at = bench.now
    assert kinds(bench.wake()) == [Join]
    assert bench.now == pytest.approx(began_at + TIMEOUT_S)


def test_r6_a_late_answer_to_the_previous_release_does_not_count_for_another_one() -> None:
    bench = begun()
    bench.ends()
    bench.wake()
    bench.step(Joined(TIMING, STORE))
    bench.answered(Answer(P, 8, 80))
    bench.step(Stop())
    assert kinds(bench.ends()) == [Release]
    assert bench.step(Released()) == []
    assert kinds(bench.step(Released())) == [Leave]


def test_r6_the_previous_tenure_is_not_released_after_a_failed_demotion() -> None:
    bench = begun()
    while bench.session.phase is not Phase.ENDED:
        bench.ends(ok=False)
        bench.wake()
    assert releases(bench) == []
    assert kinds(bench.log)[-2:] == [Escalate, Exit]


def test_r6_the_previous_tenure_is_released_despite_a_stop() -> None:
    bench = begun()
    bench.step(Stop())
    assert kinds(bench.ends()) == [Release]
    assert kinds(bench.step(Released())) == [Leave]


def test_r6_a_stop_waits_for_the_release_of_the_previous_tenure() -> None:
    bench = begun()
    bench.ends()
    assert bench.step(Stop()) == []
    assert kinds(bench.step(Released())) == [Leave]
    assert bench.step(Left()) == [Exit(ExitCode.OK)]


# -- requests in flight ------------------------------------------------------------------------------


class Life:
    """A session whose effects are answered as a case requires: at once, late, with an error, or never."""

    def __init__(self, bench: Bench, answers: str, role: Role) -> None:
        self.bench = bench
        self.answers = answers
        self.role = role
        self.open = list(bench.log)
        self.hooks: set[int] = set()

    def answer(self, effect: Effect) -> Event | None:
        match effect:
            case StartHook(run):
                self.hooks.add(run)
                return HookEnded(run, ok=True, why="exit 0") if self.answers == "well" else None
            case TermHook(run) | KillHook(run) if run in self.hooks:
                ended = self.answers == "well" or isinstance(effect, KillHook)
                return HookEnded(run, ok=False, why="killed") if ended else None
            case SendHeartbeat(beat) if self.answers == "well":
                return HeartbeatAnswered(beat, Answer(self.role, 3, 30).build())
            case SendHeartbeat(beat) if self.answers == "badly":
                return HeartbeatFailed(beat, HeartbeatFailure.GONE, "404")
            case Release() if self.answers != "never":
                return Released()
            case Leave() if self.answers != "never":
                return Left()
            case Join() if self.answers == "well":
                return Joined(TIMING, STORE)
            case _:
                return None

    def end(self) -> float:
        """Run to the exit; the seconds that this took."""
        bench, began_at = self.bench, self.bench.now
        while bench.session.phase is not Phase.ENDED:
            assert bench.now < began_at + 100, "it never exits"
            if not self.open:
                before = bench.now
                self.open += bench.wake()
                assert bench.now < float("inf"), f"nobody wakes it: {bench.session.phase}"
                assert bench.now > before or self.open, "it spins"
                continue
            event = self.answer(self.open.pop(0))
            if event is not None:
                self.open += bench.step(event)
        return bench.now - began_at


STAGES: dict[str, Callable[[], Bench]] = {
    "starting": lambda: Bench(hooks={S}),
    "returning": begun,
    "joining": lambda: Bench(hooks={S}),
    "member": lambda: Bench(hooks=frozenset(Role)).member(),
    "pending": lambda: Bench(hooks={S}).pending(),
    "promoting": lambda: Bench(hooks={S, P}).pending(),
    "primary": lambda: Bench(hooks={S}).primary(),
    "primary of v1": lambda: Bench(hooks={S}).primary(v1_server=True),
    "rejoining": lambda: Bench(hooks={S}).primary(),
    "demoting": lambda: Bench(hooks={S}).primary(),
    "cooling": lambda: Bench(hooks={W, S}).pending(),
    "releasing": lambda: Bench(hooks={S}).primary(),
    "leaving": lambda: Bench().member(),
}


def at_stage(stage: str) -> Bench:
    """A session with a request or hook in flight."""
    bench = STAGES[stage]()
    match stage:
        case "starting":
            bench.begin()
        case "returning":
            bench.ends()
        case "joining":
            bench.begin()
            bench.ends()
        case "promoting":
            bench.answered(Answer(P))
        case "rejoining":
            bench.wake()
            bench.fails(HeartbeatFailure.GONE)
        case "demoting":
            bench.answered(Answer(S, 1, 6))
        case "cooling":
            bench.ends(ok=False)
            bench.ends()
        case "releasing":
            bench.wake()
            bench.step(Stop())
            bench.ends()
        case "leaving":
            bench.answered(Answer(S))
            bench.step(Stop())
        case _:
            pass
    return bench


def surprise(bench: Bench, name: str) -> Event | None:
    beat = max((e.number for e in bench.log if isinstance(e, SendHeartbeat)), default=1)
    run = max((e.run for e in bench.log if isinstance(e, StartHook)), default=1)
    events: dict[str, Event | None] = {
        "nothing": None,
        "Primary": HeartbeatAnswered(beat, Answer(P, 4, 40).build()),
        "PendingPrimary": HeartbeatAnswered(beat, Answer(W, 4, 40).build()),
        "Secondary": HeartbeatAnswered(beat, Answer(S, 4, 40).build()),
        "Primary of v1": HeartbeatAnswered(beat, v1(P).build()),
        "404": HeartbeatFailed(beat, HeartbeatFailure.GONE, "404"),
        "429": HeartbeatFailed(beat, HeartbeatFailure.BACK_OFF, "429", 60.0),
        "TLS alert": HeartbeatFailed(beat, HeartbeatFailure.OTHER, "certificate required"),
        "other store": HeartbeatFailed(beat, HeartbeatFailure.OTHER_STORE, "store-2"),
        "hook ended": HookEnded(run, ok=True, why="exit 0"),
        "hook failed": HookEnded(run, ok=False, why="exit 1"),
        "stalled": Stalled(1.5),
        "unfit": FitnessChanged(fit=False, reason="disk full"),
        "joined": Joined(TIMING, STORE),
        "joined elsewhere": Joined(TIMING, "store-2"),
        "released": Released(),
        "left": Left(),
        "task died": Stop(ExitCode.TASK_FAILED, "the join has died"),
        "status": status("me", None, 5, 50),
    }
    return events[name]


SURPRISES = [
    "nothing", "Primary", "PendingPrimary", "Secondary", "Primary of v1", "404", "429", "TLS alert",
    "other store", "hook ended", "hook failed", "stalled", "unfit", "joined", "joined elsewhere",
    "released", "left", "task died", "status",
]  # fmt: skip

LONGEST_S = TIMING.renew_s + TIMING.demote_s + (1 + 2 * STOP_WAIT_REQUESTS) * TIMEOUT_S


@pytest.mark.parametrize("answers", ["well", "badly", "late", "never"])
@pytest.mark.parametrize("stage", STAGES)
def test_r5_a_stop_always_reaches_the_exit(stage: str, answers: str) -> None:
    """With any request in flight, any event before or after the stop, and any request unanswered."""
    for name, first, role in product(SURPRISES, [True, False], Role):
        bench = at_stage(stage)
        life = Life(bench, answers, role)
        event = surprise(bench, name)
        for what in (event, Stop()) if first else (Stop(), event):
            if what is not None:
                life.open += bench.step(what)
        assert life.end() <= LONGEST_S, (name, first, role)
        assert isinstance(bench.log[-1], Exit)
        check_order(bench.log)


def check_order(log: list[Effect]) -> None:
    """No release and no leaving while a demotion is owed; each tenure is released once."""
    promoted = False
    for effect in log:
        match effect:
            case StartHook():
                promoted = effect.facts.role is not S
            case Release() | Leave():
                assert not promoted
            case _:
                pass
    given = [effect.epoch for effect in log if isinstance(effect, Release)]
    assert len(given) == len(set(given))


# -- the timing of a lease ---------------------------------------------------------------------------


def test_r4_a_lease_keeps_the_timing_with_which_it_was_granted() -> None:
    """The group was created again with a longer L: the old lease still ends after the old L."""
    bench = Bench(hooks={S}).primary()
    sent_at = bench.session.sent_at
    bench.wake()
    bench.fails(HeartbeatFailure.GONE)
    bench.step(Joined(plan(10 * LEASE_S), STORE))
    assert bench.session.timing.lease_s == 10 * LEASE_S
    assert bench.session.lease_until == sent_at + LEASE_S
    while bench.session.role is P:
        bench.wake()
    assert bench.now == pytest.approx(sent_at + TIMING.renew_s)
    assert bench.session.guard_deadlines is not None
    assert bench.session.guard_deadlines[1] < sent_at + LEASE_S
    while bench.session.phase is not Phase.ENDED:
        bench.wake()
    assert bench.now <= sent_at + LEASE_S - TIMING.drift_s


def test_r12_the_guard_keeps_its_deadlines_after_a_failed_demotion() -> None:
    bench = Bench(hooks={S}).primary()
    bench.answered(Answer(S, 1, 6))
    before = bench.session.guard_deadlines
    assert before is not None
    while bench.session.phase is not Phase.ENDED:
        bench.wake()
    assert bench.session.guard_deadlines == before


# -- a reload during a tenure ------------------------------------------------------------------------


def test_r7_a_tenure_keeps_the_demotion_hook_that_a_reload_removes() -> None:
    """It ended with the workload running, the role released, and exit code 0."""
    bench = Bench(hooks={S, P}).primary()
    options = bench.session.options
    bench.session.reconfigure(type(options)("me"))
    assert bench.session.demotion_is_owed
    assert kinds(bench.step(Stop())) == [(Publish, S), (StartHook, S)]
    assert kinds(bench.ends()) == [Release]
    assert not bench.session.demotion_is_owed
