"""hash-password: the line that it prints is what the coordinator reads."""

import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.coordinator.auth import read_users
from agent.errors import ExitCode

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\nmore\n"])
def test_the_first_line_of_the_input_is_the_password(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"pass wörd{end}"))
    code, line, err = cli("hash-password", "line 7", "--role", "operators", "--role", "urn:a b")
    assert (code, err, line.count("\n")) == (0, "", 1)
    users = tmp_path / "users"
    users.write_text(f"# users\n{line}")
    ((name, user),) = read_users(users).items()
    assert (name, user.roles) == ("line 7", ("operators", "urn:a b"))
    assert user.fits("pass wörd".encode())
    assert not user.fits(b"pass word")


def test_bytes_that_are_no_text_and_a_closed_input_are_one_error() -> None:
    for how in (r"printf 'p\377\n' | exec", "exec <&-; exec"):
        done = subprocess.run(
            ["sh", "-c", f'{how} "$0" -m agent hash-password a', sys.executable],
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
        (line,) = done.stderr.splitlines()
        assert "the password must be one line" in line


def test_at_a_terminal_it_asks_twice_and_shows_nothing(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "agent", "hash-password", "collector"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    for asked in (b"Password: ", b"Repeat for confirmation: "):
        while not said.endswith(asked):
            said += os.read(ours, 1024)
        os.write(ours, b"secret\n")
    out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0
    assert b"secret" not in said + out
    users = tmp_path / "users"
    users.write_bytes(out)
    assert read_users(users)["collector"].fits(b"secret")


@pytest.mark.parametrize(
    ("words", "password", "why"),
    [
        (("",), "x", "printable"),
        (("a:b",), "x", "no ':'"),
        (("#a",), "x", "no '#' at its beginning"),
        ((" a",), "x", "printable"),
        (("a\n",), "x", "printable"),
        (("a", "--role", "x,y"), "x", "no ','"),
        (("a", "--role", ""), "x", "printable"),
        (("a", "--role", "x "), "x", "printable"),
        (("a", "--role", "x\ny"), "x", "printable"),
        (("a",), "", "1 to 4096"),
        (("a",), "x" * 4097, "1 to 4096"),
        (("a",), "x\x00", "1 to 4096"),
        ((), "x", "USER"),
    ],
)
def test_what_the_coordinator_could_not_read_is_refused(
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    password: str,
    why: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(password))
    code, out, err = cli("hash-password", *words)
    assert (code, out, err.count("\n")) == (ExitCode.USAGE, "", 1)
    assert why in err
    assert "xxxx" not in err
