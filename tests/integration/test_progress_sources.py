"""The data-processed time, from its source on one host to the next primary's hook on the other."""

import json
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent.schema.scalars import format_date_time

from .stage import Agent, Coordinator, Stage, ask, until
from .workloads import start

BEHIND_S = 60.0


def given(agent: Agent, event: str, stage: Stage) -> dict[str, str]:
    text = stage.environment_file(agent.name, event).read_text()
    return dict(entry.split("=", 1) for entry in text.split("\0") if entry)


def to_file(path: Path, time: str) -> None:
    path.write_text(f"{time}\n")


def to_mtime(path: Path, time: str) -> None:
    path.touch()
    at_s = datetime.fromisoformat(time).timestamp()
    os.utime(path, (at_s, at_s))


def to_socket(path: Path, time: str) -> None:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(path))
        line.sendall(f"{time}\n".encode())


SOURCES: list[tuple[str, Callable[[Path], dict[str, object]], Callable[[Path, str], None]]] = [
    ("file", lambda path: {"path": str(path), "interval": 0.1}, to_file),
    ("file_time", lambda path: {"path": str(path), "interval": 0.1}, to_mtime),
    ("socket", lambda path: {"path": str(path)}, to_socket),
    ("command", lambda path: {"command": ["/bin/cat", str(path)], "interval": 0.2}, to_file),
]


def test_each_source_reaches_the_successors_hook_with_the_gap(
    stage: Stage, coordinator: Coordinator
) -> None:
    """All at once, one after the other as primary of the one group; times grow, as they do."""
    began = datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=BEHIND_S)
    agents = []
    for n, (kind, table, _) in enumerate(SOURCES):
        name = f"host-{n}"
        source = {"type": kind, **table(stage.directory / f"p{n}")}
        hook = stage.hook(name, "primary")
        words = [f"--progress={json.dumps(source)}", f"--hook-primary={hook}"]
        agents.append(start(stage, name, coordinator, flags=words))
    left = list(agents)
    epoch = 0
    told = None
    while left:
        agent = stage.until_primary(*left, after_epoch=epoch)
        epoch = agent.state["epoch"]
        variables = given(agent, "primary", stage)
        assert variables["FAILOVER_LAST_DATA_PROCESSED_TIME"] == (told or "")
        if told is not None:
            gap_s = int(variables["FAILOVER_GAP_MS"]) / 1000
            now = datetime.now(UTC)
            assert 0 < (now - datetime.fromisoformat(told)).total_seconds() - gap_s < BEHIND_S / 2
        n = agents.index(agent)
        told = format_date_time(began + timedelta(seconds=epoch))
        SOURCES[n][2](stage.directory / f"p{n}", told)
        until(lambda t=told: coordinator.status().get("LastDataProcessedTime") == t, told)  # type: ignore[misc]
        left.remove(agent)
        assert agent.end() == 0


def test_a_time_in_the_future_is_refused_with_400_and_changes_nothing(
    stage: Stage, coordinator: Coordinator
) -> None:
    agent = start(stage, "host-a", coordinator)
    url = f"{agent.until_role('Primary')['probe']}/data-processed"
    now = format_date_time(datetime.now(UTC))
    assert ask("POST", url, {"time": now}).status == 200
    later = format_date_time(datetime.now(UTC) + timedelta(hours=1))
    answer = ask("POST", url, {"time": later})
    assert answer.status == 400
    assert "ahead of this host's clock" in answer.body["error"]
    assert ask("POST", url, {"time": "2026-01-31T12:00:00Z"}).body == {"time": now}


def test_a_secondary_that_is_too_far_behind_is_chosen_after_one_with_newer_data(
    stage: Stage, coordinator: Coordinator
) -> None:
    one = start(stage, "host-a", coordinator)
    epoch = one.until_role("Primary")["epoch"]
    gate = "--max-behind=10"
    behind = start(stage, "host-b", coordinator, flags=[gate, "--failover-score=100"])
    fresh = start(stage, "host-c", coordinator, flags=[gate, "--failover-score=60"])
    now = datetime.now(UTC)
    for agent, age_s in ((one, 0), (behind, 100), (fresh, 5)):
        agent.until_said("joined")
        until(lambda a=agent: a.state.get("probe"), "the state file to name the probe")  # type: ignore[misc]
        time = format_date_time(now - timedelta(seconds=age_s))
        assert ask("POST", f"{agent.state['probe']}/data-processed", {"time": time}).status == 200

    def scores() -> dict[str, float]:
        answer = coordinator.ask("GET", f"groups/{stage.group}/clientsessions")
        return {s["Id"]: s["Heartbeat"]["FailoverScore"] for s in answer.body if "Heartbeat" in s}

    right = {"host-a": 100, "host-b": 1, "host-c": 60}
    until(lambda: scores() == right, "the coordinator to hear that host-b is behind")
    assert one.end() == 0
    assert stage.until_primary(behind, fresh, after_epoch=epoch) is fresh


@pytest.mark.parametrize("text", ["tomorrow", "2999-01-01T00:00:00Z"])
def test_an_invalid_progress_report_is_logged_once_and_costs_no_role(
    stage: Stage, coordinator: Coordinator, text: str
) -> None:
    path = stage.directory / "progress"
    path.write_text(text)
    source = {"type": "file", "path": str(path), "interval": 0.05}
    agent = start(stage, "host-a", coordinator, flags=[f"--progress={json.dumps(source)}"])
    agent.until_role("Primary")
    agent.until_said("data-processed time refused")
    path.write_text("2026-01-31T12:00:00Z")
    until(lambda: agent.state["last_data_processed_time"] == "2026-01-31T12:00:00Z", "the time")
    assert len(agent.lines("data-processed time refused")) == 1


@pytest.mark.parametrize("how", ["link", "hard link"])
def test_a_progress_file_that_leads_to_a_secret_shows_nothing_of_it(
    stage: Stage, coordinator: Coordinator, how: str
) -> None:
    """The directory is the workload's, and the agent may be root."""
    secret, path = stage.directory / "password", stage.directory / "progress"
    secret.touch(0o600)
    secret.write_text("correct horse battery staple\n")
    path.symlink_to(secret) if how == "link" else path.hardlink_to(secret)
    source = {"type": "file", "path": str(path), "interval": 0.05}
    flags = [f"--progress={json.dumps(source)}", "--log-level=DEBUG"]
    agent = start(stage, "host-a", coordinator, flags=flags)
    agent.until_role("Primary")
    agent.until_said("data-processed time refused")
    pages = [agent.said(), json.dumps(agent.state)]
    pages.append(str(ask("GET", f"{agent.state['probe']}/status").body))
    assert "battery" not in "".join(pages)
