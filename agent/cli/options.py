"""Flags made from the settings models, and settings made from the flags.

Owns the one way in which a command gets its settings. A flag's value is passed on as the string that
was typed: agent/settings reads and refuses it, so that flag, variable and file are told the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from agent.errors import ConfigError
from agent.settings import AgentSettings
from agent.settings.describe import Described, describe
from agent.settings.models import AgentForm, CoordinatorSettings, Settings
from agent.settings.sources import Sources
from agent.settings.values import Broker, CommandProgress, ExecCheck, MqttProgress

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound=Settings)

TIMING_KEYS = ("failover_timeout", "renew", "demote", "margin", "beat", "request_timeout")

HOOK_KEYS = (
    "hook_user",
    "hook_group",
    "hook_directory",
    "webhook_secret_file",
    "webhook_ca_file",
)
"""Of what ``load_specs`` can refuse beyond a single hook."""

CLIENT_KEYS = (
    "endpoint",
    "username",
    "password_file",
    "client_id",
    "client_secret_file",
    "token_endpoint",
    "ca_file",
    "request_timeout",
)
"""What it takes to ask a coordinator, for commands that only ask."""

CONFIG_FLAG = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file with settings; a flag or a variable goes before it.",
)
JSON_FLAG = click.option(
    "--json", "as_json", is_flag=True, help="One JSON document instead of text for people."
)


def settings_flags(model: type[Settings], only: Sequence[str] | None = None) -> Callable[[F], F]:
    """A decorator that gives a command ``--config`` and a flag for each setting (or for ``only``)."""

    def decorate(function: F) -> F:
        for setting in reversed(describe(model)):
            if only is None or setting.key in only:
                function = _flag(setting)(function)
        return CONFIG_FLAG(function)

    return decorate


def _flag(setting: Described) -> Callable[[F], F]:
    default = f" [default: {setting.default}]" if setting.default else ""
    if setting.switch:
        name = f"{setting.flag}/--no-{setting.flag.removeprefix('--')}"
        return click.option(name, setting.key, default=None, help=setting.meaning)
    return click.option(
        setting.flag,
        setting.key,
        multiple=setting.repeatable,
        metavar=setting.metavar,
        help=setting.meaning + default,
    )


def sources(model: type[S], given: Mapping[str, Any]) -> Sources[S]:
    """All sources of the settings, for the arguments that click gave to a command."""
    flags = {
        key: value
        for key, value in given.items()
        if key in model.model_fields and value not in (None, ())
    }
    return Sources.read(model, flags, given.get("config"))


def settings_of(given: Mapping[str, Any]) -> AgentSettings:
    """The agent's settings, for commands that start no agent. Raises ConfigError."""
    return sources(AgentForm, given).load().value()


def load_agent(origin: Sources[AgentForm]) -> AgentForm:
    """Settings that ``run`` may start with: with a group, a budget that holds (R1), and fit hooks.

    Raises:
        ConfigError: one line for each fault, with the exit code of the first.
    """
    form = origin.load()
    faults: list[ConfigError] = []
    for keys, check in _checks_of(form.value()):
        try:
            check()
        except ConfigError as error:
            faults.append(_placed(error, origin, keys))
    if faults:
        raise ConfigError("\n".join(map(str, faults)), exit_code=faults[0].exit_code)
    return form


def _checks_of(settings: AgentSettings) -> Iterator[tuple[Sequence[str], Callable[[], object]]]:
    """What has to hold beyond each value's form, with the keys that it is about."""
    from agent.drivers.hooks import check_hook as checked  # noqa: PLC0415 - not needed by every command
    from agent.drivers.hooks import load_specs  # noqa: PLC0415 - likewise
    from agent.drivers.workload import check_workload  # noqa: PLC0415 - likewise

    check_hook = partial(checked, writable_directories=settings.hook_directories_writable)
    yield (), partial(_check_group, settings)
    yield TIMING_KEYS, lambda: settings.timing
    yield HOOK_KEYS, partial(load_specs, settings)
    with suppress(ConfigError):  # it was told by the line before
        for event, spec in load_specs(settings).items():
            yield (f"hook_{event}",), spec.check
    for check in settings.check:
        if isinstance(check, ExecCheck):
            yield ("check",), partial(check_hook, f"check {check.name}", check.command)
    if isinstance(settings.progress, CommandProgress):
        yield ("progress",), partial(check_hook, "progress", settings.progress.command)
    if isinstance(settings.progress, MqttProgress):
        yield ("progress",), partial(_check_mqtt, settings.progress, "progress")
    if settings.mqtt is not None:
        yield ("mqtt",), partial(_check_mqtt, settings.mqtt, "mqtt")
    if settings.workload:
        yield ("workload",), partial(check_workload, settings.workload)
    if settings.fence_command:
        yield ("fence_command",), partial(check_hook, "fence_command", settings.fence_command)


def _check_mqtt(table: Broker, where: str) -> None:
    from agent.ops.mqtt import load_access  # noqa: PLC0415 - needs the extra

    load_access(table, where)


def _check_group(settings: AgentSettings) -> None:
    if not settings.group:
        right = "name one with --group, FAILOVER_AGENT_GROUP, or group in a configuration file"
        raise ConfigError(f"group is not set: {right}")


def load_coordinator(origin: Sources[CoordinatorSettings]) -> CoordinatorSettings:
    """Settings that ``serve`` may start with. Raises ConfigError as ``load_agent`` does."""
    return origin.load()


def _placed(error: ConfigError, origin: Sources[AgentForm], keys: Sequence[str]) -> ConfigError:
    """The same error, with where the settings that it speaks of were given."""
    places = [f"{key}: {origin.origin(key)}" for key in keys if origin.origin(key) != "default"]
    where = f" ({', '.join(places)})" if places else ""
    return ConfigError(f"{error}{where}", exit_code=error.exit_code)
