"""Runs of hooks: steps in order, what follows of each, signals, retries, users, webhooks, notices."""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.drivers.hooks import notifier, runner
from agent.drivers.hooks.notifier import Notifier
from agent.drivers.hooks.process import HookContext, HookExit
from agent.drivers.hooks.runner import HookRun, HookRunner
from agent.drivers.hooks.spec import CommandStep, Form, HookSpec, load_specs
from agent.drivers.hooks.webhook import Webhook
from agent.errors import ConfigError, ExitCode
from agent.ops.clock import Clock
from agent.schema.read import validate
from agent.schema.settings import AgentSettings

LIMIT_S = 60
EMPTY: Mapping[str, Any] = {}


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture
def hooks(tmp_path: Path) -> Path:
    """A directory for scripts that write into ``tmp_path``, their working directory."""
    path = tmp_path / "hooks.d"
    path.mkdir(0o755)
    return path


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def spec(*value: object, **more: Any) -> HookSpec:
    words = tuple(map(str, value))
    cwd = str(Path(words[0]).parent) if words[0].startswith("/") else "/"
    return HookSpec("primary", words, **({"context": HookContext(cwd)} | more))


async def end_of(run: HookRun) -> HookExit:
    async with asyncio.timeout(LIMIT_S):
        return await run.wait()


def start(hook: HookSpec, facts: Mapping[str, Any] = EMPTY) -> HookRun:
    return HookRunner(Clock()).start(hook, {}, facts)


async def run(hook: HookSpec, facts: Mapping[str, Any] = EMPTY) -> HookExit:
    one = start(hook, facts)
    result = await end_of(one)
    one.release()
    return result


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(0.002)


def fields(caplog: pytest.LogCaptureFixture, message: str) -> list[Mapping[str, Any]]:
    return [r.__dict__["fields"] for r in caplog.records if r.getMessage() == message]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [event["line"] for event in fields(caplog, "hook output")]


def is_alive(pid: int) -> bool:
    """Whether ``pid`` runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- a directory ------------------------------------------------------------------------------


async def test_scripts_run_in_byte_order_and_names_as_run_parts_takes_them(
    hooks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b", "10-x", "B", "9_z", "c.sh", ".hidden", "d~"):
        script(hooks / name, f"echo {name}")
    (hooks / "sub").mkdir()
    hook = spec(hooks)
    hook.check()
    assert (hook.form, (await run(hook)).ok) == (Form.DIRECTORY, True)
    assert lines(caplog) == ["10-x", "9_z", "B", "b"]
    assert {name for name, _ in hook.ignored()} == {"c.sh", ".hidden", "d~", "sub"}


def test_a_program_with_arguments_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its disk may hang: then the step has to start all the same, so that its limit ends it."""
    seen: list[object] = []
    hook = spec("/hung/demote", "now")
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", seen.append)
        steps = hook.steps()
    assert (steps, seen) == ((CommandStep(("/hung/demote", "now")),), [])


@pytest.mark.parametrize(("all_steps", "ran"), [(False, ["a", "b"]), (True, ["a", "b", "c"])])
async def test_a_failing_script_ends_a_promotion_and_not_a_demotion(
    hooks: Path, caplog: pytest.LogCaptureFixture, *, all_steps: bool, ran: list[str]
) -> None:
    for name, code in (("a", 0), ("b", 3), ("c", 0)):
        script(hooks / name, f"echo {name}; exit {code}")
    result = await run(spec(hooks, all_steps=all_steps))
    assert (result.ok, result.code, result.why) == (False, 3, "b: exit 3")
    assert lines(caplog) == ran


async def test_a_later_script_receives_the_remaining_time(
    hooks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script(hooks / "a", "sleep 0.1")
    script(hooks / "b", "echo $FAILOVER_DEADLINE_MS; cat")
    await run(spec(hooks), {"deadline_ms": 5000})
    variable, facts = lines(caplog)
    assert int(variable) == json.loads(facts)["deadline_ms"]
    assert 0 <= int(variable) <= 4900


@pytest.mark.parametrize("all_steps", [False, True])
async def test_after_term_no_further_script_starts(
    hooks: Path, caplog: pytest.LogCaptureFixture, *, all_steps: bool
) -> None:
    script(hooks / "a", "trap 'exit 0' TERM; echo a; while :; do sleep 0.01; done")
    script(hooks / "b", "echo b")
    one = start(spec(hooks, all_steps=all_steps))
    await until(lambda: lines(caplog))
    one.term()
    result = await end_of(one)
    one.release()
    assert (result.ok, result.why) == (False, "b: stopped before it")
    assert "b" not in lines(caplog)


async def test_a_demotion_that_exits_with_0_after_term_has_succeeded(
    hooks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script(hooks / "a", "trap 'exit 0' TERM; echo a; while :; do sleep 0.01; done")
    one = start(spec(hooks / "a"))
    await until(lambda: lines(caplog))
    one.term()
    assert (await end_of(one)).ok
    one.release()


async def test_kill_reaches_processes_that_earlier_scripts_left_behind(hooks: Path) -> None:
    script(hooks / "a", "sleep 1000 >&- 2>&- & echo $! > child")
    script(hooks / "b", "exec sleep 1000")
    one = start(spec(hooks))
    await until(lambda: len(one.pgids) == 2)
    child = int((hooks.parent / "child").read_text())
    assert is_alive(child)
    assert one.pid == one.pgids[1]
    one.kill()
    assert (await end_of(one)).signal == signal.SIGKILL
    await until(lambda: not is_alive(child))
    one.release()
    assert one.pgids == ()


async def test_a_script_is_checked_again_when_it_runs(hooks: Path) -> None:
    script(hooks / "a", "exit 0")
    hook = spec(hooks)
    hook.check()
    (hooks / "a").chmod(0o777)
    result = await run(hook)
    assert not result.ok
    assert "can be written" in result.why


@pytest.mark.parametrize(
    "change",
    [
        lambda path: (path / "b").unlink(),
        lambda path: (path / "b").rename(path / "b.bak"),
        lambda path: (path.rename(path.parent / "was"), script(path, "exit 0")),
    ],
)
async def test_a_script_that_belongs_to_each_run_is_a_failure_if_it_is_gone(
    hooks: Path, change: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    script(hooks / "b", "echo b")
    hook = spec(hooks, all_steps=True).with_scripts()
    script(hooks / "a", "echo a")
    assert (await run(hook)).ok
    assert lines(caplog) == ["a", "b"]
    change(hooks)
    assert "b: " in (await run(hook)).why
    with pytest.raises(ConfigError):
        hook.with_scripts()


async def test_an_emptied_directory_is_a_failure(hooks: Path) -> None:
    script(hooks / "a", "exit 0").unlink()
    assert "it has no script" in (await run(spec(hooks))).why


@pytest.mark.parametrize(
    ("spoil", "right"),
    [
        (lambda path: (path / "a").unlink(), ExitCode.HOOK_MISSING),
        (lambda path: (path / "a").chmod(0o644), ExitCode.HOOK_NOT_EXECUTABLE),
        (lambda path: (path / "a").chmod(0o775), ExitCode.HOOK_WRITABLE),
        (lambda path: path.chmod(0o775), ExitCode.HOOK_WRITABLE),
        (lambda path: (path / "b").symlink_to("nowhere"), ExitCode.HOOK_MISSING),
        (
            lambda path: [script(path / f"s{n}", "") for n in range(64)],
            ExitCode.CONFIG_VALUE,
        ),
    ],
)
def test_a_directory_is_checked_with_each_script(
    hooks: Path, spoil: Callable[[Path], object], right: ExitCode
) -> None:
    script(hooks / "a", "exit 0")
    hook = spec(hooks)
    hook.check()
    spoil(hooks)
    with pytest.raises(ConfigError) as caught:
        hook.check()
    assert caught.value.exit_code == right


# --- retries, and what is kept ----------------------------------------------------------------


async def test_only_a_failed_step_is_retried(
    hooks: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RETRY_PAUSE_S", 0.01)
    script(hooks / "a", "echo a")
    script(hooks / "b", "echo b; [ -e again ] || { touch again; exit 1; }")
    assert (await run(spec(hooks, retries=2))).ok
    assert lines(caplog) == ["a", "b", "b"]


async def test_a_step_is_retried_as_often_as_is_set(
    hooks: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RETRY_PAUSE_S", 0.01)
    assert (await run(spec(script(hooks / "a", "echo a; exit 1"), retries=2))).code == 1
    assert lines(caplog) == ["a"] * 3


@pytest.mark.parametrize("end", [HookRun.term, HookRun.kill])
async def test_a_stopped_run_is_not_retried(
    hooks: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    end: Callable[[HookRun], None],
) -> None:
    monkeypatch.setattr(runner, "RETRY_PAUSE_S", LIMIT_S * 2)
    one = start(spec(script(hooks / "a", "echo a; exit 1"), retries=5))
    await until(lambda: one.pid is None and lines(caplog))
    end(one)
    assert (await end_of(one)).code == 1
    assert lines(caplog) == ["a"]
    one.release()


async def test_the_number_of_unreleased_runs_is_bounded(
    hooks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "KEPT_RUNS", 2)
    hook = spec(script(hooks / "a", "exit 0"))
    starter = HookRunner(Clock())
    runs = []
    for _ in range(5):
        runs.append(starter.start(hook, {}, {}))
        await end_of(runs[-1])
    assert [len(one.pgids) for one in runs] == [0, 0, 1, 1, 1]
    starter.close()
    assert not any(one.pgids for one in runs)


# --- settings ---------------------------------------------------------------------------------


def test_hooks_are_loaded_from_the_settings(hooks: Path) -> None:
    script(hooks / "a", "exit 0")
    settings = AgentSettings(
        hook_primary=(str(hooks),),
        hook_secondary=("/bin/true", "x"),
        hook_lost=("http://127.0.0.1:1/lost?a=b&c",),
        hook_retries=3,
        hook_directory=hooks,
        hook_environment={"UNIT": "x"},
    )
    specs = load_specs(settings)
    assert {name: one.form for name, one in specs.items()} == {
        "primary": Form.DIRECTORY,
        "secondary": Form.COMMAND,
        "lost": Form.WEBHOOK,
    }
    assert [(one.retries, one.all_steps) for one in specs.values()] == [
        (3, False),
        (0, True),
        (0, True),
    ]
    assert specs["secondary"].steps() == (CommandStep(("/bin/true", "x")),)
    assert all(one.context.directory == str(hooks) for one in specs.values())
    assert load_specs(AgentSettings()) == {}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"hook_user": "no-such-user"}, "no such user"),
        ({"hook_group": "no-such-group"}, "no such group"),
        ({"hook_user": "4123456789"}, "set hook_group too"),
        ({"hook_directory": Path("/no/such")}, "directory that can be entered"),
        ({"webhook_ca_file": Path("/etc/passwd"), "hook_primary": "https://h/"}, "PEM"),
    ],
)
def test_directory_user_and_secret_of_hooks_are_checked(given: dict[str, Any], reason: str) -> None:
    settings = validate(AgentSettings, {"hook_primary": ("/bin/true",), **given})
    with pytest.raises(ConfigError, match=reason):
        load_specs(settings)


def test_another_user_requires_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="root"):
        load_specs(AgentSettings(hook_primary=("/bin/true",), hook_user="nobody"))


def _root_only() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs: root: run the tests as root")


@pytest.mark.parametrize("name", ["a", "."], ids=["command", "directory"])
def test_a_demotion_hook_whose_working_directory_is_gone_is_refused(hooks: Path, name: str) -> None:
    """A promotion began that no demotion could have ended."""
    script(hooks / "a", "exit 0")
    there = hooks.with_name("there")
    there.mkdir()
    settings = AgentSettings(hook_secondary=(str(hooks / name),), hook_directory=there)
    hook = load_specs(settings)["secondary"]
    hook.with_scripts()
    there.rmdir()
    with pytest.raises(ConfigError, match="directory that can be entered"):
        hook.with_scripts()


async def test_a_hook_runs_as_the_user_that_is_set(caplog: pytest.LogCaptureFixture) -> None:
    _root_only()
    settings = AgentSettings(
        hook_primary=("/bin/sh", "-c", "id -u; id -g; id -G; echo $HOME $UNIT; pwd"),
        hook_user="nobody",
        hook_environment={"UNIT": "x"},
        hook_directory=Path("/usr"),
    )
    hook = load_specs(settings)["primary"]
    hook.check()
    assert (await run(hook)).ok
    uid, gid, groups, rest, cwd = lines(caplog)
    assert (uid, gid, groups) == ("65534", "65534", "65534")
    assert (rest, cwd) == ("/nonexistent x", "/usr")


def test_a_hook_has_to_be_executable_for_its_user(hooks: Path) -> None:
    _root_only()
    path = script(hooks / "a", "exit 0")
    for part in (hooks, *hooks.parents[:-1]):
        if part.stat().st_uid == 0 and str(part).startswith(str(hooks.parent)):
            part.chmod(0o755)
    path.chmod(0o700)
    hook = load_specs(AgentSettings(hook_primary=(str(path),), hook_user="nobody"))["primary"]
    with pytest.raises(ConfigError) as caught:
        hook.check()
    assert caught.value.exit_code == ExitCode.HOOK_NOT_EXECUTABLE
    assert "uid 65534" in str(caught.value)


# --- webhooks ---------------------------------------------------------------------------------


class Receiver:
    """A server that records requests and sends a given answer, or none with ``hang``."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.answer = b"HTTP/1.1 204 No Content\r\n\r\n"
        self.keeps_open = False
        self.gone = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
        headers = dict(line.lower().split(": ", 1) for line in head)
        body = await reader.readexactly(int(headers["content-length"]))
        self.requests.append((headers, body))
        writer.write(self.answer)
        if self.answer and not self.keeps_open:
            writer.close()
        else:
            await reader.read()
            self.gone.set()
            writer.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    one = Receiver()
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    one.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook?token=secret"
    yield one
    server.close()


def webhook(url: str, **given: Any) -> HookSpec:
    return load_specs(AgentSettings(hook_primary=(url,), **given))["primary"]


async def test_a_webhook_posts_the_payload(receiver: Receiver) -> None:
    hook = webhook(receiver.url)
    hook.check()
    result = await run(hook, {"event": "primary", "epoch": 7})
    assert (result.ok, result.code, result.error) == (True, 0, None)
    ((headers, body),) = receiver.requests
    assert json.loads(body) == {"event": "primary", "epoch": 7}
    assert headers["content-type"] == "application/json"
    assert "x-failover-signature" not in headers


async def test_a_webhook_is_signed_over_time_and_body(receiver: Receiver, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    secret.chmod(0o600)
    assert (await run(webhook(receiver.url, webhook_secret_file=secret), {"epoch": 7})).ok
    ((headers, body),) = receiver.requests
    timestamp = headers["x-failover-timestamp"]
    right = hmac.new(b"hunter2", timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    assert headers["x-failover-signature"] == f"sha256={right}"
    assert abs(time.time() - int(timestamp)) < LIMIT_S


@pytest.mark.parametrize(
    "status", ["500 Internal Server Error", "302 Found\r\nLocation: http://127.0.0.1:1/", "404 No"]
)
async def test_a_status_other_than_2xx_is_a_failure_with_the_status(
    receiver: Receiver, status: str
) -> None:
    receiver.answer = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()
    result = await run(webhook(receiver.url))
    assert not result.ok
    assert f"answered {status.partition(chr(13))[0]}" in result.why
    assert "secret" not in result.why
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 " + b"x\x1b[31m\xff" * 10_000 + b"\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"\xff" * 60_000 + b"\r\n\r\n",
        b"\x01" * 60_000 + b"\r\n\r\n",
    ],
)
async def test_what_a_hostile_receiver_says_is_one_short_line(
    receiver: Receiver, answer: bytes
) -> None:
    """It went into the log, the state file and what is announced: a quarter of a megabyte each time."""
    receiver.answer = answer
    result = await run(webhook(receiver.url))
    assert not result.ok
    assert "/hook" in result.why
    assert len(result.why) <= 500
    assert result.why.isprintable()


async def test_the_logged_part_of_an_answer_is_bounded(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answer = b"HTTP/1.1 200 OK\r\n\r\ndone\n" + b"x" * 1_000_000
    assert (await run(webhook(receiver.url))).ok
    assert lines(caplog)[0] == "done"
    assert sum(map(len, lines(caplog))) <= 4096


@pytest.mark.parametrize("end", [HookRun.term, HookRun.kill])
async def test_a_webhook_without_an_answer_is_cancelled(
    receiver: Receiver, end: Callable[[HookRun], None]
) -> None:
    receiver.answer = b""
    one = start(webhook(receiver.url, hook_retries=3))
    await until(lambda: receiver.requests)
    assert (one.pid, one.pgids) == (None, ())
    end(one)
    assert "no answer" in (await end_of(one)).why
    async with asyncio.timeout(LIMIT_S):
        await receiver.gone.wait()
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("end", [HookRun.term, HookRun.kill])
async def test_a_webhook_that_has_answered_is_not_failed_by_a_body_without_end(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, end: Callable[[HookRun], None]
) -> None:
    """A demotion of less than a second failed though it was done."""
    receiver.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"
    receiver.keeps_open = True
    one = start(webhook(receiver.url))
    await until(lambda: "200 OK" in caplog.text)  # a line of the HTTP client's own
    end(one)
    assert (await end_of(one)).ok


async def test_a_webhook_that_fails_in_a_way_that_nobody_knows_of_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It counted as done, so a demotion by it released the role."""

    async def fail(*_: object) -> None:
        raise RuntimeError("of a library")

    monkeypatch.setattr(Webhook, "_post", fail)
    result = await run(webhook("http://127.0.0.1:1/x"))
    assert not result.ok
    assert "RuntimeError" in result.why or "of a library" in result.why


@pytest.mark.parametrize("end", [HookRun.term, HookRun.kill])
async def test_a_webhook_that_is_stopped_before_its_task_runs_has_an_end(
    monkeypatch: pytest.MonkeyPatch, end: Callable[[HookRun], None]
) -> None:
    """A task that is cancelled before its first step runs no line, so its run was waited for without end."""
    begin = Webhook.start

    def begin_and_stop(webhook: Webhook, payload: dict[str, Any]) -> None:
        begin(webhook, payload)
        end(one)

    monkeypatch.setattr(Webhook, "start", begin_and_stop)
    one = start(webhook("http://127.0.0.1:1/x"))
    assert "no answer" in (await end_of(one)).why


async def test_an_unreachable_server_is_a_failure_and_no_proxy_is_used(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", receiver.url)
    result = await run(webhook("http://127.0.0.1:1/x"))
    assert " failed: " in result.why
    assert receiver.requests == []


# --- notifications ----------------------------------------------------------------------------


def notices(hooks: Path, text: str, limit_s: float = LIMIT_S) -> Notifier:
    specs = {"lost": spec(script(hooks / "a", text))}
    return Notifier(HookRunner(Clock()), specs, limit_s)


async def test_notifications_run_one_at_a_time_in_order(
    hooks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notes = notices(hooks, "mkdir busy || exit 1; echo $FAILOVER_EPOCH; sleep 0.02; rmdir busy")
    for epoch in range(5):
        notes.put("lost", {"epoch": epoch})
        notes.put("joined", {})
    await notes.drain(LIMIT_S)
    assert lines(caplog) == ["0", "1", "2", "3", "4"]
    assert (notes.dropped, notes.failed) == (0, 0)


async def test_a_full_queue_drops_the_oldest_notification(
    hooks: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "QUEUE_LIMIT", 2)
    notes = notices(hooks, "echo $FAILOVER_EPOCH")
    for epoch in range(5):
        notes.put("lost", {"epoch": epoch})
    await notes.drain(LIMIT_S)
    assert (lines(caplog), notes.dropped) == (["3", "4"], 3)


async def test_a_failed_notification_is_counted_and_delays_nothing(
    hooks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notes = notices(hooks, "echo x; exit 1")
    notes.put("lost", {})
    notes.put("lost", {})
    await notes.drain(LIMIT_S)
    assert (notes.failed, lines(caplog)) == (2, ["x", "x"])


async def test_a_notification_that_hangs_is_killed_at_its_limit(
    hooks: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notifier, "GRACE_S", 0.05)
    notes = notices(hooks, "trap '' TERM; echo x; while :; do sleep 0.01; done", limit_s=1.0)
    notes.put("lost", {})
    await notes.drain(LIMIT_S)
    assert notes.failed == 1
    (event,) = fields(caplog, "notification failed")
    assert event["reason"] == "killed by signal 9"


async def test_drain_kills_a_notification_after_its_timeout(
    hooks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notes = notices(hooks, "echo $$; exec sleep 1000")
    notes.put("lost", {})
    notes.put("lost", {})
    await until(lambda: lines(caplog))
    before = time.monotonic()
    await notes.drain(0.05)
    assert time.monotonic() - before < LIMIT_S / 2
    assert notes.dropped == 2
    await until(lambda: not is_alive(int(lines(caplog)[0])))
