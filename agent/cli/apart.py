"""The settings of an agent are read by a process of its own, which hands them back and ends.

Reading them takes pydantic and click, which an agent would keep in memory for months for what it does
once, and again at a reload. So ``run`` and ``exec`` pass their words on as they are; cli/reader.py, in
the other process, makes settings of them, or says what is wrong. Owns the way between the two.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import click

from agent import __version__
from agent.errors import ConfigError, ExitCode
from agent.ops.process import Popen
from agent.settings import AgentSettings, exchange

READ_S = 60.0
"""Then the file is taken for unreadable: it is on a disk, or a network, that does not answer."""

END_S = 1.0
"""For what was killed to be gone."""

PROGRAM = f"""\
import json, os, sys
sys.path[:] = json.loads(sys.argv[1])
from agent import __version__
if __version__ == {__version__!r}:
    from agent.cli.reader import main
    sys.exit(main(int(sys.argv[2]), sys.argv[3:]))
os.write(int(sys.argv[2]), json.dumps({{"version": __version__}}).encode())
"""
"""Started with ``-P`` and with the search path of this process, so that it finds the same program. If
another version was installed meanwhile it reads nothing, and only tells its version."""


class Words(click.Command):
    """A command whose words, its flags too, are for another process to understand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take them all, as they are."""
        ctx.params["words"] = tuple(args)
        return []


class Reading:
    """The other process, from its start on. Its end has to be waited for by ``settings``.

    Args:
        words: the command and its words, without the program's name.
        debug: whether it shows the traceback of an error.
    """

    def __init__(self, words: Sequence[str], *, debug: bool) -> None:
        flags = ["--debug"] if debug else []
        self._handed = os.memfd_create("settings")
        start = [sys.executable, "-P", "-c", PROGRAM, json.dumps(sys.path), str(self._handed)]
        try:
            # A group of its own: Ctrl-C is for this process, which then waits for it.
            self._process = Popen(
                [*start, *flags, *words], pass_fds=[self._handed], process_group=0
            )
        except OSError as error:
            os.close(self._handed)
            raise ConfigError(f"no process to read the settings: {error.strerror}") from None

    def settings(self) -> AgentSettings:
        """What was read; waits for it.

        Raises:
            ConfigError: something is wrong with the settings.
            click.exceptions.Exit: the process has said what there is to say: a help text, or what is
                wrong with the words. ``exit_code`` is its own.
        """
        try:
            code = self._process.wait(READ_S)
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"the settings were not read within {READ_S:g} s: is the file on a disk that hangs?",
                exit_code=ExitCode.CONFIG_FILE,
            ) from None
        else:
            return self._received(code)
        finally:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # a disk that hangs lets nobody be killed
                self._process.wait(END_S)
            os.close(self._handed)

    def _received(self, code: int) -> AgentSettings:
        if size := os.fstat(self._handed).st_size:
            return exchange.load(os.pread(self._handed, size, 0))
        if code >= 0:
            raise click.exceptions.Exit(code)
        raise ConfigError(
            f"the process that reads the settings was ended by signal {-code}",
            exit_code=ExitCode.INTERNAL,
        )


def start(words: Sequence[str], *, debug: bool) -> int:
    """Run the agent with the settings that the words say; SIGHUP reads them anew.

    Raises:
        FailoverError, click.exceptions.Exit: as ``Reading.settings`` and ``agent.daemon.run`` do.
    """
    reading = Reading(words, debug=debug)
    try:
        from agent.daemon.main import run  # noqa: PLC0415 - while the other process reads
    finally:
        try:
            settings = reading.settings()
        except ConfigError as error:
            from agent.daemon.leftover_workload import add_hint_of_usual_directory  # noqa: PLC0415 - likewise

            add_hint_of_usual_directory(error)
            raise
    code = run(settings, partial(_again, words, debug=debug))
    gc.freeze()  # or the interpreter looks for garbage at its end for 0.2 s, and the guard has to kill it
    return code


def _again(words: Sequence[str], *, debug: bool) -> AgentSettings:
    """The settings anew. Raises ConfigError: the agent that runs goes on with what it has."""
    try:
        return Reading(words, debug=debug).settings()
    except click.exceptions.Exit as error:
        raise ConfigError(
            f"the process that reads the settings ended with code {error.exit_code}, and has said why",
            exit_code=ExitCode.INTERNAL,
        ) from None
