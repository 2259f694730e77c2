"""The payloads of an agent's hooks, and the demotion hook that its guard gets."""

from pathlib import Path

import pytest

from agent.core.effects import HookFacts
from agent.daemon.payload import Payloads
from agent.drivers.guardian.messages import GuardHook
from agent.drivers.hooks.spec import load_specs
from agent.model import Role
from agent.ops.clock import Clock
from agent.schema.settings import AgentSettings

PROMOTION = HookFacts(Role.PRIMARY, Role.SECONDARY, 7, "test", None, None, 5)


def guard_hook(tmp_path: Path, settings: AgentSettings) -> GuardHook:
    payloads = Payloads("g", "s", tmp_path / "state.json", Clock())
    spec = load_specs(settings).get("secondary")
    return payloads.build_guard_hook(spec, PROMOTION)


def test_the_guard_gets_every_script_of_the_demotion_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_text("#!/bin/sh\n")
    monkeypatch.setenv("TZ", "UTC")
    settings = AgentSettings(hook_secondary=(str(tmp_path),), hook_environment={"UNIT": "x"})
    hook = guard_hook(tmp_path, settings)
    assert hook.commands == [(str(tmp_path / "a"),), (str(tmp_path / "b"),)]
    assert (hook.complete, hook.user, hook.group, hook.directory) == (True, None, None, "/")
    assert (hook.environment["UNIT"], hook.environment["TZ"]) == ("x", "UTC")
    assert (hook.environment["FAILOVER_EPOCH"], hook.environment["FAILOVER_EVENT"]) == (
        "7",
        "secondary",
    )


def test_the_guard_cannot_call_a_webhook_and_does_not_release_the_role_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The line that says so had a token in the query."""
    hook = guard_hook(tmp_path, AgentSettings(hook_secondary=("http://h/x?token=abc",)))
    assert (hook.commands, hook.complete) == ([], False)
    (record,) = caplog.records
    assert "http://h/x" in str(vars(record))
    assert "abc" not in str(vars(record))


def test_the_guard_does_not_release_the_role_if_the_demotion_hook_cannot_be_read(
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    hook = guard_hook(tmp_path, AgentSettings(hook_secondary=(str(tmp_path / "empty"),)))
    assert (hook.commands, hook.complete) == ([], False)


def test_without_a_demotion_hook_the_guard_has_nothing_to_run(tmp_path: Path) -> None:
    hook = guard_hook(tmp_path, AgentSettings())
    assert (hook.commands, hook.complete) == ([], True)
