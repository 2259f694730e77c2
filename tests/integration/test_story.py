"""The promises of the README: two commands start a pair, and one command shows a takeover."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.cli.main import INTERRUPTED

from .stage import PATIENCE_S, Process, Stage, environment, until

ASK = """
import json, sys, urllib.request
body = sys.argv[2].encode() if sys.argv[2:] else None
kind = {"Content-Type": "application/json"}
with urllib.request.urlopen(urllib.request.Request(sys.argv[1], body, kind), timeout=20) as answer:
    print(answer.read().decode())
"""


def private_network(stage: Stage) -> list[str]:
    """What a command is started by to be in a network of its own, where every port is free."""
    if shutil.which("ip") is None:
        pytest.skip("needs: ip: install iproute2")
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "-r"]
    holding = subprocess.Popen(
        [*unshare, "sh", "-c", "ip link set lo up && echo ready && exec sleep 100"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stage.enter(holding)
    stage.later(holding.kill)
    assert holding.stdout is not None
    if holding.stdout.readline() != "ready\n":
        how = "run as root with CAP_SYS_ADMIN, or allow user namespaces"
        pytest.skip(f"needs: a network namespace: {how}")
    enter = ["nsenter", "--target", str(holding.pid), "--net"]
    return enter if os.geteuid() == 0 else [*enter, "--user", "--preserve-credentials"]


def test_serve_and_two_runs_work_without_configuration(stage: Stage) -> None:
    inside = private_network(stage)
    run_dir, data = stage.directory / "run", stage.directory / "data"
    run_dir.mkdir(mode=0o700)
    places = {"XDG_RUNTIME_DIR": str(run_dir), "STATE_DIRECTORY": str(data)}
    hook = stage.hook("workload", "primary")

    def ask(url: str, body: object = None) -> Any:
        words = [url] if body is None else [url, json.dumps(body)]
        done = subprocess.run(
            [*inside, sys.executable, "-c", ASK, *words],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        )
        return json.loads(done.stdout)

    def start(name: str) -> Process:
        return stage.process(name, "run", "--group", "demo", before=inside, **places)

    def states() -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in run_dir.rglob("demo.*.json")]

    agents = [start("first"), start("second")]
    until(lambda: len(states()) == 2, "both state files")
    assert [(s["role"], s["reason"], s["epoch"]) for s in states()] == [
        ("Secondary", "starting", None)
    ] * 2
    assert len({s["session"] for s in states()}) == 2
    coordinator = stage.process("coordinator", "serve", before=inside, **places)
    coordinator.until_said("coordinator listening url=http://127.0.0.1:5470")
    until(lambda: [s for s in states() if s["role"] == "Primary"], "a primary")
    for agent in agents:
        agent.until_said("joined")
    assert sorted(s["role"] for s in states()) == ["Primary", "Secondary"]
    primary = next(s for s in states() if s["role"] == "Primary")
    shown = ask(f"{primary['probe']}/status")
    assert (shown["role"], shown["session"]) == ("Primary", primary["session"])
    time = {"time": "2026-01-31T12:00:00Z"}
    assert ask(f"{primary['probe']}/data-processed", time) == time
    status = "http://127.0.0.1:5470/api/v1/clientfailover/groups/demo/status"
    until(
        lambda: ask(status).get("LastDataProcessedTime") == time["time"], "the time in the status"
    )
    assert ask(status)["Primary"] == primary["session"]
    third = stage.process(
        "third", "run", "--group", "demo", f"--hook-primary={hook}", before=inside, **places
    )
    third.until_said("joined")
    for agent in agents:
        assert agent.end() == 0
    began = stage.until_event("workload", "begin", "primary")
    assert began.facts["last_data_processed_time"] == time["time"]
    environ = stage.environment_file("workload", "primary").read_text().split("\0")
    assert f"FAILOVER_LAST_DATA_PROCESSED_TIME={time['time']}" in environ
    assert third.end() == 0
    assert coordinator.end() == 0


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


def test_the_demo_runs_to_its_end_without_a_terminal(tmp_path: Path) -> None:
    """A file agent.py in the current directory is not imported in place of the package."""
    here, scratch = tmp_path / "here", tmp_path / "scratch"
    here.mkdir()
    scratch.mkdir()
    (here / "agent.py").write_text("raise SystemExit('another agent')\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "agent", "demo"],
        cwd=here,
        env=environment(TMPDIR=str(scratch)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    head = next(n for n, line in enumerate(lines) if line.split()[:1] == ["fault"])
    assert lines[head].split()[-2:] == ["gap", "overlap"]
    rows = lines[head + 1 : head + 5]
    assert [row.split()[0] for row in rows] == ["power", "crash", "stop", "frozen"]
    for row in rows:
        assert row.split()[-1] == "0"
    assert not [line for line in lines if line.count(": Primary") > 1], "a dead host is shown"
    counts = [line.split()[:2] for line in lines if line.startswith(("ok", "FAILED"))]
    assert len(counts) >= 5
    assert counts == [["ok", "0"]] * len(counts)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_ended_leaves_no_process_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-P", "-m", "agent", "demo"],
        env=environment(TMPDIR=str(tmp_path), PYTHONUNBUFFERED="1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )

    def left() -> list[int]:
        commands = Path("/proc").glob("[0-9]*/cmdline")
        return [int(path.parts[2]) for path in commands if str(tmp_path).encode() in read(path)]

    try:
        assert demo.stdout is not None
        next(line for line in demo.stdout if "is primary" in line)
        assert left()
        demo.send_signal(number)
        demo.communicate(timeout=PATIENCE_S)
        assert demo.returncode == INTERRUPTED
        until(lambda: not left(), "the end of every process")
    finally:
        demo.kill()
        for pid in left():
            os.kill(pid, signal.SIGKILL)
