"""The command line: which commands there are, and what the shell is told when one fails.

Owns the last word on every error: one line for each fault on stderr, an exit code of
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
"""What shells report for a program that Ctrl-C ended: 128 + SIGINT."""

COMMANDS = {
    "run": "Be a member of a group: heartbeat, follow the role, run the hooks.",
    "exec": "Run a command only while this member is primary.",
    "serve": "Be the coordinator that the agents ask.",
    "check-config": "Say what is in force, or what is wrong, and start nothing.",
    "explain-timing": "Draw how the failover timeout is divided (rule R1).",
    "status": "Who is primary in a group, and who else is there.",
    "healthcheck": "Ask a running agent whether it is well; for containers.",
    "demo": "Two agents on this machine: a power cut, a crash, a handover, a frozen host.",
    "hooks": "Look at the hooks, and try one without a group.",
    "groups": "List, create, show and delete groups.",
    "hash-password": "Print the line of a user for the coordinator's users file.",
}
"""Every command with its line of help. ``a-b`` is ``command`` in agent/cli/a_b.py: add both here."""


@dataclass(slots=True)
class Wishes:
    """What was said before the command's name, and the commands that are others than usual."""

    debug: bool = False
    own: Mapping[str, click.Command] = field(default_factory=dict)


class _LazyGroup(click.Group):
    """Imports a command when it is called, not to list it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = ctx.obj.own if isinstance(ctx.obj, Wishes) else {}
        if cmd_name in own:
            return own[cmd_name]
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
def cli(wishes: Wishes, *, debug: bool) -> None:
    """Exactly one active member in a group of hosts.

    Settings come from flags, else from the environment (FAILOVER_AGENT_..., FAILOVER_COORDINATOR_...),
    else from the TOML file that --config names. Exit codes are listed in docs/exit-codes.md.
    """
    wishes.debug = debug


def main(argv: Sequence[str] | None = None, own: Mapping[str, click.Command] | None = None) -> int:
    """Run one command line; the exit code. Prints every error, raises none.

    Args:
        argv: without the program's name; this process's own if None.
        own: commands that stand in for those of their names.
    """
    wishes = Wishes(own=own or {})
    try:
        result = cli.main(args=argv, prog_name=PROGRAM, standalone_mode=False, obj=wishes)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else PROGRAM
        _complain(f"{error.format_message().rstrip('.')}; see '{where} --help'", error.exit_code)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except FailoverError as error:
        text = str(error) if error.hint is None else f"{error}\n{error.hint}"
        _complain(text, error.exit_code, debug=wishes.debug)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the outermost layer: nothing else turns it into a line
        text = " ".join(str(error).split()) or "no message"
        _complain(
            f"{type(error).__name__}: {text}: this is a fault of {PROGRAM} {__version__}; please"
            f" report it with the output of '{PROGRAM} --debug ...'",
            ExitCode.INTERNAL,
            debug=wishes.debug,
        )
        return ExitCode.INTERNAL
    return result if isinstance(result, int) else ExitCode.OK


def _complain(text: str, exit_code: int, *, debug: bool = False) -> None:
    """One line on stderr for each fault."""
    from agent.ops.logs import format_fatal_error  # noqa: PLC0415 - --version and --help do without

    if debug:
        traceback.print_exc()
    for line in text.splitlines():
        click.echo(format_fatal_error(f"{PROGRAM}: error: {line}", exit_code), err=True)
