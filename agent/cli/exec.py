"""``failover-agent exec``: the agent, with a command that runs only while this member is primary.

Its flags and its help are cli/reader.py's.
"""

import click

from agent.cli.apart import Words, start
from agent.cli.main import Wishes
from agent.ops.signals import ignored_signals


@click.command("exec", cls=Words)
@click.pass_obj
def command(wishes: Wishes, words: tuple[str, ...]) -> int:
    """Run a command only while this member is primary."""
    with ignored_signals():
        return start(("exec", *words), debug=wishes.debug)
