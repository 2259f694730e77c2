"""``failover-agent exec``: the agent, with a command that runs only while this member is primary.

Its flags and its help are in settings_reader.py.
"""

import click

from agent.cli.main import GlobalOptions
from agent.cli.settings_process import UnparsedCommand, run_agent
from agent.ops.signals import ignored_signals


@click.command("exec", cls=UnparsedCommand)
@click.pass_obj
def command(options: GlobalOptions, arguments: tuple[str, ...]) -> int:
    """Run a command only while this member is primary."""
    with ignored_signals():
        return run_agent(("exec", *arguments), debug=options.debug)
