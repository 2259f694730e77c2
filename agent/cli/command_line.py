"""The command line: which commands there are.

Knows nothing of what a command does; a command is imported when it is called, so that ``--version`` and
``--help`` are quick.
"""

import importlib
from collections.abc import Mapping, Sequence
from itertools import takewhile

import click

from agent import __version__
from agent.cli.main import AGENTS, DEBUG, INTERRUPTED, PROGRAM
from agent.errors import ConfigError, ExitCode

COMMANDS = {
    "run": "Join a group: send heartbeats, follow the role, run the hooks.",
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
    "failsafe": "Lift the restriction that failsafe has put on a group.",
    "store": "Copy the store of coordinators, back it up, or trust a restored one.",
    "hash-password": "Print a user's line for the coordinator's users file.",
}
"""Every command with its line of help. ``a-b`` is ``command`` in agent/cli/a_b.py: add both here."""


class _LazyGroup(click.Group):
    """Imports a command when it is called, not to list it. ``ctx.obj`` has replacements of commands, by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in ctx.obj:
            replacement = ctx.obj[cmd_name]
            assert isinstance(replacement, click.Command)  # noqa: S101 - our own mistake
            return replacement
        if cmd_name not in COMMANDS or cmd_name in AGENTS:
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
@click.option(DEBUG, is_flag=True, expose_value=False, help="Show the traceback of an error.")
def cli() -> None:
    """Exactly one active member in a group of hosts.

    Settings come from flags, else from the environment (FAILOVER_AGENT_..., FAILOVER_COORDINATOR_...),
    else from the TOML file that --config names. Exit codes are listed in docs/exit-codes.md.
    """


def run_command(arguments: Sequence[str], replacements: Mapping[str, click.Command]) -> int:
    """Run the command that the arguments name; return the exit code. Raises ConfigError if they are wrong.

    Args:
        arguments: without the program's name.
        replacements: commands to use instead of those with the same names.
    """
    try:
        result = cli.main(
            args=list(arguments), prog_name=PROGRAM, standalone_mode=False, obj=replacements
        )
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        words = takewhile(lambda word: not word.startswith("-"), arguments)
        where = context.command_path if context else " ".join((PROGRAM, *words))
        text = f"{error.format_message().rstrip('.')}; see '{where} --help'"
        raise ConfigError(text, exit_code=ExitCode(error.exit_code)) from error
    except click.Abort:
        return INTERRUPTED
    return result if isinstance(result, int) else ExitCode.OK
