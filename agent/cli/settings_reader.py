"""The process that reads the settings of an agent, on behalf of the one that runs it (settings_process.py).

Owns the flags of ``run`` and ``exec``, and their help.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from agent.cli.main import main as command_line
from agent.cli.options import load_agent, settings_flags, sources
from agent.errors import ConfigError
from agent.schema import exchange
from agent.schema.fields import settings_of
from agent.schema.settings import AgentSettings

Handler = Callable[[Mapping[str, Any]], int]


def main(descriptor: int, arguments: Sequence[str]) -> int:
    """Write the settings that the arguments give, or the error in them; return the exit code.

    A usage error, or a request for help, is answered on the terminal: nothing is written.
    """

    def write(given: Mapping[str, Any]) -> int:
        os.write(descriptor, _document(given))
        return 0

    return command_line(arguments, commands(write))


def _document(given: Mapping[str, Any]) -> bytes:
    origin = sources(AgentSettings, {**given, "config": None})
    try:
        origin = sources(AgentSettings, given)
        return exchange.dump(load_agent(origin))
    except ConfigError as error:
        values = {**origin.file, **origin.environment, **origin.flags}
        return exchange.dump_error(error, values.get("state_file"))


def commands(handler: Handler) -> dict[str, click.Command]:
    """``run`` and ``exec`` with all their flags; ``handler`` is called with the parsed arguments."""
    return {command.name or "": command for command in (_run(handler), _exec(handler))}


def _run(handler: Handler) -> click.Command:
    @click.command("run")
    @settings_flags(AgentSettings)
    def command(**given: Any) -> int:
        """Join a group: send heartbeats, follow the role, run the hooks.

        Runs until SIGTERM or SIGINT, then demotes, releases the role and leaves the group. Needs only
        a group and a coordinator: 'failover-agent run --group demo' uses the one on this machine.
        """
        return handler(given)

    return command


def _exec(handler: Handler) -> click.Command:
    names = [setting.name for setting in settings_of(AgentSettings) if setting.name != "workload"]

    @click.command("exec")
    @settings_flags(AgentSettings, names)
    @click.argument("workload", metavar="-- COMMAND [ARGS]...", nargs=-1, required=True)
    def command(**given: Any) -> int:
        """Run COMMAND only while this member is primary.

        It is started at a promotion and stopped at a demotion (TERM, then KILL within the demotion's
        budget), in its own process group, with the FAILOVER_ variables that a hook has. Its output is
        not captured. When it ends by itself --workload-restart decides whether it is started again; if
        not, the agent releases the role and ends with its exit code (128 + n for signal n).
        """
        return handler(given)

    return command
