"""``failover-agent serve``: the coordinator."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import click

from agent.cli.options import load_coordinator, settings_flags, sources
from agent.ops.signals import ignored_signals
from agent.settings.models import CoordinatorSettings


@click.command("serve")
@settings_flags(CoordinatorSettings)
def command(**given: Any) -> int:
    """Be the coordinator that the agents ask.

    Runs until SIGTERM or SIGINT. What it promised is in the data directory, and is still true when
    it is started again.
    """
    with ignored_signals():
        read = partial(_read, given)
        settings = read()
        from agent.coordinator.server import run  # noqa: PLC0415 - wrong settings are told without it

        return run(settings, read)


def _read(given: Mapping[str, Any]) -> CoordinatorSettings:
    return load_coordinator(sources(CoordinatorSettings, given))
