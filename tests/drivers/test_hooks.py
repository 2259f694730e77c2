"""One step of a hook: real scripts, what they get, their groups, their output."""

import asyncio
import json
import logging
import os
import pwd
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.drivers.hooks import process as process_module
from agent.drivers.hooks.check import HookCheck
from agent.drivers.hooks.process import HookContext, HookExit, HookProcess
from agent.errors import ConfigError, ExitCode
from agent.ops.clock import Clock
from tests.this_process import open_files

LIMIT_S = 60
"""For what takes milliseconds, on a busy machine."""

Script = Callable[[str], Path]
EMPTY: Mapping[str, Any] = {}


@pytest.fixture
def script(tmp_path: Path) -> Script:
    def write(text: str) -> Path:
        path = tmp_path / f"hook{len(list(tmp_path.iterdir()))}"
        path.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return write


def python(text: str) -> str:
    return f"#!{sys.executable} -S\n{text}"


def start(
    *argv: object, env: Mapping[str, str] = EMPTY, facts: Mapping[str, Any] = EMPTY
) -> HookProcess:
    process = HookProcess("primary", Clock(), env.get("FAILOVER_EPOCH", ""), HookContext())
    process.start([str(arg) for arg in argv], env, facts)
    return process


async def launched(process: HookProcess) -> None:
    assert process.child is not None
    await process.child.launched()


async def end_of(process: HookProcess) -> HookExit:
    async with asyncio.timeout(LIMIT_S):
        return await process.wait()


async def run(
    *argv: object, env: Mapping[str, str] = EMPTY, facts: Mapping[str, Any] = EMPTY
) -> HookExit:
    process = start(*argv, env=env, facts=facts)
    try:
        return await end_of(process)
    finally:
        process.release()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(0.002)


def output(caplog: pytest.LogCaptureFixture, stream: str = "stdout") -> list[str]:
    events = [record.__dict__["fields"] for record in caplog.records]
    return [fields["line"] for fields in events if fields.get("stream") == stream]


def is_alive(pid: int) -> bool:
    """Whether ``pid`` runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_taken(process: HookProcess) -> bool:
    """Whether the process's number is in use, by a zombie at least."""
    return Path(f"/proc/{process.pid}").exists()


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


# --- how it ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 3])
async def test_the_exit_code_is_reported(script: Script, code: int) -> None:
    result = await run(script(f"exit {code}"))
    assert (result.code, result.signal, result.error, result.output_cut) == (code, None, None, 0)
    assert 0 < result.duration_s < LIMIT_S


async def test_term_ends_a_hook(script: Script) -> None:
    process = start(script("exec sleep 1000"))
    await launched(process)
    process.term()
    assert (await end_of(process)).signal == signal.SIGTERM
    process.release()


async def test_a_hook_that_ignores_term_is_killed(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    process = start(script("trap '' TERM; echo ready; while :; do sleep 0.01; done"))
    await until(lambda: output(caplog))
    process.term()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process.wait(), 0.1)
    process.kill()
    result = await end_of(process)
    assert (result.code, result.signal) == (None, signal.SIGKILL)
    process.release()


async def test_a_cancelled_wait_does_not_stop_the_hook(script: Script) -> None:
    process = start(script("exec sleep 1000"))
    await launched(process)
    waiting = asyncio.create_task(process.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not process.ended
    process.kill()
    assert (await end_of(process)).signal == signal.SIGKILL
    process.release()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.with_name("missing"), "No such file"),
        (
            lambda path: path.write_text("#!/no/such/interpreter\n") and path,
            "interpreter of its first line",
        ),
        (lambda path: path.write_text("echo no interpreter\n") and path, "#!/bin/sh"),
        (lambda path: path.chmod(0o644) or path, "Permission denied"),
        (lambda path: path.parent, "Permission denied"),
    ],
)
async def test_a_hook_that_cannot_be_started_fails_with_the_reason(
    script: Script, make: Callable[[Path], Path], reason: str
) -> None:
    process = start(make(script("exit 0")))
    result = await end_of(process)
    assert (result.code, result.signal, process.pid) == (None, None, None)
    assert reason in str(result.error)
    process.term()
    process.kill()
    process.release()


async def test_a_variable_with_an_impossible_value_is_a_failure(script: Script) -> None:
    result = await run(script("exit 0"), env={"FAILOVER_REASON": "a\0b"})
    assert "null byte" in str(result.error)


async def test_a_hook_whose_output_cannot_be_read_has_failed(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that waits for it failed, and its end was waited for until its budget was used up."""

    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(process_module._Output, "read_rest", fail)
    result = await run(script("exit 0"))
    assert not result.ok
    assert "MemoryError" in result.why


async def test_a_hook_that_other_code_has_reaped_is_no_success(script: Script) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = start(script("exit 0"))
        result = await end_of(process)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert result.code is None
    assert "SIGCHLD" in str(result.error)
    process.kill()


# --- its group --------------------------------------------------------------------------------


async def test_a_hook_leads_its_own_session_and_group(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    process = start(script("read -r stat < /proc/self/stat; echo $stat; pwd"))
    await end_of(process)
    stat, cwd = output(caplog)
    group, session = stat.rpartition(")")[2].split()[2:4]
    assert int(group) == int(session) == process.pid
    assert cwd == "/"
    process.release()


async def test_the_whole_group_is_signalled(script: Script, tmp_path: Path) -> None:
    process = start(script(f"sleep 1000 & echo $! > {tmp_path}/child; wait"))
    await until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    child = int((tmp_path / "child").read_text())
    process.kill()
    await end_of(process)
    await until(lambda: not is_alive(child))
    process.release()


async def test_a_daemon_that_a_hook_left_behind_delays_nothing_and_can_be_killed(
    script: Script, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = start(script(f"echo before; sleep 1000 & echo $! > {tmp_path}/child; exit 0"))
    assert (await end_of(process)).code == 0
    assert output(caplog) == ["before"]
    child = int((tmp_path / "child").read_text())
    assert is_alive(child)
    await until(lambda: "hook left a process behind" in caplog.text)
    process.kill()
    await until(lambda: not is_alive(child))
    process.release()


async def test_the_process_id_of_an_ended_hook_is_not_reused_before_release(
    script: Script,
) -> None:
    process = start(script("exit 0"))
    await end_of(process)
    assert is_taken(process)
    process.term()
    process.kill()
    process.release()
    assert not is_taken(process)
    process.release()


async def test_a_released_hook_is_never_signalled(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(script("exit 0"))
    await end_of(process)
    process.release()
    sent: list[object] = []
    monkeypatch.setattr(os, "killpg", lambda *args: sent.append(args))
    process.term()
    process.kill()
    assert sent == []


def open_pipes() -> set[int]:
    return {number for number, name in open_files().items() if name.startswith("pipe:")}


async def test_release_closes_pipes_that_a_child_still_holds(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "LINGER_S", LIMIT_S)
    before = open_pipes()
    process = start(script(f"sleep 1000 & echo $! > {tmp_path}/child"))
    await end_of(process)
    pipes = open_pipes() - before
    assert len(pipes) == 2
    process.release()
    assert open_pipes() == before
    loop = asyncio.get_running_loop()
    assert not any(loop.remove_reader(pipe) for pipe in pipes), "the loop still waits for it"
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


# --- what it gets -----------------------------------------------------------------------------


async def test_the_environment_is_the_documented_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("PATH", "HOME", "LANG", "TZ"):
        monkeypatch.setenv(name, f"/our {name}")
    monkeypatch.setenv("SECRET", "not for hooks")
    await run("/usr/bin/env", env={"FAILOVER_EPOCH": "7", "TZ": "UTC"})
    assert sorted(output(caplog)) == [
        "FAILOVER_EPOCH=7",
        "FAILOVER_TENURE=apart",
        "HOME=/our HOME",
        "LANG=/our LANG",
        "PATH=/our PATH",
        "TZ=UTC",
    ]


async def test_an_inherited_variable_that_is_unset_stays_unset(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("PATH", "HOME", "LANG", "TZ"):
        monkeypatch.delenv(name, raising=False)
    await run("/usr/bin/env", env={"FAILOVER_EPOCH": "7"})
    home = pwd.getpwuid(os.geteuid()).pw_dir
    assert output(caplog) == [f"HOME={home}", "FAILOVER_TENURE=apart", "FAILOVER_EPOCH=7"]


async def test_stdin_is_the_payload_as_one_json_object(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    facts = {"event": "promote", "epoch": 7, "reason": 'said "ü"', "previous_primary": None}
    await run(script("cat"), facts=facts)
    (line,) = output(caplog)
    assert json.loads(line) == facts


async def test_a_hook_that_does_not_read_a_large_stdin_blocks_nothing(script: Script) -> None:
    assert (await run(script("exit 0"), facts={"reason": "x" * 5_000_000})).code == 0


async def test_no_other_file_is_open_in_a_hook(
    script: Script, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with (tmp_path / "secret").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        await run(script(python("import os\nprint(sorted(map(int, os.listdir('/proc/self/fd'))))")))
    assert output(caplog) == ["[0, 1, 2, 3]"]  # 3 is the listing itself


# --- its output -------------------------------------------------------------------------------


async def test_output_goes_into_the_log_line_by_line(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    path = script("echo one; echo two three; echo wrong >&2; printf 'no newline'")
    result = await run(path, env={"FAILOVER_EPOCH": "7"})
    assert output(caplog) == ["one", "two three", "no newline"]
    assert output(caplog, "stderr") == ["wrong"]
    assert caplog.records[0].__dict__["fields"] == {
        "hook": "primary",
        "epoch": 7,
        "stream": "stdout",
        "line": "one",
    }
    assert result.output_cut == 0


async def test_output_is_logged_while_the_hook_runs(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    process = start(script("echo ready; exec sleep 1000"))
    await until(lambda: output(caplog) == ["ready"])
    assert not process.ended
    process.kill()
    await end_of(process)
    process.release()


async def test_output_that_is_not_utf_8_is_replaced(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    await run(script(r"printf '\377\000\376 b\303\274\n'"))
    assert output(caplog) == ["\ufffd\0\ufffd bü"]


async def test_a_long_line_is_cut(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    result = await run(script(python("print('x' * 10_000)\nprint('next')")))
    assert output(caplog) == ["x" * 4096, "next"]
    assert result.output_cut == 10_000 - 4096


async def test_lines_beyond_the_bound_are_not_logged(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    result = await run(script(python("for n in range(3000): print(n % 10)")))
    assert len(output(caplog)) == process_module.RUN_LINES
    assert result.output_cut >= 1900


async def test_a_flood_of_output_is_drained_and_does_not_block_the_loop(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    size = 50_000_000
    process = start(script(f"head -c {size} /dev/zero | tr '\\0' 'x' | fold -w 99"))
    turns, longest_s, last = 0, 0.0, time.thread_time()
    while not process.ended:
        await asyncio.sleep(0)
        now = time.thread_time()  # what this thread itself did, however busy the machine is
        turns, longest_s, last = turns + 1, max(longest_s, now - last), now
    result = await end_of(process)
    process.release()
    logged = sum(len(line) for line in output(caplog))
    assert result.code == 0
    assert logged <= process_module.RUN_BYTES
    assert logged + result.output_cut == pytest.approx(size, rel=0.02)  # and the newlines
    assert longest_s < 0.2
    cut = [r for r in caplog.records if r.getMessage() == "hook output cut"]
    assert [r.__dict__["fields"]["cut_bytes"] for r in cut] == [result.output_cut]


# --- HookCheck --------------------------------------------------------------------------------


def refused(*argv: object) -> tuple[ExitCode, str]:
    with pytest.raises(ConfigError) as caught:
        HookCheck("secondary").check_command([str(arg) for arg in argv])
    assert "hook secondary" in str(caught.value)
    return caught.value.exit_code, str(caught.value)


def test_a_safe_executable_file_passes_the_check(script: Script) -> None:
    HookCheck("primary").check_command([str(script("exit 0")), "--any", "argument"])
    HookCheck("primary").check_command(["/bin/sh", "-c", "exit 0"])


def test_a_relative_path_is_refused() -> None:
    assert refused()[0] == ExitCode.CONFIG_VALUE
    assert refused("sh", "-c")[0] == ExitCode.CONFIG_VALUE


def test_a_missing_hook_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for name in ("missing", "dangling", "loop", "file/below", "nul\0"):
        code, message = refused(tmp_path / name)
        assert code == ExitCode.HOOK_MISSING
        assert str(tmp_path / name) in message


def test_a_hook_that_is_not_a_program_is_refused(script: Script, tmp_path: Path) -> None:
    path = script("exit 0")
    path.chmod(0o644)
    code, message = refused(path)
    assert code == ExitCode.HOOK_NOT_EXECUTABLE
    assert f"chmod a+x {path}" in message
    assert refused(tmp_path)[0] == ExitCode.HOOK_NOT_EXECUTABLE


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_a_hook_that_others_can_write_is_refused(script: Script, mode: int) -> None:
    path = script("exit 0")
    path.chmod(mode)
    code, message = refused(path)
    assert code == ExitCode.HOOK_WRITABLE
    assert f"chmod go-w {path}" in message


@pytest.mark.parametrize("link", [False, True])
def test_a_hook_in_a_directory_that_others_can_write_is_refused(
    tmp_path: Path, *, link: bool
) -> None:
    directory = tmp_path / "a" / "b"
    directory.mkdir(parents=True)
    path = directory / "hook"
    path.touch(0o755)
    path.write_text("#!/bin/sh\n")
    asked = path
    if link:
        (tmp_path / "links").symlink_to("a")
        asked = tmp_path / "links" / "b" / "hook"
    HookCheck("primary").check_command([str(asked)])
    (tmp_path / "a").chmod(0o777)
    code, message = refused(asked)
    assert code == ExitCode.HOOK_WRITABLE
    assert f"chmod go-w {tmp_path / 'a'}" in message
    (tmp_path / "a").chmod(0o1777)  # sticky: others cannot replace what is ours
    HookCheck("primary").check_command([str(asked)])


def test_the_target_of_a_link_is_checked(script: Script, tmp_path: Path) -> None:
    path = script("exit 0")
    link = tmp_path / "link"
    link.symlink_to(path.name)
    HookCheck("primary").check_command([str(link)])
    path.chmod(0o757)
    code, message = refused(link)
    assert code == ExitCode.HOOK_WRITABLE
    assert str(path) in message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_hook_of_another_user_is_refused(script: Script, tmp_path: Path) -> None:
    path = script("exit 0")
    os.chown(path, 12345, -1)
    code, message = refused(path)
    assert code == ExitCode.HOOK_WRITABLE
    assert "12345" in message
    os.chown(path, 0, -1)
    link = tmp_path / "link"
    link.symlink_to(path.name)
    os.lchown(link, 12345, -1)
    assert refused(link)[0] == ExitCode.HOOK_WRITABLE
