"""docs/tutorial.md, typed: each command in one shell, until it prints what the page shows.

The network is the test's own, so that the page's ports are free.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from .stage import PATIENCE_S, Stage, environment
from .test_story import private_network

PAGE = Path(__file__).parents[2] / "docs/tutorial.md"
BLOCK = re.compile(r"(?ms)^```(sh|console)\n(.*?)^```$")
END = "end of the command"
AGAIN_S = 0.1
CHANGING = (
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z", "TIME"),
    (r"@\[[\d.]+\]", "@[TIME]"),
    (r"(?m)^(revision +)\d+", r"\1N"),
    (r" +$", ""),
)
"""What is another one each time; a line's last blanks are not in the page."""


class Look(NamedTuple):
    """A command that changes nothing, and what it prints in the end."""

    command: str
    printed: str


class Shell:
    """One /bin/sh, into which somebody types."""

    def __init__(self, stage: Stage, *before: str, **variables: str) -> None:
        self._popen = subprocess.Popen(
            [*before, "/bin/sh"],
            cwd=stage.directory,
            env=environment(**variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        stage.enter(self._popen)
        stage.later(self._end)

    def _end(self) -> None:
        """With what it has started in the background."""
        os.killpg(self._popen.pid, signal.SIGKILL)

    def type(self, command: str) -> str:
        """Type it, and wait for its end; returns what it printed."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(f"{command}\necho '{END}'\n")
        self._popen.stdin.flush()
        lines: list[str] = []
        for line in self._popen.stdout:
            if line.rstrip("\n").endswith(END):
                return "".join(lines) + line.removesuffix(f"{END}\n")
            lines.append(line)
        raise AssertionError(f"the shell has ended: {''.join(lines)}")

    def look(self, look: Look) -> None:
        """Type it again until it prints what the page shows, as somebody who waits would."""
        end_at = time.monotonic() + PATIENCE_S
        while steady(printed := self.type(look.command)) != steady(look.printed):
            assert time.monotonic() < end_at, f"$ {look.command}\n{printed}\nnot\n{look.printed}"
            time.sleep(AGAIN_S)


def steady(text: str) -> str:
    for pattern, instead in CHANGING:
        text = re.sub(pattern, instead, text, flags=re.MULTILINE)
    return text.strip()


def steps(section: str) -> Iterator[str | Look]:
    for kind, text in BLOCK.findall(section):
        if kind == "sh":
            yield text
        else:
            command, _, printed = text.removeprefix("$ ").partition("\n")
            yield Look(command, printed)


@pytest.fixture
def shell(stage: Stage) -> Shell:
    home = stage.directory / "failover"
    (home / "venv").mkdir(parents=True)
    (home / "venv/bin").symlink_to(Path(sys.executable).parent)
    inside = private_network(stage)
    return Shell(stage, *inside, HOME=str(stage.directory))


def test_every_command_of_the_tutorial_prints_what_the_page_shows(shell: Shell) -> None:
    """All but the first block, since the program is installed already."""
    for program in ("curl", "prometheus"):
        if shutil.which(program) is None:
            pytest.skip(f"needs: {program}: apt-get install {program}")
    install, *typed = steps(PAGE.read_text())
    assert isinstance(install, str)
    assert "pip install ." in install
    assert len(typed) > 20
    for step in typed:
        if isinstance(step, Look):
            shell.look(step)
        else:
            assert shell.type(step) == ""
