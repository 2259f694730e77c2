"""``failover-agent check-config``: what is in force, or what is wrong; nothing is started."""

import json
from dataclasses import asdict
from typing import Any

import click

from agent.cli.options import CONFIG_FLAG, JSON_FLAG, load_agent, load_coordinator, sources
from agent.settings.describe import describe, toml
from agent.settings.models import AgentForm, CoordinatorSettings, Settings
from agent.settings.sources import Sources


@click.command("check-config")
@CONFIG_FLAG
@click.option("--coordinator", is_flag=True, help="Check what serve would take, instead of run.")
@JSON_FLAG
def command(*, coordinator: bool, as_json: bool, **given: Any) -> int:
    """Say what is in force, or what is wrong, and start nothing.

    Reads the file and the environment as 'run' would (as 'serve' would with --coordinator), checks
    the timings and the hooks, and prints each setting with where it is from, and how long a stop may
    take. The text is TOML. Exits 0, or with the code of the first fault (docs/exit-codes.md).
    """
    settings: Settings
    origin: Sources[Any]
    timing: dict[str, float] = {}
    if coordinator:
        origin = sources(CoordinatorSettings, given)
        settings = load_coordinator(origin)
    else:
        origin = sources(AgentForm, given)
        settings = form = load_agent(origin)
        from agent.daemon.stop_budget import longest_stop_s  # noqa: PLC0415 - wrong settings are told without it

        told = form.value()
        timing = asdict(told.timing)
        timing["longest_stop_s"] = longest_stop_s(told, told.timing)
    if as_json:
        click.echo(json.dumps(_document(settings, origin, timing), indent=2))
    else:
        click.echo("\n".join(_lines(settings, origin, timing)))
    return 0


def _document(settings: Settings, origin: Sources[Any], timing: dict[str, float]) -> dict[str, Any]:
    values = settings.model_dump(mode="json")
    document: dict[str, Any] = {
        "settings": {
            key: {"value": value, "from": origin.origin(key)} for key, value in values.items()
        }
    }
    return {**document, "timing": timing} if timing else document


def _lines(settings: Settings, origin: Sources[Any], timing: dict[str, float]) -> list[str]:
    lines = []
    for setting in describe(type(settings)):
        value = getattr(settings, setting.key)
        if setting.key == "probe_listen" and value is None:
            value = "off"
        if value in (None, "", ()):
            lines.append(f"# {setting.key} is not set")
        else:
            lines.append(f"{setting.key} = {toml(value)}  # from {origin.origin(setting.key)}")
    if not timing:
        return lines
    stop_s = timing.pop("longest_stop_s")
    parts = ", ".join(f"{name.removesuffix('_s')} {value:g} s" for name, value in timing.items())
    stop = f"# a stop takes at most {stop_s:g} s: whatever stops the agent must wait so long"
    return [*lines, f"# timing (R1) holds: {parts}", f"{stop} (TimeoutStopSec=)"]
