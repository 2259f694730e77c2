"""``failover-agent serve``: the coordinator."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import click

from agent.cli.options import settings_flags, sources
from agent.ops.signals import ignored_signals
from agent.schema.coordinator_settings import CoordinatorSettings


@click.command("serve")
@settings_flags(CoordinatorSettings)
@click.option(
    "--restored",
    is_flag=True,
    help="Declare that the store was restored from an older copy: in its groups nobody becomes primary"
    " before 'failsafe lift' of that group, in new groups before 'store trust'. Only for the first start"
    " after the restore.",
)
def command(*, restored: bool, **given: Any) -> int:
    """Run the coordinator.

    Runs until SIGTERM or SIGINT. Leases and groups are stored in the data directory, and are still in
    force after a restart.
    """
    with ignored_signals():
        read = partial(_read, given)
        settings = read()
        from agent.coordinator.server import run  # noqa: PLC0415 - not needed to report a fault

        return run(settings, read, restored=restored)


def _read(given: Mapping[str, Any]) -> CoordinatorSettings:
    return sources(CoordinatorSettings, given).load()
