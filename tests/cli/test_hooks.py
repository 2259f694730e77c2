"""hooks list and hooks test: which hooks can run, and what would follow from the result of a trial."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.drivers.hooks.spec import EVENTS
from agent.errors import ExitCode

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hook(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "hook"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return write


def test_list_has_every_event_with_its_form_steps_and_what_is_ignored(
    cli: Cli, tmp_path: Path
) -> None:
    directory = tmp_path / "d"
    directory.mkdir(0o755)
    for name in ("b", "a", "c.txt"):
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(0o755)
    code, out, err = cli(
        "hooks",
        "list",
        "--json",
        f"--hook-primary={directory}",
        "--hook-lost=http://127.0.0.1:1/lost",
        "--hook-secondary=/bin/true now",
    )
    told = {entry["event"]: entry for entry in json.loads(out)}
    assert (code, err, list(told)) == (0, "", list(EVENTS))
    assert told["primary"]["form"] == "directory"
    assert told["primary"]["steps"] == [[str(directory / "a")], [str(directory / "b")]]
    assert [ignored["name"] for ignored in told["primary"]["ignored"]] == ["c.txt"]
    assert (told["lost"]["form"], told["secondary"]["form"]) == ("webhook", "command")
    assert told["secondary"]["steps"] == [["/bin/true", "now"]]
    assert told["joined"]["form"] is None


def test_list_prints_each_fault_and_exits_with_the_code_of_the_first(cli: Cli) -> None:
    code, out, _ = cli("hooks", "list", "--hook-primary=/no/such", "--hook-secondary=/etc/passwd")
    assert code == ExitCode.HOOK_MISSING
    assert "primary: command, cannot run" in out
    assert "chmod a+x /etc/passwd" in out
    assert "joined: none" in out


def test_a_trial_passes_the_given_facts_and_shows_the_output(
    cli: Cli, hook: Callable[[str], str]
) -> None:
    code, out, _ = cli(
        "hooks",
        "test",
        "primary",
        "--epoch=7",
        "--last-data-processed-time=2026-01-31T12:00:00Z",
        "--previous-primary=host-b",
        "--old-role=Secondary",
        "--deadline=9",
        "--group=g",
        "--hook-environment=UNIT=x",
        "--hook-primary",
        hook(
            'echo "$UNIT $FAILOVER_EVENT $FAILOVER_GROUP $FAILOVER_EPOCH $FAILOVER_OLD_ROLE'
            " $FAILOVER_NEW_ROLE $FAILOVER_LAST_DATA_PROCESSED_TIME $FAILOVER_PREVIOUS_PRIMARY"
            ' $FAILOVER_DEADLINE_MS"\necho bad >&2'
        ),
    )
    assert code == 0
    shown = re.search(
        r"stdout \| x primary g 7 Secondary Primary 2026-01-31T12:00:00Z host-b (\d+)\n", out
    )
    assert shown is not None
    assert 8000 < int(shown[1]) <= 9000
    assert "stderr | bad" in out
    assert "exit 0 after" in out
    assert "would report that it is Primary" in out


@pytest.mark.parametrize(
    ("event", "says"),
    [
        ("primary", "wait 5 s"),
        ("pending_primary", "wait 5 s"),
        ("secondary", "try again"),
        ("lost", "logged and counted"),
    ],
)
def test_a_failure_is_printed_with_its_consequence(
    cli: Cli, hook: Callable[[str], str], event: str, says: str
) -> None:
    flag = f"--hook-{event.replace('_', '-')}"
    code, out, _ = cli("hooks", "test", event, flag, hook("exit 3"))
    assert code == ExitCode.HOOK_FAILED
    assert "exit 3 after" in out
    assert says in out


def test_a_trial_is_ended_at_its_deadline(cli: Cli, hook: Callable[[str], str]) -> None:
    before = time.monotonic()
    code, out, _ = cli(
        "hooks",
        "test",
        "secondary",
        "--deadline=0.1",
        "--failover-timeout=1",
        "--hook-secondary",
        hook("trap '' TERM; while :; do sleep 0.01; done"),
    )
    assert time.monotonic() - before < 30
    assert code == ExitCode.HOOK_FAILED
    assert "TERM" in out
    assert "killed by signal 9" in out


def test_a_hook_that_is_missing_or_cannot_run_is_not_tried(cli: Cli) -> None:
    code, _, err = cli("hooks", "test", "left")
    assert (code, "--hook-left" in err) == (ExitCode.CONFIG_VALUE, True)
    code, _, _ = cli("hooks", "test", "left", "--hook-left=/etc/passwd")
    assert code == ExitCode.HOOK_NOT_EXECUTABLE


def test_list_and_check_config_find_a_hook_that_cannot_be_executed(
    cli: Cli, hook: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 24: nothing but its run showed it."""
    path = Path(hook("exit 0"))
    path.write_bytes(b"#!/bin/sh\r\nexit 0\r\n")
    for command in (["hooks", "list"], ["check-config"]):
        monkeypatch.setenv("FAILOVER_AGENT_GROUP", "g")
        monkeypatch.setenv("FAILOVER_AGENT_HOOK_PRIMARY", str(path))
        code, out, err = cli(*command)
        assert code == ExitCode.HOOK_NOT_EXECUTABLE
        assert "carriage return" in out + err
