"""The process that reads an agent's settings: what it returns, and what its end means."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from agent import __version__
from agent.cli import settings_process
from agent.cli.settings_process import NoSettings, SettingsProcess
from agent.errors import ConfigError, ExitCode
from agent.schema import exchange
from agent.schema.read import validate
from agent.schema.settings import AgentSettings
from tests.this_process import children


def read(*words: str) -> object:
    return SettingsProcess(words, debug=False).receive()


def test_the_settings_are_what_this_process_would_have_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('group = "g"\n[[check]]\nname = "a"\ntype = "tcp"\naddress = "127.0.0.1:1"\n')
    monkeypatch.setenv("FAILOVER_AGENT_BEAT", "PT1S")
    wanted = validate(
        AgentSettings,
        {
            "group": "g",
            "beat": 1.0,
            "session_id": "host-a",
            "check": [{"name": "a", "type": "tcp", "address": "127.0.0.1:1"}],
        },
    )
    assert read("run", "--config", str(file), "--session-id", "host-a") == wanted


def test_nothing_is_imported_from_the_folder_that_it_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(77)")
    monkeypatch.chdir(tmp_path)
    assert read("run", "--group", "g") == AgentSettings(group="g")


def test_exec_hands_its_command_over_with_every_word() -> None:
    words = ("exec", "--group", "g", "--", "sleep", "--", "-x", "a b")
    wanted = AgentSettings(group="g", workload=("sleep", "--", "-x", "a b"))
    assert read(*words) == wanted


def test_what_is_wrong_is_handed_back_with_its_code(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="R1") as caught:
        read("run", "--group", "g", "--failover-timeout", "1", "--demote", "1")
    assert caught.value.exit_code is ExitCode.TIMING
    assert capfd.readouterr() == ("", "")


def test_help_is_answered_by_the_reader(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NoSettings) as caught:
        read("exec", "--help")
    assert caught.value.exit_code == 0
    assert "Usage: failover-agent exec [OPTIONS] -- COMMAND" in capfd.readouterr().out


def test_a_killed_reader_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_process, "PROGRAM", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ConfigError, match="was ended by signal 9"):
        read("run")


def test_a_reader_that_hangs_is_killed_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_process, "PROGRAM", "import time; time.sleep(1000)")
    monkeypatch.setattr(settings_process, "READ_S", 0.2)
    before = children()
    reading = SettingsProcess(("run",), debug=False)
    assert len(children() - before) == 1
    with pytest.raises(ConfigError, match=r"within 0\.2 s"):
        reading.receive()
    assert children() == before


def test_a_reader_that_hangs_ends_even_if_its_parent_was_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(settings_process, "READ_S", 1.0)
    monkeypatch.setattr(settings_process, "END_S", 0.0)
    os.mkfifo(tmp_path / "config")
    before = children()
    reading = SettingsProcess(("run", f"--config={tmp_path / 'config'}"), debug=False)
    (child,) = children() - before
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    assert ended.si_status == signal.SIGALRM
    monkeypatch.setattr(settings_process, "END_S", 1.0)
    with pytest.raises(ConfigError, match="was ended by signal 14"):
        reading.receive()


def test_a_reader_that_cannot_be_started_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(ConfigError, match="No such file"):
        read("run")
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_nothing_of_a_reading_is_left_open() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    read("run", "--group", "g")
    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize(("debug", "flags"), [(True, ["--debug"]), (False, [])])
def test_the_reader_receives_whether_tracebacks_are_wanted(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *,
    debug: bool,
    flags: list[str],
) -> None:
    monkeypatch.setattr(settings_process, "PROGRAM", "import sys; print(sys.argv[3:]); sys.exit(7)")
    with pytest.raises(NoSettings) as caught:
        SettingsProcess(("run", "-x"), debug=debug).receive()
    assert caught.value.exit_code == 7
    assert capfd.readouterr().out == f"{[*flags, 'run', '-x']}\n"


def test_a_reload_is_refused_whatever_becomes_of_the_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The agent that runs has the role, and catches ConfigErrors only."""
    rereads: list[Callable[[], AgentSettings]] = []

    def run(settings: AgentSettings, reread: Callable[[], AgentSettings]) -> int:
        assert settings.group == "g"
        rereads.append(reread)
        return 0

    fake: Any = ModuleType("agent.daemon.main")
    fake.run = run
    monkeypatch.setitem(sys.modules, "agent.daemon.main", fake)
    assert settings_process.run_agent(("run", "--group", "g"), debug=False) == 0
    (reread,) = rereads
    assert reread().group == "g"
    for program, says in {
        "import sys; sys.exit(1)": "ended with code 1",
        "1 / 0": "ended with code 1",
        "import os; os.abort()": "signal 6",
    }.items():
        monkeypatch.setattr(settings_process, "PROGRAM", program)
        with pytest.raises(ConfigError, match=says):
            reread()


def test_another_version_on_disk_is_named_and_nothing_of_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 7: settings that cross by position could swap the hooks of two versions."""
    package = tmp_path / "agent"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "9.9.9"\n')
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    match = rf"version 9\.9\.9 wrote it, {__version__} reads it.*; restart to use it"
    with pytest.raises(ConfigError, match=match):
        read("run", "--group", "g")


def test_settings_of_a_program_with_other_fields_are_refused() -> None:
    """The same version, installed from another checkout."""
    document = exchange.dump(AgentSettings(group="g"))
    for changed in (
        document.replace(b'"hook_primary"', b'"hook_swapped"'),
        document.replace(b'"group": "g"', b'"group": 1'),
        document[:-2],
        b"[]",
    ):
        with pytest.raises(ConfigError, match="restart to use it"):
            exchange.load(changed)
