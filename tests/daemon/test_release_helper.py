"""The helper of the guard that releases the role: as a process, and against real coordinators."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent import __version__
from agent.daemon import release_helper
from agent.drivers.guardian.program import helper_command
from agent.drivers.rest.configured import client_for
from agent.errors import ConfigError, ExitCode
from agent.schema.settings import AgentSettings
from tests.integration.stage import Coordinator, Stage, until

INSTANCE = "0b5c1f0e"
LIMIT_S = 30.0

AGENT = """
import asyncio, sys
from agent.drivers.guardian.messages import Arming, GuardHook
from agent.drivers.guardian.supervisor import Guardian
from agent.ops.clock import Clock

async def main():
    clock = Clock()
    guardian = Guardian(clock, lambda why: None, limit_s=60)
    await guardian.start()
    guardian.set_hook(GuardHook([["/bin/true"]], {}))
    guardian.set_release_document(open(sys.argv[1], "rb").read())
    guardian.arm(Arming(clock.boottime() + 60, clock.boottime() + 120, epoch=int(sys.argv[2])))
    # an answer of the guard has no public effect
    while guardian._unanswered:
        guardian.check()
        await asyncio.sleep(0.001)
    print("armed", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path) as stage:
        yield stage


def settings_for(*endpoints: str) -> AgentSettings:
    return AgentSettings(group="line-7", endpoint=endpoints)


def holder(coordinator: Coordinator) -> int:
    """Make session host-a the holder of a tenure for a minute; its epoch."""
    coordinator.ask("POST", "groups", {"Id": "line-7", "FailoverTimeout": "00:01:00"})
    coordinator.ask("POST", "groups/line-7/clientsessions", {"Id": "host-a", "Name": "host-a"})
    path = "groups/line-7/clientsessions/host-a/heartbeat"

    def primary() -> int | None:
        answer = coordinator.ask("POST", path, {"FailoverScore": 100, "Instance": INSTANCE}).body
        return answer["Epoch"] if answer.get("Role") in {1, "Primary"} else None

    return until(primary, "host-a to be Primary")


def document_for(*endpoints: str) -> bytes:
    return release_helper.format_document(settings_for(*endpoints), "host-a", INSTANCE, "store-1")


@contextlib.contextmanager
def helper(
    document: bytes, epoch: int, wait_s: float = LIMIT_S
) -> Iterator[subprocess.Popen[bytes]]:
    """The helper as the guard starts it, before the byte that lets it go on."""
    memory = os.memfd_create("document")
    os.write(memory, document)
    words = [*helper_command(), str(epoch), str(wait_s)]
    shell = ["/bin/sh", "-c", f'exec 3</proc/self/fd/{memory}; exec "$@"', "sh", *words]
    with subprocess.Popen(
        shell, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", pass_fds=[memory]
    ) as process:
        os.close(memory)
        yield process
        process.kill()


def ended(process: subprocess.Popen[bytes], go: bytes) -> tuple[int, str]:
    _, output = process.communicate(go, timeout=LIMIT_S)
    return process.returncode, output.decode()


def test_the_guards_byte_releases_the_tenure(stage: Stage) -> None:
    """Fault 28: otherwise the group waits for the end of the lease."""
    coordinator = stage.serve()
    epoch = holder(coordinator)
    with helper(document_for(coordinator.endpoint), epoch) as process:
        code, log = ended(process, b"1")
    assert (code, "role released by the guard" in log) == (0, True), log
    assert coordinator.status().get("Primary") is None
    assert coordinator.tenure(epoch)["WhyEnded"] == release_helper.REASON


def test_without_the_guards_byte_nothing_happens(stage: Stage) -> None:
    coordinator = stage.serve()
    epoch = holder(coordinator)
    with helper(document_for(coordinator.endpoint), epoch) as process:
        assert ended(process, b"") == (0, "")
    with helper(document_for(coordinator.endpoint), epoch, wait_s=0.1) as process:
        assert process.wait(LIMIT_S) == 0, "it waits for the go for ever"
    assert coordinator.status()["Primary"] == "host-a"


def test_a_release_of_another_tenure_changes_nothing(stage: Stage) -> None:
    coordinator = stage.serve()
    epoch = holder(coordinator)
    with helper(document_for(coordinator.endpoint), epoch - 1) as process:
        assert ended(process, b"1")[0] == 0
    assert coordinator.status()["Primary"] == "host-a"


def test_dead_endpoints_before_the_good_one_do_not_delay_it(stage: Stage) -> None:
    coordinator = stage.serve()
    epoch = holder(coordinator)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dead = f"http://127.0.0.1:{silent.getsockname()[1]}/api/v1/clientfailover"
        with helper(document_for(dead, coordinator.endpoint), epoch) as process:
            assert process.stdin is not None
            process.stdin.write(b"1")
            process.stdin.flush()
            begun_at = time.monotonic()
            until(lambda: coordinator.status().get("Primary") is None, "the release")
            assert time.monotonic() - begun_at < release_helper.REQUEST_TIMEOUT_S


def test_a_coordinator_that_returns_within_the_limit_gets_the_release(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = stage.serve(store="sqlite")
    epoch = holder(coordinator)
    coordinator.end()
    with helper(document_for(coordinator.endpoint), epoch) as process:
        assert process.stdin is not None
        process.stdin.write(b"1")
        process.stdin.flush()
        again = stage.serve(store="sqlite", port=int(coordinator.endpoint.split(":")[2][:5]))
        assert process.wait(LIMIT_S) == 0
    assert again.status().get("Primary") is None


async def test_the_release_has_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_helper, "RELEASE_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/api/v1/clientfailover"
        given = release_helper.parse_document(document_for(endpoint))
        async with asyncio.timeout(LIMIT_S):
            clients = [client_for(given.settings)]
            assert not await release_helper.release_everywhere(given, 7, clients)


def test_the_document_of_another_version_is_refused_with_one_line() -> None:
    """Fault 7: the helper on disk is not the one that the agent was installed with."""
    given = json.loads(document_for("http://127.0.0.1:1/clientfailover"))
    settings = json.loads(given["settings"])
    given["settings"] = json.dumps(settings | {"version": "99.0.0"})
    with helper(json.dumps(given).encode(), 7) as process:
        code, log = ended(process, b"1")
    assert code == ExitCode.INTERNAL
    assert f"version 99.0.0 wrote it, {__version__} reads it" in log
    assert len(log.splitlines()) == 1, log


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"settings": 1}', b"\xff"])
def test_a_damaged_document_is_refused(text: bytes) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        release_helper.parse_document(text)


def test_the_document_has_only_what_requests_need(tmp_path: Path) -> None:
    settings = replace(
        settings_for("http://127.0.0.1:1/clientfailover"),
        username="u",
        password_file=tmp_path / "secret",
        hook_environment={"TOKEN": "hidden"},
    )
    text = release_helper.format_document(settings, "host-a", INSTANCE, "store-1")
    assert b"hidden" not in text
    read = release_helper.parse_document(text)
    assert read.settings.password_file == tmp_path / "secret"
    assert (read.session_id, read.instance, read.store_id) == ("host-a", INSTANCE, "store-1")


def test_the_guard_of_a_killed_agent_releases_the_role_at_once(
    stage: Stage, tmp_path: Path
) -> None:
    """Fault 28: guard and helper together."""
    coordinator = stage.serve()
    epoch = holder(coordinator)
    document = tmp_path / "document"
    document.write_bytes(document_for(coordinator.endpoint))
    with subprocess.Popen(
        [sys.executable, "-c", AGENT, str(document), str(epoch)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"armed\n"
        begun_at = time.monotonic()
        process.kill()
        until(lambda: coordinator.status().get("Primary") is None, "the release")
        took_s = time.monotonic() - begun_at
    assert took_s < 5.0, "a lease is a minute; the aim on a quiet machine is less than 1 s"
