"""``failover-agent exec``: the agent, with a command that runs only while this member is primary."""

from typing import Any

import click

from agent.cli.options import settings_flags
from agent.cli.run import start
from agent.settings import AgentSettings, describe

FLAGS = [setting.key for setting in describe(AgentSettings) if setting.key != "workload"]


@click.command("exec", context_settings={"ignore_unknown_options": False})
@settings_flags(AgentSettings, only=FLAGS)
@click.argument("words", metavar="-- COMMAND [ARGS]...", nargs=-1, required=True)
def command(words: tuple[str, ...], **given: Any) -> int:
    """Run COMMAND only while this member is primary.

    It is started at a promotion and stopped at a demotion (TERM, then KILL within the demotion's
    budget), in its own process group, with the FAILOVER_ variables that a hook has. Its output is
    left alone. When it ends by itself --workload-restart says whether it is started again; if not,
    the agent gives the role back and ends with its exit code (128 + n for signal n).
    """
    return start({**given, "workload": words})
