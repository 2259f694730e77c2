"""``failover-agent run``: the agent. Its flags and its help are cli/reader.py's."""

import click

from agent.cli.apart import Words, start
from agent.cli.main import Wishes
from agent.ops.signals import ignored_signals


@click.command("run", cls=Words)
@click.pass_obj
def command(wishes: Wishes, words: tuple[str, ...]) -> int:
    """Be a member of a group: heartbeat, follow the role, run the hooks."""
    with ignored_signals():
        return start(("run", *words), debug=wishes.debug)
