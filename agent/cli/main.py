"""The command line: which commands there are, and how a failure is reported to the shell.

Owns how every error is printed: one line for each fault on stderr, an exit code of
``agent.errors.ExitCode``, a traceback only with ``--debug``. Knows nothing of what a command does;
a command is imported when it is called, so that ``--version`` and ``--help`` are quick.
"""

import importlib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import click

from agent import __version__
from agent.errors import ExitCode, FailoverError

PROGRAM = "failover-agent"

INTERRUPTED = 130
"""The exit code that shells report for a program that Ctrl-C ended: 128 + SIGINT."""

COMMANDS = {
    "run": "Be a member of a group: heartbeat, follow the role, run the hooks.",
    "exec": "Run a command only while this member is primary.",
    "serve": "Run the coordinator.",
    "check-config": "Validate and print the effective configuration; start nothing.",
    "explain-timing": "Draw how the failover timeout is divided (rule R1).",
    "status": "Show the primary and the other members of a group.",
    "healthcheck": "Check the health of a running agent; for containers.",
    "demo": "Show takeovers on this machine: a power cut, a crash, a switchover, a freeze.",
    "hooks": "List the hooks, and try one without a group.",
    "groups": "List, create, show and delete groups.",
    "sessions": "List the sessions of a group, and forget dead ones.",
    "failsafe": "Undo what failsafe restricts in a group.",
    "store": "Copy the store of coordinators, back it up, or trust a restored one.",
    "hash-password": "Print a user's line for the coordinator's users file.",
}
"""Every command with its line of help. ``a-b`` is ``command`` in agent/cli/a_b.py: add both here."""


@dataclass(slots=True)
class GlobalOptions:
    """The options before the command's name, and commands that replace the usual ones."""

    debug: bool = False
    replaced: Mapping[str, click.Command] = field(default_factory=dict)


class _LazyGroup(click.Group):
    """Imports a command when it is called, not to list it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        replaced = ctx.obj.replaced if isinstance(ctx.obj, GlobalOptions) else {}
        if cmd_name in replaced:
            return replaced[cmd_name]
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"agent.cli.{cmd_name.replace('-', '_')}")
        command = module.command
        assert isinstance(command, click.Command), cmd_name  # noqa: S101 - our own mistake
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - as above
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_obj
def cli(options: GlobalOptions, *, debug: bool) -> None:
    """Exactly one active member in a group of hosts.

    Settings come from flags, else from the environment (FAILOVER_AGENT_..., FAILOVER_COORDINATOR_...),
    else from the TOML file that --config names. Exit codes are listed in docs/exit-codes.md.
    """
    options.debug = debug


def main(
    argv: Sequence[str] | None = None, replaced: Mapping[str, click.Command] | None = None
) -> int:
    """Run one command line; return the exit code. Prints every error, raises none.

    Args:
        argv: without the program's name; this process's own if None.
        replaced: commands to use instead of those with the same names.
    """
    options = GlobalOptions(replaced=replaced or {})
    try:
        result = cli.main(args=argv, prog_name=PROGRAM, standalone_mode=False, obj=options)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else PROGRAM
        _print_error(f"{error.format_message().rstrip('.')}; see '{where} --help'", error.exit_code)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except FailoverError as error:
        text = str(error) if error.hint is None else f"{error}\n{error.hint}"
        _print_error(text, error.exit_code, debug=options.debug)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the outermost layer: nothing else turns it into a line
        text = " ".join(str(error).split()) or "no message"
        _print_error(
            f"{type(error).__name__}: {text}: this is a fault of {PROGRAM} {__version__}; please"
            f" report it with the output of '{PROGRAM} --debug ...'",
            ExitCode.INTERNAL,
            debug=options.debug,
        )
        return ExitCode.INTERNAL
    return result if isinstance(result, int) else ExitCode.OK


def _print_error(text: str, exit_code: int, *, debug: bool = False) -> None:
    """One line on stderr for each fault."""
    from agent.ops.logs import format_fatal_error  # noqa: PLC0415 - --version and --help do without

    if debug:
        traceback.print_exc()
    for line in text.splitlines():
        click.echo(format_fatal_error(f"{PROGRAM}: error: {line}", exit_code), err=True)
