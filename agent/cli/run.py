"""``failover-agent run``: the agent."""

from collections.abc import Mapping
from typing import Any

import click

from agent.cli.options import load_agent, settings_flags, sources
from agent.settings import AgentSettings


@click.command("run")
@settings_flags(AgentSettings)
def command(**given: Any) -> int:
    """Be a member of a group: heartbeat, follow the role, run the hooks.

    Runs until SIGTERM or SIGINT, then demotes, gives the role back and leaves the group. Nothing is
    needed but a group and a coordinator: 'failover-agent run --group demo' finds one on this machine.
    """
    return start(given)


def start(given: Mapping[str, Any]) -> int:
    """Run the agent with the settings that were given; SIGHUP reads the rest of them anew."""

    def reread() -> AgentSettings:
        return load_agent(sources(AgentSettings, given))

    settings = reread()
    from agent.daemon import run  # noqa: PLC0415 - wrong settings are told without importing it

    return run(settings, reread)
