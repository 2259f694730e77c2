"""``failover-agent check-config``: validate and print the effective configuration; nothing is started."""

import json
from collections.abc import Iterator
from typing import Any

import click

from agent.cli.explain_timing import timing_parts
from agent.cli.options import CONFIG_FLAG, JSON_FLAG, load_agent, sources
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.fields import Settings, is_unset, settings_of
from agent.schema.read import Sources
from agent.schema.settings import AgentSettings
from agent.schema.toml import to_json, to_toml


@click.command("check-config")
@CONFIG_FLAG
@click.option("--coordinator", is_flag=True, help="Check the settings of serve, instead of run.")
@JSON_FLAG
def command(*, coordinator: bool, as_json: bool, **given: Any) -> int:
    """Validate and print the effective configuration; start nothing.

    Reads the file and the environment as 'run' would (as 'serve' would with --coordinator), checks
    the timings, the hooks, and the files with secrets and certificates, and prints each setting
    with its origin, and how long a stop may take. The text is TOML. Exits 0, or with the code
    of the first fault (docs/exit-codes.md).
    """
    settings: Settings
    origin: Sources[Any]
    timing: dict[str, float] = {}
    if coordinator:
        origin = sources(CoordinatorSettings, given)
        from agent.coordinator import access, cluster  # noqa: PLC0415 - not needed to check an agent

        settings = loaded = origin.load()
        access.load(loaded)
        cluster.connect(loaded)
    else:
        origin = sources(AgentSettings, given)
        settings = agent = load_agent(origin)
        from agent.daemon.stop_budget import longest_stop_s  # noqa: PLC0415 - not needed to report a fault
        from agent.drivers.rest.configured import load_server_access  # noqa: PLC0415 - likewise
        from agent.ops.probe_access import warn_of_exposure  # noqa: PLC0415 - likewise

        load_server_access(agent)
        if warning := warn_of_exposure(agent):
            click.echo(f"warning: probe_listen: {agent.probe_listen}: {warning}", err=True)

        if agent.failsafe_listen is not None:
            from agent.drivers.failsafe import access as failsafe  # noqa: PLC0415 - likewise

            failsafe.load_failsafe_access(agent)
            if warning := failsafe.warn_of_shared_url(agent):
                click.echo(f"warning: failsafe_url: {agent.member_url}: {warning}", err=True)

        timing = timing_parts(agent.timing)
        timing["longest_stop_s"] = longest_stop_s(agent, agent.timing)
    if as_json:
        click.echo(json.dumps(_document(settings, origin, timing), indent=2))
    else:
        click.echo("\n".join(_lines(settings, origin, timing)))
    return 0


def _values(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Each setting with its value, in the form that a file would have it."""
    for setting in settings_of(type(settings)):
        value = getattr(settings, setting.name)
        yield setting.name, setting.format.none if value is None else value


def _document(settings: Settings, origin: Sources[Any], timing: dict[str, float]) -> dict[str, Any]:
    document: dict[str, Any] = {
        "settings": {
            key: {"value": to_json(value), "from": origin.origin(key)}
            for key, value in _values(settings)
        }
    }
    return {**document, "timing": timing} if timing else document


def _lines(settings: Settings, origin: Sources[Any], timing: dict[str, float]) -> list[str]:
    lines = [
        f"# {key} is not set"
        if is_unset(value)
        else f"{key} = {to_toml(value)}  # from {origin.origin(key)}"
        for key, value in _values(settings)
    ]
    if not timing:
        return lines
    stop_s = timing.pop("longest_stop_s")
    parts = ", ".join(f"{name.removesuffix('_s')} {value:g} s" for name, value in timing.items())
    stop = f"# a stop takes at most {stop_s:g} s: the service manager has to wait that long"
    return [*lines, f"# timing (R1) holds: {parts}", f"{stop} (TimeoutStopSec=)"]
