"""Which processes of earlier agents a start looks for, by what the state file has of them."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import proctree
from agent.daemon.leftover_workload import hint_of_state_files
from agent.daemon.previous_state import (
    boot_id,
    previous_processes,
    previous_tenure,
    read_previous,
)
from agent.drivers.hooks.check import RunAs
from agent.drivers.hooks.process import HookContext
from agent.drivers.hooks.spec import HookSpec, shown
from agent.drivers.statefile import StateFile
from agent.errors import ConfigError, ExitCode


def state(**given: Any) -> dict[str, Any]:
    stop: dict[str, Any] = {"stop_command": [], "stop_scripts": []}
    return {"boot": boot_id(), "store": "s", "instance": "b", **stop, **given}


def stopped_by(hook: HookSpec) -> dict[str, Any]:
    return {"stop_command": list(shown(hook.value)), "stop_context": hook.context.digest}


@pytest.mark.parametrize(
    ("scripts", "released"),
    [([], True), (["/bin/true"], True), (["/no/such"], False), (["/bin"], False), (7, False)],
)
def test_a_tenure_is_not_released_if_a_script_of_its_demotion_is_gone(
    scripts: Any,
    *,
    released: bool,
) -> None:
    """The first demotion runs those that are there, and the one that stops the workload was removed."""
    given = state(unreleased={"epoch": 3, "instance": "a"}, stop_scripts=scripts)
    assert (previous_tenure(given, None) is not None) is released


def test_a_tenure_is_not_released_if_the_scripts_of_its_demotion_are_not_known(
    tmp_path: Path,
) -> None:
    hook = HookSpec("secondary", (str(tmp_path),))
    given = state(unreleased={"epoch": 3, "instance": "a"}, **stopped_by(hook))
    assert previous_tenure(given, hook) is None


@pytest.mark.parametrize(
    ("context", "released"),
    [
        (HookContext("/srv", RunAs(1, 1, (1,)), {"UNIT": "a"}), True),
        (HookContext("/srv", RunAs(1, 1, (1,)), {"UNIT": "b"}), False),
        (HookContext("/srv", RunAs(2, 1, (1,)), {"UNIT": "a"}), False),
        (HookContext("/", RunAs(1, 1, (1,)), {"UNIT": "a"}), False),
    ],
)
def test_a_tenure_is_not_released_if_its_demotion_hook_runs_otherwise_now(
    context: HookContext, *, released: bool
) -> None:
    """The same script stopped the unit of the new settings, and the old one went on beside the next primary's."""
    before = HookContext("/srv", RunAs(1, 1, (1,)), {"UNIT": "a"})
    hook = HookSpec("secondary", ("/bin/true",), context=before)
    given = state(unreleased={"epoch": 3, "instance": "a"}, **stopped_by(hook))
    assert (previous_tenure(given, replace(hook, context=context)) is not None) is released


def test_a_tenure_is_not_released_if_its_webhook_has_another_query() -> None:
    """The file has no query, which may be a secret; but another one may stop another workload."""
    hook = HookSpec("secondary", ("http://127.0.0.1/stop?unit=a",))
    given = state(unreleased={"epoch": 3, "instance": "a"}, **stopped_by(hook))
    assert "unit" not in str(given)
    assert previous_tenure(given, hook) is not None
    other = replace(hook, value=("http://127.0.0.1/stop?unit=b",))
    assert previous_tenure(given, other) is None


def test_only_marks_of_members_are_taken_from_the_file() -> None:
    mark = "0123456789abcdef"
    assert previous_processes(state(marks=[mark, "../x", 7, mark + "0"])) == ((mark,), ())
    assert previous_processes(state(marks=mark)) == ((), ())


@pytest.mark.parametrize("wrong", [[1], "a", 7, True, {"instance": 7}, {"instance": "../../x"}])
def test_a_state_of_another_form_is_ignored(wrong: Any) -> None:
    assert previous_tenure(state(unreleased=wrong), None) is None


@pytest.mark.parametrize("wrong", ["", "../..", "a/b", "a\0", "\ud800", "x" * 65, None, [], {}])
def test_an_instance_of_another_form_is_ignored(wrong: Any) -> None:
    assert previous_tenure(state(unreleased={"epoch": 3, "instance": wrong}), None) is None


def test_the_state_of_an_agent_that_still_runs_is_no_previous_state(tmp_path: Path) -> None:
    """Its lock file was removed, and a second agent released the tenure of the live one."""
    file = StateFile(tmp_path / "state.json")
    file.acquire()
    assert read_previous(file) == {}
    with subprocess.Popen(["sleep", "1000"]) as agent:
        process = proctree.identify(agent.pid)
        assert process is not None
        pid, start = process
        file.write(state(pid=pid, pid_start=start))
        with pytest.raises(ConfigError, match=f"pid {pid}:") as caught:
            read_previous(file)
        assert caught.value.exit_code == ExitCode.SESSION_IN_USE
        for more in ({"pid_start": start - 1}, {"boot": "other"}, {"pid": "1"}):
            file.write(state(**{"pid": pid, "pid_start": start} | more))
            assert read_previous(file)["instance"] == "b"
        file.write(state(pid=pid, pid_start=start))
        agent.kill()
    assert read_previous(file)["instance"] == "b"
    file.close()


def test_a_start_that_fails_names_the_workloads_of_dead_members_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command in that line stops a workload, so it must not be that of a live primary."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    file = StateFile(tmp_path / "state.json")
    file.acquire()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as agent:  # ends with the block
        process = proctree.identify(agent.pid)
        assert process is not None
        pid, start = process
        file.write(
            state(role="Primary", pid=pid, pid_start=start) | {"stop_command": ["/bin/stop", "a b"]}
        )
        assert hint_of_state_files("") is None
        assert hint_of_state_files(str(file.path)) is None
    assert (hint_of_state_files("") or "").endswith("to stop it, run: /bin/stop 'a b'")
    file.close()
