"""Health checks gate and move the role (R9): real agents, and checks that read files."""

import json
from pathlib import Path

from .stage import Agent, Coordinator, Stage, until
from .workloads import start


def check(name: str, path: Path, **more: object) -> dict[str, object]:
    """Passes while a file is there."""
    command = ["/usr/bin/test", "-e", str(path)]
    quick = {"interval": 0.3, "limit": 0.3, "rise": 1, "fall": 1}
    return {"name": name, "type": "exec", "command": command, **quick, **more}


def flag(*checks: dict[str, object]) -> str:
    return f"--check={json.dumps(checks)}"


def pair(stage: Stage, coordinator: Coordinator, *words: str) -> tuple[Agent, Agent, int]:
    """host-a, which is checked and primary, and host-b, which is not checked."""
    one = start(stage, "host-a", coordinator, flags=[*words, "--cooldown=0.2"])
    epoch = one.until_role("Primary")["epoch"]
    other = start(stage, "host-b", coordinator)
    other.until_said("joined")
    return one, other, epoch


def test_a_failed_required_check_revokes_the_role_until_it_passes_again(
    stage: Stage, coordinator: Coordinator
) -> None:
    plc = stage.directory / "plc"
    plc.touch()
    one, other, epoch = pair(stage, coordinator, flag(check("plc", plc, required=True)))
    plc.unlink()
    newer = other.until_role("Primary", after_epoch=epoch)["epoch"]
    assert coordinator.tenure(epoch)["WhyEnded"] == "unfit: plc (required): exit 1"
    assert one.state["role"] == "Secondary"
    assert one.state["unfit"] == "plc (required): exit 1"
    plc.touch()
    one.until_said("fit to be primary again")
    assert other.end() == 0
    assert one.until_role("Primary", after_epoch=newer)["unfit"] is None


def test_a_score_difference_within_the_hysteresis_moves_no_role(stage: Stage) -> None:
    coordinator = stage.serve("--score-hysteresis=20", "--minimum-hold=0")
    small, large = stage.directory / "small", stage.directory / "large"
    small.touch()
    large.touch()
    checks = flag(check("small", small, weight=1), check("large", large, weight=4))
    one, other, epoch = pair(stage, coordinator, checks)

    def told() -> float:
        answer = coordinator.ask("GET", f"groups/{stage.group}/clientsessions/host-a")
        return float(answer.body["Heartbeat"]["FailoverScore"])

    small.unlink()
    until(lambda: told() == 80, "the coordinator to hear of 80")
    assert coordinator.status()["Primary"] == "host-a"
    assert "PendingPrimary" not in coordinator.status()
    small.touch()
    until(lambda: told() == 100, "the coordinator to hear of 100")
    large.unlink()
    other.until_role("Primary", after_epoch=epoch)
    one.until_role("Secondary")
    until(lambda: told() == 20, "the coordinator to hear of 20")


def test_a_check_of_scope_primary_runs_on_the_primary_only_and_can_revoke_its_role(
    stage: Stage, coordinator: Coordinator
) -> None:
    ran, good = stage.directory / "ran", stage.directory / "good"
    good.touch()
    script = stage.directory / "check"
    script.write_text(f"#!/bin/sh\necho $PPID >> {ran}\n[ -e {good} ]\n")
    script.chmod(0o700)
    table = check("workload", good, command=[str(script)], scope="primary", required=True)
    words = [flag(table)]
    one = start(stage, "host-a", coordinator, flags=words)
    epoch = one.until_role("Primary")["epoch"]
    other = start(stage, "host-b", coordinator, flags=words)
    other.until_said("joined")
    until(ran.exists, "the first run")
    assert set(ran.read_text().split()) == {str(one.popen.pid)}
    good.unlink()
    newer = other.until_role("Primary", after_epoch=epoch)["epoch"]
    until(lambda: str(other.popen.pid) in ran.read_text().split(), "it to run on the new primary")
    assert coordinator.tenure(epoch)["WhyEnded"].startswith("unfit: workload (required)")
    assert newer == epoch + 1


def test_a_member_is_not_promoted_before_a_check_has_passed(
    stage: Stage, coordinator: Coordinator
) -> None:
    path = stage.directory / "good"
    sick = start(stage, "host-a", coordinator, flags=[flag(check("good", path))])
    sick.until_said("joined")
    until(lambda: (sick.state.get("unfit") or "").startswith("good: "), "sidecars to be told")
    healthy = start(stage, "host-b", coordinator)
    assert healthy.until_role("Primary")["epoch"] == 1
    assert healthy.end() == 0
    until(lambda: "Primary" not in coordinator.status(), "the role to be released")
    path.touch()
    assert sick.until_role("Primary")["epoch"] == 2
    assert sick.state["score"] == 100
