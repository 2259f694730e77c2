"""The outermost layer: every error is one line and one exit code, whatever raised it."""

import errno
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

import agent
import agent.cli.status
from agent.cli.command_line import COMMANDS
from agent.cli.main import AGENTS, main
from agent.errors import ExitCode, ServerError
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.fields import Settings, settings_of
from agent.schema.settings import AgentSettings

Cli = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
TWO_ENDPOINTS = ("--endpoint=http://a/clientfailover", "--endpoint=http://b/clientfailover")


def process(*words: str, before: str = 'exec "$@"', **variables: str) -> tuple[int, str, str]:
    """The real command line, in a process of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FAILOVER_")}
    done = subprocess.run(
        ["sh", "-c", before, "sh", sys.executable, "-m", "agent", *words],
        cwd=ROOT,
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def one_line(err: str) -> str:
    """The only line of stderr, without its prefix."""
    assert err.count("\n") == 1, err
    assert err.startswith("failover-agent: error: ")
    return err.removeprefix("failover-agent: error: ").rstrip("\n")


def raising(error: BaseException) -> Callable[..., Any]:
    def ask(*_: Any) -> Any:
        raise error

    return ask


# --- commands


def test_the_version_is_printed_without_unneeded_imports() -> None:
    code = (
        "import sys; from agent.cli.main import main; assert main(['--version']) == 0;"
        "print(*{'pydantic', 'rich', 'httpx2', 'asyncio', 'agent.schema'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"failover-agent, version {agent.__version__}\n\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_is_there_and_explains_itself(cli: Cli, name: str) -> None:
    code, out, err = cli(name, "--help")
    assert (code, err) == (0, "")
    assert f"failover-agent {name} " in out
    assert COMMANDS[name].split()[0] in cli("--help")[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_in_a_list_of_commands_is_cut(cli: Cli, name: str) -> None:
    _, text, _ = cli(name, "--help")
    listed = text.partition("\nCommands:\n")[2]
    assert "..." not in listed


def test_every_module_with_a_command_is_listed() -> None:
    modules = (path.stem for path in (ROOT / "agent/cli").glob("*.py"))
    found = (importlib.import_module(f"agent.cli.{module}") for module in modules)
    names = {
        m.command.name for m in found if isinstance(getattr(m, "command", None), click.Command)
    }
    assert names == set(COMMANDS) - set(AGENTS)


@pytest.mark.parametrize(
    ("program", "model"), [("run", AgentSettings), ("serve", CoordinatorSettings)]
)
def test_every_setting_has_a_flag(cli: Cli, program: str, model: type[Settings]) -> None:
    words = cli(program, "--help")[1].replace("/", " ").split()
    assert {s.flag for s in settings_of(model)} | {"--config"} <= set(words)


@pytest.mark.parametrize(
    ("words", "module", "right"),
    [
        (
            ("run", "--group", "g", "--endpoint", "http://a/clientfailover"),
            "agent.daemon.main",
            {"group": "g", "endpoint": ("http://a/clientfailover",)},
        ),
        (
            ("run", "--group", "g", *TWO_ENDPOINTS, "--failover-timeout", "00:00:02"),
            "agent.daemon.main",
            {
                "endpoint": ("http://a/clientfailover", "http://b/clientfailover"),
                "failover_timeout": 2.0,
            },
        ),
        (
            ("serve", "--listen", "0.0.0.0:1", "--insecure", "--max-groups", "5"),
            "agent.coordinator.server",
            {"insecure": True, "max_groups": 5},
        ),
        (
            ("exec", "--group", "demo", "--", "sleep", "5"),
            "agent.daemon.main",
            {"workload": ("sleep", "5")},
        ),
        (("serve", "--no-insecure"), "agent.coordinator.server", {"insecure": False}),
        (("serve", "--restored"), "agent.coordinator.server", {"insecure": False}),
    ],
)
def test_run_exec_and_serve_hand_over_their_settings_and_pass_the_code_on(
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    module: str,
    right: dict[str, Any],
) -> None:
    taken: list[object] = []
    fake: Any = ModuleType(module)

    def take(settings: object, _reread: object = None, *, restored: bool = False) -> int:
        taken.extend([settings, restored])
        return 40

    fake.run = take
    monkeypatch.setitem(sys.modules, module, fake)
    assert cli(*words) == (40, "", "")
    assert taken[1] is ("--restored" in words)
    assert {key: getattr(taken[0], key) for key in right} == right


# --- errors, in real processes


def test_a_missing_file_ends_run_with_one_line(tmp_path: Path) -> None:
    code, out, err = process("run", "--config", str(tmp_path / "none.toml"))
    assert (code, out) == (ExitCode.CONFIG_FILE, "")
    assert "no such file" in one_line(err)


def test_a_misspelt_variable_ends_serve_with_one_line() -> None:
    code, out, err = process("serve", FAILOVER_COORDINATOR_LISTENS="127.0.0.1:0")
    assert (code, out) == (ExitCode.CONFIG_UNKNOWN_KEY, "")
    assert "did you mean FAILOVER_COORDINATOR_LISTEN?" in one_line(err)


def test_timings_that_break_r1_end_run_with_one_line() -> None:
    code, out, err = process("run", "--group", "g", "--failover-timeout", "1", "--demote", "1")
    assert (code, out) == (ExitCode.TIMING, "")
    assert "R1" in one_line(err)
    assert "failover_timeout: --failover-timeout, demote: --demote" in one_line(err)


def test_a_coordinator_that_is_not_there_ends_status_with_one_line() -> None:
    code, out, err = process("status", "g", "--endpoint", "http://127.0.0.1:1/clientfailover")
    assert (code, out) == (ExitCode.UNREACHABLE, "")
    assert "http://127.0.0.1:1/clientfailover" in one_line(err)


@pytest.mark.parametrize("words", ["--help", "check-config --coordinator", "groups list ENDPOINT"])
def test_output_that_cannot_be_written_is_an_error_of_the_user(words: str, endpoint: str) -> None:
    words = words.replace("ENDPOINT", f"--endpoint={endpoint}")
    code, _, err = process(*words.split(), before='exec "$@" >/dev/full')
    assert (code, "please report it" in err) == (ExitCode.USAGE, False)
    assert one_line(err) == "the output cannot be written: No space left on device"


@pytest.mark.parametrize(
    ("command", "run"),
    [
        ("run", "agent.cli.settings_process.run_agent"),
        ("exec", "agent.cli.settings_process.run_agent"),
        ("serve", "agent.coordinator.server.run"),
    ],
)
def test_a_service_that_the_kernel_refuses_something_is_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, run: str
) -> None:
    """epoll(7) has no room for a user with too many watches, for example; its units exclude a USAGE."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run, refuse)
    assert main([command]) == ExitCode.INTERNAL
    assert "No space left on device: this is a fault" in one_line(capsys.readouterr().err)


def test_a_command_works_without_a_standard_output(endpoint: str) -> None:
    code, _, err = process("groups", "list", f"--endpoint={endpoint}", before='exec "$@" >&-')
    assert (code, err) == (ExitCode.OK, "")


# --- errors, in this process


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("runn",), "runn"),
        (("run", "--grop", "g"), "--group"),
        (("status",), "GROUP"),
        (("status", "a/b"), "without '/'"),
        (("groups", "create", ".."), "not '.' or '..'"),
        (("run", "--config"), "--config"),
    ],
)
def test_a_wrong_command_line_is_one_line(cli: Cli, words: tuple[str, ...], why: str) -> None:
    code, out, err = cli(*words)
    assert (code, out) == (ExitCode.USAGE, "")
    assert why in one_line(err)
    assert "--help'" in one_line(err)


@pytest.mark.parametrize("words", ["run", "serve", "store copy", "hooks test primary"])
def test_a_flag_without_its_value_is_explained_by_the_help_of_its_command(
    cli: Cli, words: str
) -> None:
    flag = "--from" if words == "store copy" else "--config"
    code, _, err = cli(*words.split(), flag)
    assert (code, one_line(err)) == (
        2,
        f"Option '{flag}' requires an argument; see 'failover-agent {words} --help'",
    )


def test_without_a_command_the_help_is_shown(cli: Cli) -> None:
    code, out, err = cli()
    assert code == ExitCode.USAGE
    assert "explain-timing" in out + err


def test_run_without_a_group_fails_with_how_to_name_one(cli: Cli) -> None:
    code, _, err = cli("run")
    assert code == ExitCode.CONFIG_VALUE
    assert "--group, FAILOVER_AGENT_GROUP" in one_line(err)


@pytest.mark.parametrize(
    ("make", "right"),
    [
        (None, ExitCode.HOOK_MISSING),
        (0o644, ExitCode.HOOK_NOT_EXECUTABLE),
        (0o757, ExitCode.HOOK_WRITABLE),
    ],
)
def test_a_hook_that_cannot_be_run_is_named_with_its_flag(
    cli: Cli, tmp_path: Path, make: int | None, right: ExitCode
) -> None:
    hook = tmp_path / "hook"
    if make is not None:
        hook.write_text("#!/bin/sh\n")
        hook.chmod(make)
    code, _, err = cli("run", "--group", "g", "--hook-secondary", str(hook))
    assert code == right
    assert str(hook) in one_line(err)
    assert "(hook_secondary: --hook-secondary)" in one_line(err)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("explain-timing --webhook-ca-file=CLOSED/ca", ExitCode.CONFIG_VALUE),
        ("hooks test primary --hook-primary=CLOSED/hook", ExitCode.HOOK_MISSING),
        ("status g --ca-file=CLOSED/ca", ExitCode.CONFIG_VALUE),
        ("status g --username=u --password-file=CLOSED/pw", ExitCode.CONFIG_VALUE),
        ("serve --users-file=CLOSED/users", ExitCode.CONFIG_VALUE),
        ("store trust CLOSED", ExitCode.DATA_DIR_DAMAGED),
        ("store backup --data-dir=CLOSED --to=CLOSED/b", ExitCode.DATA_DIR_DAMAGED),
        ("store trust " + "a" * 256, ExitCode.DATA_DIR_DAMAGED),
    ],
)
def test_a_file_in_a_directory_that_cannot_be_entered_is_an_error_of_its_setting(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, code: ExitCode
) -> None:
    closed, stat = str(tmp_path), os.stat

    def refuse(
        path: Any, **options: Any
    ) -> os.stat_result:  # root itself can enter every directory
        if str(path).startswith(closed):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    found, out, err = cli(*words.replace("CLOSED", closed).split())
    assert (found, out) == (code, "")
    assert "please report it" not in one_line(err)


def test_several_faults_are_a_line_each_and_the_first_gives_the_code(cli: Cli) -> None:
    code, _, err = cli("run", "--failover-timeout", "1", "--demote", "2", "--hook-primary", "/no")
    assert code == ExitCode.CONFIG_VALUE
    assert [line.split()[2] for line in err.splitlines()] == ["group", "timings", "hook"]


def test_an_expected_error_is_one_line_with_its_exit_code(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ServerError("it said no", exit_code=ExitCode.REFUSED)
    monkeypatch.setattr(agent.cli.status, "query", raising(error))
    code, _, err = cli("status", "g")
    assert (code, one_line(err)) == (ExitCode.REFUSED, "it said no")


def test_an_unexpected_error_is_one_line_that_asks_to_report_it(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.cli.status, "query", raising(ZeroDivisionError("a\nb")))
    code, _, err = cli("status", "g")
    assert code == ExitCode.INTERNAL
    assert one_line(err).startswith("ZeroDivisionError: a b: ")
    assert "report" in err


def test_only_debug_shows_the_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.cli.status, "query", raising(ZeroDivisionError()))
    code, _, err = cli("--debug", "status", "g")
    assert code == ExitCode.INTERNAL
    assert "Traceback (most recent call last)" in err


def test_an_interrupt_exits_with_130_and_prints_nothing(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.cli.status, "query", raising(KeyboardInterrupt()))
    code, _, err = cli("status", "g")
    assert code == 130
    assert not err.strip()
