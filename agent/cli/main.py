"""The outermost layer: starts an agent, or the command that the arguments name, and reports its failure.

Owns how every error is printed: one line for each fault on stderr, an exit code of
``agent.errors.ExitCode``, a traceback only with ``--debug``. ``run`` and ``exec`` pass their arguments on
unparsed, so an agent does not keep click in its memory.
"""

import errno
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from agent import __version__
from agent.errors import ExitCode, FailoverError

if TYPE_CHECKING:
    import click

PROGRAM = "failover-agent"

AGENTS = ("run", "exec")
"""The commands that run an agent."""

DEBUG = "--debug"

UNWRITTEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""Errors of a write to a file that was open already, such as the standard output."""

INTERRUPTED = 130
"""The exit code that shells report for a program that Ctrl-C ended: 128 + SIGINT."""


def main(
    argv: Sequence[str] | None = None, replacements: "Mapping[str, click.Command] | None" = None
) -> int:
    """Run one command line; return the exit code. Prints every error, raises none.

    Args:
        argv: without the program's name; this process's own if None.
        replacements: commands to use instead of those with the same names.
    """
    _open_standard_files()
    arguments = tuple(sys.argv[1:] if argv is None else argv)
    debug = arguments[:1] == (DEBUG,)
    try:
        return _run(arguments, replacements or {}, debug=debug)
    except KeyboardInterrupt:
        return INTERRUPTED
    except FailoverError as error:
        text = str(error) if error.hint is None else f"{error}\n{error.hint}"
        _print_error(text, error.exit_code, debug=debug)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the outermost layer: nothing else turns it into a line
        services = {*AGENTS, "serve"} - {*(replacements or ())}  # systemd restarts none after USAGE
        unwritten = UNWRITTEN if services.isdisjoint(arguments[: 1 + debug]) else ()
        if isinstance(error, OSError) and error.errno in unwritten and error.filename is None:
            _print_error(f"the output cannot be written: {error.strerror}", ExitCode.USAGE)
            return ExitCode.USAGE
        text = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        report = f"this is a fault of {PROGRAM} {__version__}; please report it with the output of"
        _print_error(f"{text}: {report} '{PROGRAM} --debug ...'", ExitCode.INTERNAL, debug=debug)
        return ExitCode.INTERNAL


def _open_standard_files() -> None:
    """Open /dev/null in the place of closed ones: the next file that is opened would become stderr."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # noqa: PLR2004 - stderr
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _run(
    arguments: Sequence[str], replacements: "Mapping[str, click.Command]", *, debug: bool
) -> int:
    unparsed = arguments[1:] if debug else arguments
    if not unparsed or unparsed[0] not in AGENTS or unparsed[0] in replacements:
        from agent.cli.command_line import run_command  # noqa: PLC0415 - an agent does without

        return run_command(arguments, replacements)
    from agent.cli.settings_process import NoSettings, run_agent  # noqa: PLC0415 - --version does without
    from agent.ops.signals import ignored_signals  # noqa: PLC0415 - likewise

    try:
        with ignored_signals():
            return run_agent(unparsed, debug=debug)
    except NoSettings as ended:
        if ended.exit_code and ended.hint is not None:
            _print_error(ended.hint, ended.exit_code)
        return ended.exit_code


def _print_error(text: str, exit_code: int, *, debug: bool = False) -> None:
    """One line on stderr for each fault."""
    from agent.ops.logs import format_fatal_error  # noqa: PLC0415 - --version and --help do without

    if debug:
        traceback.print_exc()
    for line in text.splitlines():
        sys.stderr.write(format_fatal_error(f"{PROGRAM}: error: {line}", exit_code) + "\n")
