"""Hooks of real agents: their payload, and how failing and hanging hooks are handled."""

import os
import signal
import time
from datetime import datetime
from typing import Any

from .stage import Agent, Coordinator, Stage, ask, lives, until

DOCUMENTED = {
    "FAILOVER_EVENT",
    "FAILOVER_GROUP",
    "FAILOVER_SESSION",
    "FAILOVER_OLD_ROLE",
    "FAILOVER_NEW_ROLE",
    "FAILOVER_EPOCH",
    "FAILOVER_REASON",
    "FAILOVER_LAST_DATA_PROCESSED_TIME",
    "FAILOVER_DEADLINE_MS",
    "FAILOVER_PREVIOUS_PRIMARY",
    "FAILOVER_STATE_FILE",
    "FAILOVER_PROBE_URL",
    "FAILOVER_GAP_MS",
}
INHERITED = {"PATH", "HOME", "LANG", "TZ"}


def given(stage: Stage, agent: Agent, event: str) -> dict[str, str]:
    text = stage.environment_file(agent.name, event).read_text()
    return dict(entry.split("=", 1) for entry in text.split("\0") if entry)


def told(stage: Stage, agent: Agent, event: str) -> dict[str, Any]:
    """The JSON of the last run of a hook."""
    runs = [e for e in stage.events(agent.name) if (e.what, e.which) == ("begin", event)]
    return dict(runs[-1].facts)


def report(agent: Agent, time: str) -> None:
    answer = ask("POST", f"{agent.state['probe']}/data-processed", {"time": time})
    assert (answer.status, answer.body) == (200, {"time": time})


def test_each_hook_receives_the_documented_payload_as_variables_and_as_json(
    stage: Stage, coordinator: Coordinator
) -> None:
    one, other, epoch = stage.pair(coordinator)
    processed = "2026-01-31T12:00:00.500000Z"
    report(one, processed)
    assert one.end() == 0
    other.until_role("Primary", after_epoch=epoch)
    newer = other.state["epoch"]
    common = {"group": stage.group}
    took_over = {"session": other.name, "previous_primary": one.name, **common}
    right: list[tuple[Agent, str, dict[str, Any]]] = [
        (
            one,
            "secondary",
            {
                "session": one.name,
                "old_role": "Primary",
                "new_role": "Secondary",
                "epoch": epoch,
                "reason": "stopping",
                **common,
            },
        ),
        (
            other,
            "pending_primary",
            {
                "old_role": "Secondary",
                "new_role": "PendingPrimary",
                **took_over,
            },
        ),
        (
            other,
            "primary",
            {
                "old_role": "PendingPrimary",
                "new_role": "Primary",
                "epoch": newer,
                "reason": "confirmed by the coordinator",
                **took_over,
            },
        ),
    ]
    for agent, event, facts in right:
        as_json = told(stage, agent, event)
        assert {k: as_json[k] for k in facts} == facts
        assert as_json["event"] == event
        assert 0 < as_json["deadline_ms"] <= 30_000
        assert as_json["state_file"] == str(agent.state_file)
        assert as_json["probe_url"] == agent.state["probe"]
        if event != "pending_primary":
            assert as_json["last_data_processed_time"] == processed
        variables = given(stage, agent, event)
        assert DOCUMENTED <= set(variables) <= DOCUMENTED | INHERITED | {"FAILOVER_TENURE"}
        assert set(variables) & INHERITED == set(os.environ) & INHERITED
        as_text = {f"FAILOVER_{k.upper()}": "" if v is None else str(v) for k, v in as_json.items()}
        assert {k: v for k, v in variables.items() if k in DOCUMENTED} == as_text


def test_the_next_primary_receives_the_data_processed_time(
    stage: Stage, coordinator: Coordinator
) -> None:
    one, other, epoch = stage.pair(coordinator)
    report(one, "2026-01-31T12:00:00Z")
    earlier = ask("POST", f"{one.state['probe']}/data-processed", {"time": "2026-01-31T11:00:00Z"})
    assert earlier.body == {"time": "2026-01-31T12:00:00Z"}  # never back within a tenure
    until(
        lambda: coordinator.status().get("LastDataProcessedTime") == "2026-01-31T12:00:00Z",
        "the time to be in the status",
    )
    until(lambda: one.state["last_data_processed_time"] == "2026-01-31T12:00:00Z", "the state file")
    stage.kill(one)
    other.until_role("Primary", after_epoch=epoch)
    variables = given(stage, other, "primary")
    assert variables["FAILOVER_LAST_DATA_PROCESSED_TIME"] == "2026-01-31T12:00:00Z"
    assert coordinator.status()["LastDataProcessedTime"] == "2026-01-31T12:00:00Z"


def test_a_failed_promotion_demotes_releases_and_doubles_the_cooldown(
    stage: Stage, coordinator: Coordinator
) -> None:
    broken = stage.run("host-a", coordinator, primary="exit 1", flags=("--cooldown=0.3",))

    def four() -> list[dict[str, Any]]:
        if coordinator.ask("GET", f"groups/{stage.group}").status == 404:
            return []
        history = [entry for entry in coordinator.history() if "Until" in entry]
        return history if len(history) >= 4 else []

    tenures = until(four, "four failed promotions")
    assert {entry["WhyEnded"] for entry in tenures} == {"promotion failed: exit 1"}
    for n in range(3):
        ended = datetime.fromisoformat(tenures[n]["Until"])
        pause_s = (datetime.fromisoformat(tenures[n + 1]["Since"]) - ended).total_seconds()
        assert pause_s > 0.25 * 2**n
    changes = broken.lines("role changed")
    assert not [line for line in changes if "after=Primary" in line]
    runs = [e.which for e in stage.events("host-a") if (e.what, e.which) != ("end", "primary")]
    assert runs.count("primary") * 2 <= runs.count("secondary")  # begin and end of each demotion
    other = stage.run("host-b", coordinator)
    other.until_role("Primary")


def test_a_promotion_that_hangs_is_killed_at_its_limit_and_the_other_takes_over(
    stage: Stage, coordinator: Coordinator
) -> None:
    deaf = "trap '' TERM; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 1; done"
    hanging = stage.run(
        "host-a", coordinator, primary=deaf, flags=("--hook-limit=0.5", "--cooldown=20")
    )
    stage.until_event("host-a", "begin", "primary")
    other = stage.run("host-b", coordinator)
    other.until_role("Primary")
    ended = hanging.lines("hook ended hook=primary")
    assert 'result="killed by signal 9"' in ended[0]
    assert coordinator.tenure(1)["WhyEnded"] == "promotion failed: killed by signal 9"
    assert ("end", "secondary") in [(e.what, e.which) for e in stage.events("host-a")][-1:]
    stage.check_promise()


def test_a_failed_demotion_is_retried_and_then_the_agent_exits_with_its_own_code(
    stage: Stage, coordinator: Coordinator
) -> None:
    """R4: the role is not released, and what the promotion left behind is killed."""
    begun = stage.directory / "begun"
    pid_file = stage.directory / "workload.pid"
    agent = stage.run(
        "host-a",
        coordinator,
        primary=f"sleep 60 >/dev/null 2>&1 & echo $! > {pid_file}",
        secondary=f"[ ! -e {begun} ] || exit 7; touch {begun}",
        flags=("--hook-limit=1",),
    )
    epoch = agent.until_role("Primary")["epoch"]
    workload = int(pid_file.read_text())
    assert lives(workload)
    before = len(stage.events("host-a"))
    assert agent.end() == 40
    attempts = [e for e in stage.events("host-a")[before:] if e.what == "begin"]
    assert {e.which for e in attempts} == {"secondary"}
    assert len(attempts) >= 2
    until(lambda: not lives(workload), "the workload to be killed")
    assert agent.lines("demotion failed")
    assert "Traceback" not in agent.said()
    assert agent.state["role"] == "Secondary"
    until(lambda: "Until" in coordinator.tenure(epoch), "the lease to end")
    assert "lease ended" in coordinator.tenure(epoch)["WhyEnded"]


def test_a_demotion_preempts_a_running_promotion(stage: Stage, coordinator: Coordinator) -> None:
    slow = (
        f"trap 'echo \"host-a termed primary {{}}\" >> {stage.events_file}; exit 1' TERM\n"
        f"echo 'host-a ready primary {{}}' >> {stage.events_file}\n"
        "for i in $(seq 200); do sleep 0.1; done"
    )
    agent = stage.run("host-a", coordinator, primary=slow)
    stage.until_event("host-a", "ready", "primary")
    stage.note("test", "stop")
    assert agent.end() == 0
    happened = [(e.what, e.which) for e in stage.events()]
    assert happened[happened.index(("ready", "primary")) :] == [
        ("ready", "primary"),
        ("stop", ""),
        ("termed", "primary"),
        ("begin", "secondary"),
        ("end", "secondary"),
    ]
    assert not [line for line in agent.lines("role changed") if "after=Primary" in line]
    assert coordinator.tenure(1)["WhyEnded"] == "stopping"


def test_a_child_that_a_hook_leaves_behind_delays_nothing(
    stage: Stage, coordinator: Coordinator
) -> None:
    pid_file = stage.directory / "workload.pid"
    agent = stage.run(
        "host-a",
        coordinator,
        primary=f"sleep 60 & echo $! > {pid_file}",
        secondary=f"[ ! -e {pid_file} ] || kill $(cat {pid_file})",
    )
    agent.until_role("Primary")
    workload = int(pid_file.read_text())
    agent.until_said("hook left a process behind that holds its output")
    assert lives(workload)
    assert agent.end() == 0
    until(lambda: not lives(workload), "the demotion hook to stop it")


def test_heartbeats_continue_while_a_promotion_runs(stage: Stage, coordinator: Coordinator) -> None:
    """R9: the hook takes longer than L, and the lease holds."""
    go = stage.directory / "go"
    agent = stage.run("host-a", coordinator, primary=f"while [ ! -e {go} ]; do sleep 0.05; done")
    stage.until_event("host-a", "begin", "primary")
    began = time.monotonic()
    until(lambda: time.monotonic() > began + 3, "more than L to pass")
    assert agent.state["role"] == "PendingPrimary"
    assert coordinator.status()["Primary"] == "host-a"
    go.touch()
    assert agent.until_role("Primary")["epoch"] == 1
    agent.send(signal.SIGTERM)
    assert agent.wait() == 0
