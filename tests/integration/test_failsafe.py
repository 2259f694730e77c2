"""Failsafe with real processes: three members and a coordinator on a LAN whose links are cut (R21-R35)."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .failsafe import COORDINATOR, LEASE_S, MEMBERS, Plant, a_plant, failsafe_state
from .stage import until
from .workloads import demote_slacks_s, output
from .writer import overlap_s

LONGEST_GAP_S = 0.5
"""The workload writes each 5 ms; a busy machine may let it wait."""

OUTAGE_S = 2 * LEASE_S
LONG_LEASE_S = 15.0
LONG_TIMING = ("--failover-timeout=15", "--demote=2", "--margin=1.5")
"""L = 15 s, R = 11.5 s: an agent restarts within R."""


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    with a_plant(tmp_path) as plant:
        yield plant


def kill(plant: Plant) -> None:
    plant.coordinator.end(signal.SIGKILL)


def stop(plant: Plant) -> None:
    plant.coordinator.send(signal.SIGSTOP)


def cut_off(plant: Plant) -> None:
    plant.lan.cut_both_ways(COORDINATOR, *plant.agents)


def cut_answers(plant: Plant) -> None:
    for name in plant.agents:
        plant.lan.cut(name, COORDINATOR)


def cut_requests(plant: Plant) -> None:
    for name in plant.agents:
        plant.lan.cut(COORDINATOR, name)


def go_on(plant: Plant) -> None:
    plant.coordinator.send(signal.SIGCONT)


def heal(plant: Plant) -> None:
    plant.lan.heal()


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (kill, Plant.restart_coordinator),
        (stop, go_on),
        (cut_off, heal),
        (cut_answers, heal),
        (cut_requests, heal),
    ],
)
def test_the_work_goes_on_through_an_outage_of_the_coordinator(
    plant: Plant, begin: Callable[[Plant], None], end: Callable[[Plant], None]
) -> None:
    """R27, R28, R33: no gap, and the same epoch before and after."""
    one = plant.run_all()
    epoch = plant.agents[one].state["epoch"]
    since_s = time.monotonic()
    begin(plant)
    plant.until_failsafe(one, "holding")
    time.sleep(OUTAGE_S)  # the length of the outage itself
    end(plant)
    assert plant.until_ready() == one
    until(lambda: plant.coordinator.status().get("Primary") == one, f"{one} to be primary again")
    time.sleep(LEASE_S)  # whoever is promoted by mistake is by then
    assert plant.writers(since_s) == {(epoch, one)}
    assert plant.gap_s(since_s) < LONGEST_GAP_S
    assert "failsafe hold begins" in plant.agents[one].said()
    assert "failsafe hold ended" in plant.agents[one].said()
    assert "failsafe promise" in plant.agents[plant.others(one)[0]].said()


@pytest.mark.parametrize("way", ["both", "answers", "requests"])
def test_another_member_takes_over_from_a_primary_that_alone_is_cut_off(
    plant: Plant, way: str
) -> None:
    """R29: a member that reaches the coordinator says no."""
    one = plant.run_all()
    epoch = plant.agents[one].state["epoch"]
    if way != "requests":
        plant.lan.cut(one, COORDINATOR)
    if way != "answers":
        plant.lan.cut(COORDINATOR, one)
    others = [plant.agents[name] for name in plant.others(one)]
    plant.stage.until_primary(*others, after_epoch=epoch)
    plant.agents[one].until_role("Secondary")
    assert overlap_s(output(plant.stage)) <= 0
    assert plant.agents[one].state["epoch"] == epoch


def test_without_one_member_the_primary_demotes_before_its_lease_ends(plant: Plant) -> None:
    """What is not promised: a member that is dead in an outage ends the hold."""
    one = plant.run_all()
    plant.coordinator.end(signal.SIGKILL)
    plant.until_failsafe(one, "holding")
    dead, alive = plant.others(one)
    plant.agents[dead].end(signal.SIGKILL)
    killed_s = time.monotonic()
    plant.agents[one].until_role("Secondary")
    until(lambda: "failsafe hold ended" in plant.agents[one].said(), "the end of the hold")
    (line,) = plant.agents[one].lines("failsafe hold ended")
    assert f'without="{dead}: ' in line
    until(lambda: "demoted epoch=" in plant.agents[one].said(), "the demotion")
    time.sleep(LEASE_S)  # from then on nobody may write
    assert not plant.writers(killed_s + LEASE_S)
    assert min(demote_slacks_s(plant.agents[one])) > 0
    assert plant.agents[alive].state["role"] == "Secondary"


def test_a_member_that_joins_in_an_outage_of_the_primary_is_not_promoted(tmp_path: Path) -> None:
    """R25: the primary does not ask it."""
    with a_plant(tmp_path, "joiner") as plant:
        one = plant.run_all()
        epoch = plant.agents[one].state["epoch"]
        since_s = time.monotonic()
        cut_off(plant)
        plant.until_failsafe(one, "holding")
        plant.run("joiner")
        plant.agents["joiner"].until_said("joined")
        until(
            lambda: plant.coordinator.status()["Failsafe"]["State"] == "Restricted",
            "the end of the lease",
        )
        time.sleep(2 * LEASE_S)
        choosable = plant.coordinator.status()["Failsafe"]["Choosable"]
        assert {member["Id"] for member in choosable} == set(MEMBERS)
        assert plant.agents["joiner"].state["role"] == "Secondary"
        plant.lan.heal()
        until(lambda: len(plant.members(one)) == 3, "the joiner to be asked, too")
        assert plant.writers(since_s) == {(epoch, one)}
        assert plant.gap_s(since_s) < LONGEST_GAP_S


@pytest.mark.parametrize("first", ["primary", "others"])
def test_whoever_is_back_first_the_same_tenure_goes_on(plant: Plant, first: str) -> None:
    """R30, R33: a promise keeps the others from the role until the primary is back."""
    one = plant.run_all()
    epoch = plant.agents[one].state["epoch"]
    since_s = time.monotonic()
    cut_off(plant)
    plant.until_failsafe(one, "holding")
    time.sleep(OUTAGE_S)
    order = [[one], plant.others(one)] if first == "primary" else [plant.others(one), [one]]
    plant.lan.heal(COORDINATOR)
    for names in order:
        plant.lan.heal(*names)
        time.sleep(0.1)
    assert plant.until_ready() == one
    time.sleep(LEASE_S)
    assert plant.writers(since_s) == {(epoch, one)}
    assert plant.gap_s(since_s) < LONGEST_GAP_S
    assert plant.coordinator.tenure(epoch).get("WhyEnded") is None


def test_a_member_that_restarts_in_an_outage_votes_again_and_keeps_its_promise(
    plant: Plant,
) -> None:
    """R29, R30: the primary goes on if it answers within R; nobody takes over for L after a vote."""
    one = plant.run_all(timing=LONG_TIMING)
    epoch = plant.agents[one].state["epoch"]
    plant.coordinator.send(signal.SIGSTOP)
    plant.until_failsafe(one, "holding")
    restarted = plant.others(one)[0]
    plant.agents[restarted].end(signal.SIGKILL)
    plant.run(restarted, timing=LONG_TIMING)
    plant.agents[restarted].until_said("failsafe promise")
    assert failsafe_state(plant.agents[one]) == "holding"
    plant.lan.cut_both_ways(one, COORDINATOR)  # so that its guard cannot release the role
    plant.agents[one].end(signal.SIGKILL)
    killed_s = time.monotonic()
    plant.coordinator.send(signal.SIGCONT)
    others = [plant.agents[name] for name in plant.others(one)]
    plant.stage.until_primary(*others, after_epoch=epoch)
    question_s = 2.0
    assert time.monotonic() - killed_s >= LONG_LEASE_S - question_s
    assert overlap_s(output(plant.stage)) <= 0


def test_a_v1_client_in_the_group_turns_failsafe_off_visibly(plant: Plant) -> None:
    """R21: the primary demotes as without failsafe, and status names who keeps it off."""
    one = plant.run_all()
    members = f"groups/{plant.stage.group}/clientsessions"
    assert plant.coordinator.ask("POST", members, {"Id": "vendor", "Name": "v1"}).status < 300
    beat = {"FailoverScore": 50.0}
    assert plant.coordinator.ask("POST", f"{members}/vendor/heartbeat", beat).status == 200
    until(lambda: failsafe_state(plant.agents[one]) == "off", "failsafe to be off")

    def is_off() -> bool:
        status = plant.coordinator.status()["Failsafe"]
        return status["State"] == "Off" and "vendor" in status["Why"]

    until(is_off, "the coordinator to say who turns failsafe off")
    assert "vendor" in plant.agents[one].state["failsafe"]["why"]
    until(lambda: "failsafe off" in plant.agents[one].said(), "the line")
    plant.coordinator.send(signal.SIGSTOP)
    plant.agents[one].until_role("Secondary")


def test_at_rest_nothing_is_asked_but_rehearsals(plant: Plant) -> None:
    """R35: a rehearsal promises nothing."""
    one = plant.run_all(timing=LONG_TIMING)
    time.sleep(LEASE_S)
    for name in plant.others(one):
        assert "failsafe promise" not in plant.agents[name].said()
    assert "failsafe hold begins" not in plant.agents[one].said()
