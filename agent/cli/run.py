"""``failover-agent run``: the agent. Its flags and its help are in settings_reader.py."""

import click

from agent.cli.main import COMMANDS, GlobalOptions
from agent.cli.settings_process import UnparsedCommand, run_agent
from agent.ops.signals import ignored_signals


def agent_command(name: str) -> click.Command:
    """A command that runs an agent, by the name that its flags and its help are found under."""

    @click.command(name, cls=UnparsedCommand, help=COMMANDS[name])
    @click.pass_obj
    def run(options: GlobalOptions, arguments: tuple[str, ...]) -> int:
        with ignored_signals():
            return run_agent((name, *arguments), debug=options.debug)

    return run


command = agent_command("run")
