"""``failover-agent run``: the agent. Its flags and its help are in settings_reader.py."""

import click

from agent.cli.main import GlobalOptions
from agent.cli.settings_process import UnparsedCommand, run_agent
from agent.ops.signals import ignored_signals


@click.command("run", cls=UnparsedCommand)
@click.pass_obj
def command(options: GlobalOptions, arguments: tuple[str, ...]) -> int:
    """Be a member of a group: heartbeat, follow the role, run the hooks."""
    with ignored_signals():
        return run_agent(("run", *arguments), debug=options.debug)
