"""Start the process that reads an agent's settings, and receive them from it.

Reading them takes pydantic and click, which an agent would keep in memory for months though it needs them
once, and again at a reload. So ``run`` and ``exec`` pass their arguments on unparsed; in the other process
settings_reader.py reads settings from them, or reports what is wrong. Owns the channel between the two.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import Any

from agent import __version__
from agent.errors import ConfigError, ExitCode
from agent.ops.process import Popen
from agent.schema import exchange
from agent.schema.settings import AgentSettings

READ_S = 60.0
"""Timeout to read the settings: their file may be on a disk, or a network, that does not answer."""

END_S = 1.0
"""How long to wait until a killed process has ended."""

PROGRAM = f"""\
import json, os, sys
sys.path[:] = json.loads(sys.argv[1])
from agent import __version__
if __version__ == {__version__!r}:
    from agent.cli.settings_reader import main
    sys.exit(main(int(sys.argv[2]), sys.argv[3:]))
os.write(int(sys.argv[2]), json.dumps({{"version": __version__}}).encode())
"""
"""Started with ``-P`` and with the search path of this process, so that it finds the same program. If
another version was installed meanwhile it reads nothing, and only reports its version."""


class NoSettings(Exception):  # noqa: N818 - a request for help is no error
    """The other process has printed a help text or a usage error itself, and ended with this code."""

    hint: str | None = None

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"ended with code {exit_code}")
        self.exit_code = exit_code


class SettingsProcess:
    """The other process. Creating this object starts it; call ``receive``, which waits for its end.

    Args:
        arguments: the command and its arguments, without the program's name.
        debug: whether it shows the traceback of an error.
    """

    def __init__(self, arguments: Sequence[str], *, debug: bool) -> None:
        flags = ["--debug"] if debug else []
        self._document = os.memfd_create("settings")
        # The alarm ends it if this process is killed and can no longer do that.
        program = f"import signal; signal.alarm({int(READ_S + END_S)})\n{PROGRAM}"
        start = [sys.executable, "-P", "-c", program, json.dumps(sys.path), str(self._document)]
        try:
            # In its own process group: Ctrl-C is for this process, which then waits for it.
            self._process = Popen(
                [*start, *flags, *arguments], pass_fds=[self._document], process_group=0
            )
        except OSError as error:
            os.close(self._document)
            raise ConfigError(f"cannot start the settings reader: {error.strerror}") from None

    def receive(self) -> AgentSettings:
        """Wait for the settings.

        Raises:
            ConfigError: something is wrong with the settings.
            NoSettings: the process has printed a help text or a usage error.
        """
        try:
            code = self._process.wait(READ_S)
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"the settings were not read within {READ_S:g} s: is the file on a disk that hangs?",
                exit_code=ExitCode.CONFIG_FILE,
            ) from None
        else:
            return self._load(code)
        finally:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # one that waits for a hung disk lives on
                self._process.wait(END_S)
            os.close(self._document)

    def _load(self, code: int) -> AgentSettings:
        if size := os.fstat(self._document).st_size:
            return exchange.load(os.pread(self._document, size, 0))
        if code >= 0:
            raise NoSettings(code)
        raise ConfigError(
            f"the process that reads the settings was ended by signal {-code}",
            exit_code=ExitCode.INTERNAL,
        )


def run_agent(arguments: Sequence[str], *, debug: bool) -> int:
    """Run the agent with the settings of these arguments; SIGHUP reads them again.

    Raises:
        FailoverError, NoSettings: as ``SettingsProcess.receive`` and ``agent.daemon.run`` do.
    """
    process = SettingsProcess(arguments, debug=debug)
    try:
        with _without_metadata():
            from agent.daemon.main import run  # noqa: PLC0415 - while the other process reads
    finally:
        try:
            settings = process.receive()
        except (ConfigError, NoSettings) as error:
            from agent.daemon.leftover_workload import hint_of_state_files  # noqa: PLC0415 - likewise

            error.hint = hint_of_state_files(getattr(error, "state_file", ""))
            raise
    code = run(settings, partial(_reread, arguments, debug=debug))
    gc.freeze()  # else the interpreter collects garbage at its end for 0.2 s, and the guard has to kill it
    return code


@contextmanager
def _without_metadata() -> Iterator[None]:
    """Keep importlib.metadata out of memory, where it takes 1.7 MiB.

    httpx2 and httpcore2 import it to read their own versions, for a User-Agent that the agent replaces. If
    a library uses anything else of it, the real module is imported.
    """
    name = "importlib.metadata"
    stand_in = ModuleType(name)
    stand_in.version = lambda _library: "0"  # type: ignore[attr-defined]

    def load(attribute: str) -> Any:
        if attribute == "__path__":  # asked for by each import
            raise AttributeError(attribute)
        del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    stand_in.__getattr__ = load  # type: ignore[method-assign]
    sys.modules.setdefault(name, stand_in)
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


def _reread(arguments: Sequence[str], *, debug: bool) -> AgentSettings:
    """Read the settings again. Raises ConfigError: the running agent goes on with what it has."""
    try:
        return SettingsProcess(arguments, debug=debug).receive()
    except NoSettings as error:
        raise ConfigError(
            f"the process that reads the settings {error}, and has printed why",
            exit_code=ExitCode.INTERNAL,
        ) from None
