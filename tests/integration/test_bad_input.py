"""Bad input ends a start with one line (the fault, its place, the remedy) and its own exit code."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from agent.errors import ExitCode

from .stage import Coordinator, Process, Stage, free_port, lives

PREFIX = "failover-agent: error: "


def complaint(process: Process) -> str:
    """The one line, of a process that has ended by itself; what it logged before is no complaint."""
    process.wait()
    said = process.said()
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if not line[:4].isdecimal()]
    assert len(lines) == 1, said
    assert lines[0].startswith(PREFIX)
    return lines[0].removeprefix(PREFIX)


def refused(stage: Stage, *words: str, **variables: str) -> tuple[int, str]:
    """Exit code and complaint of a command that must not start."""
    process = stage.process("refused", *words, **variables)
    return process.wait(), complaint(process)


# -- endpoints --------------------------------------------------------------------------------------


def answering(stage: Stage, answer: bytes | None) -> str:
    """A server that reads a little, says this and closes; with None it says nothing, ever."""
    server = stage.enter(contextlib.closing(socket.create_server(("127.0.0.1", 0))))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(answer or b"")
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(65536)

    if answer is not None:
        thread = Thread(target=serve, daemon=True)
        thread.start()
        stage.later(thread.join)
        stage.later(lambda: server.shutdown(socket.SHUT_RDWR))
    return f"http://127.0.0.1:{server.getsockname()[1]}/api/v1/clientfailover"


PAGE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 20\r\n\r\n<!doctype html><p>Hi"
)
HALF = b'HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\n{"Id":"line-7","Fail'
SSH = b"SSH-2.0-OpenSSH_9.2p1\r\n"


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        ("nothing listens", ExitCode.UNREACHABLE, "cannot be reached"),
        (SSH, ExitCode.NOT_HTTP, "does not speak HTTP"),
        (PAGE, ExitCode.NOT_THE_API, "up to clientfailover"),
        (HALF, ExitCode.HALF_BODY, "in the middle of its answer"),
        (None, ExitCode.NO_ANSWER, "gave no answer within"),
    ],
    ids=["unreachable", "not-http", "html", "half-a-body", "silence"],
)
def test_an_endpoint_that_is_no_coordinator_ends_the_start_with_its_exit_code(
    stage: Stage, answer: bytes | str | None, code: ExitCode, words: str
) -> None:
    if isinstance(answer, str):
        endpoint = f"http://127.0.0.1:{free_port()}/api/v1/clientfailover"
    else:
        endpoint = answering(stage, answer)
    agent = stage.run("host-a", endpoint, flags=("--startup-timeout=1",))
    text = complaint(agent)
    assert agent.wait() == code
    assert endpoint in text
    assert words in text
    events = [(e.what, e.which) for e in stage.events()]
    assert set(events) == {("begin", "secondary"), ("end", "secondary")}
    assert agent.state["role"] == "Secondary"


# -- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "text", "code", "words"),
    [
        ("run", 'grup = "line-7"\n', ExitCode.CONFIG_UNKNOWN_KEY, "did you mean group?"),
        ("run", 'group = "g"\nfailover_timeout = true\n', ExitCode.CONFIG_VALUE, "seconds (2.5)"),
        ("run", 'group = "g"\nrenew = 9\n', ExitCode.TIMING, "R1"),
        ("run", "group = [\n", ExitCode.CONFIG_FILE, "is not TOML"),
        ("serve", "listen = 5470\n", ExitCode.CONFIG_VALUE, "HOST:PORT"),
        ("serve", 'data = "/tmp"\n', ExitCode.CONFIG_UNKNOWN_KEY, "did you mean data_dir?"),
    ],
    ids=["unknown-key", "type", "r1", "toml", "serve-type", "serve-unknown-key"],
)
def test_a_wrong_configuration_file_ends_the_start_with_its_exit_code(
    stage: Stage, command: str, text: str, code: ExitCode, words: str
) -> None:
    config = stage.directory / "config.toml"
    config.write_text(text)
    told, line = refused(stage, command, f"--config={config}")
    assert told == code
    assert str(config) in line
    assert words in line


def missing(hook: Path) -> None:
    hook.unlink()


def not_executable(hook: Path) -> None:
    hook.chmod(0o600)


def writable_by_others(hook: Path) -> None:
    hook.chmod(0o777)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (missing, ExitCode.HOOK_MISSING),
        (not_executable, ExitCode.HOOK_NOT_EXECUTABLE),
        (writable_by_others, ExitCode.HOOK_WRITABLE),
    ],
)
def test_a_hook_that_cannot_be_trusted_ends_the_start_with_its_exit_code(
    stage: Stage, spoil: Callable[[Path], None], code: ExitCode
) -> None:
    hook = stage.hook("host-a", "primary")
    spoil(hook)
    told, line = refused(stage, "run", "--group=g", f"--hook-primary={hook}")
    assert told == code
    assert str(hook) in line
    assert "--hook-primary" in line


def test_a_state_file_in_use_names_the_process_that_has_it(
    stage: Stage, coordinator: Coordinator
) -> None:
    agent = stage.run("host-a", coordinator)
    agent.until_said("joined")
    before = agent.state
    told, line = refused(
        stage,
        "run",
        f"--group={stage.group}",
        "--session-id=host-a",
        f"--endpoint={coordinator.endpoint}",
        f"--state-file={agent.state_file}",
    )
    assert told == ExitCode.SESSION_IN_USE
    assert str(agent.state_file) in line
    assert f"pid {agent.popen.pid}" in line
    assert agent.popen.poll() is None
    assert agent.state["instance"] == before["instance"]


def test_a_taken_address_ends_the_start_with_its_exit_code(
    stage: Stage, coordinator: Coordinator
) -> None:
    listen = coordinator.endpoint.removeprefix("http://").partition("/")[0]
    told, line = refused(stage, "serve", f"--listen={listen}", f"--data-dir={stage.directory}/d")
    assert told == ExitCode.LISTEN
    assert listen in line
    assert not (stage.directory / "d").exists()


# -- data directories -------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def serve(stage: Stage, data: Path, *before: str) -> tuple[int, str]:
    words = ("serve", "--listen=127.0.0.1:0", f"--data-dir={data}")
    process = stage.process("refused", *words, before=before)
    return process.wait(), complaint(process)


def test_a_data_directory_in_use_names_the_process_that_has_it(stage: Stage) -> None:
    first = stage.serve(store="sqlite")
    told, line = serve(stage, stage.directory / "data")
    assert told == ExitCode.DATA_DIR_LOCKED
    assert str(first.popen.pid) in line
    assert lives(first.popen.pid)
    assert first.ask("GET", "groups").status == 200


def test_a_data_directory_of_a_newer_version_is_left_as_it_is(stage: Stage) -> None:
    assert stage.serve(store="sqlite").end() == 0
    database = stage.directory / "data" / "coordinator.db"
    header = bytearray(database.read_bytes())
    header[60:64] = (99).to_bytes(4, "big")  # user_version, sqlite.org/fileformat.html
    database.write_bytes(header)
    before = contents(database.parent)
    told, line = serve(stage, database.parent)
    assert told == ExitCode.DATA_DIR_NEWER
    assert "its schema is 99" in line
    assert contents(database.parent) == before


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ("ro", ExitCode.DATA_DIR_READ_ONLY, "cannot be written"),
        ("size=8k", ExitCode.DATA_DIR_FULL, "is on a disk that is full"),
    ],
    ids=["read-only", "full"],
)
def test_a_data_directory_that_cannot_be_written_ends_the_start_with_its_exit_code(
    stage: Stage, options: str, code: ExitCode, words: str
) -> None:
    point = stage.directory / "disk"
    point.mkdir()
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "-r"]
    mount = f'mount -t tmpfs -o {options} none "{point}" && exec "$@"'
    before = (*unshare, "sh", "-c", mount, "sh")
    tried = subprocess.run([*before, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        how = f"run as root, or allow user namespaces ({tried.stderr.strip().splitlines()[-1]})"
        pytest.skip(f"needs: the right to mount a tmpfs: {how}")
    told, line = serve(stage, point, *before)
    assert told == code
    assert str(point) in line
    assert words in line
