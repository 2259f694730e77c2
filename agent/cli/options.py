"""Flags derived from the declared settings, and settings read from the flags.

Owns the one way in which a command gets its settings. A flag's value is passed on as the string that was
typed: agent/schema parses and refuses it, so that flag, variable and file behave the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from agent.errors import ConfigError
from agent.schema.fields import Setting, Settings, settings_of
from agent.schema.mqtt import Broker
from agent.schema.read import Sources
from agent.schema.settings import AgentSettings
from agent.schema.toml import to_toml

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound=Settings)

REPEATED = ("endpoint", "etcd_endpoint", "host_names", "administrator")
"""Lists whose flag is repeated, with one item each time."""

TIMING_KEYS = ("failover_timeout", "renew", "demote", "margin", "beat", "request_timeout")

HOOK_KEYS = ("hook_user", "hook_group", "hook_directory", "webhook_secret_file", "webhook_ca_file")
"""Settings that concern all hooks; ``load_specs`` reports a fault of one once, not for each hook."""

CLIENT_KEYS = (
    "endpoint",
    "username",
    "password_file",
    "client_id",
    "client_secret_file",
    "token_endpoint",
    "ca_file",
    "client_certificate",
    "client_key",
    "proxy",
    "proxy_username",
    "proxy_password_file",
    "request_timeout",
)
"""Settings of a connection to a coordinator, for commands that only ask."""

CONFIG_FLAG = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file with settings; a flag or a variable overrides it.",
)
JSON_FLAG = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of text for people."
)


def settings_flags(declared: type[Settings], only: Sequence[str] | None = None) -> Callable[[F], F]:
    """A decorator that gives a command ``--config`` and a flag for each setting (or for ``only``)."""

    def decorate(function: F) -> F:
        for setting in reversed(settings_of(declared)):
            if only is None or setting.name in only:
                function = _flag(setting)(function)
        return CONFIG_FLAG(function)

    return decorate


def _flag(setting: Setting) -> Callable[[F], F]:
    if setting.annotation is bool:
        name = f"{setting.flag}/--no-{setting.flag.removeprefix('--')}"
        return click.option(name, setting.name, default=None, help=setting.doc)
    default = f" [default: {to_toml(setting.default)}]" if setting.has_default else ""
    return click.option(
        setting.flag,
        setting.name,
        multiple=setting.name in REPEATED,
        metavar=setting.format.metavar,
        help=setting.doc + default,
    )


def sources(declared: type[S], given: Mapping[str, Any]) -> Sources[S]:
    """All sources of the settings, for the arguments that click passes to a command."""
    names = {setting.name for setting in settings_of(declared)}
    flags = {key: value for key, value in given.items() if key in names and value not in (None, ())}
    return Sources(declared, flags, given.get("config"))


def load_settings(given: Mapping[str, Any]) -> AgentSettings:
    """The agent's settings, for commands that start no agent. Raises ConfigError."""
    return sources(AgentSettings, given).load()


def load_agent(origin: Sources[AgentSettings]) -> AgentSettings:
    """Settings that ``run`` may start with: with a group, a budget that holds (R1), and fit hooks.

    Raises:
        ConfigError: one line for each fault, with the exit code of the first.
    """
    settings = origin.load()
    faults: list[ConfigError] = []
    for keys, check in _checks_of(settings):
        try:
            check()
        except ConfigError as error:
            faults.append(_add_origin(error, origin, keys))
    if faults:
        raise ConfigError("\n".join(map(str, faults)), exit_code=faults[0].exit_code)
    return settings


def _checks_of(settings: AgentSettings) -> Iterator[tuple[Sequence[str], Callable[[], object]]]:
    """The checks of several settings together, each with the names of its settings."""
    from agent.drivers.hooks.check import HookCheck  # noqa: PLC0415 - not needed by every command
    from agent.drivers.hooks.spec import load_specs  # noqa: PLC0415 - not needed by every command
    from agent.drivers.workload import check_workload  # noqa: PLC0415 - likewise
    from agent.ops import probe_access  # noqa: PLC0415 - likewise

    checker = partial(HookCheck, writable_directories=settings.hook_directories_writable)
    yield (), partial(_check_group, settings)
    yield TIMING_KEYS, lambda: settings.timing
    yield probe_access.KEYS, partial(probe_access.load_probe_access, settings)
    yield HOOK_KEYS, partial(load_specs, settings)
    with suppress(ConfigError):  # which the check above reports
        for event, spec in load_specs(settings).items():
            yield (f"hook_{event}",), spec.check
    for check in settings.check:
        for argv in check.commands:
            yield ("check",), partial(checker(f"check {check.name}").check_command, argv)
    if settings.progress is not None:
        for argv in settings.progress.commands:
            yield ("progress",), partial(checker("progress").check_command, argv)
    for key in ("progress", "mqtt"):
        if isinstance(table := getattr(settings, key), Broker):
            yield (key,), partial(_check_mqtt, table, key)
    if settings.workload:
        yield ("workload",), partial(check_workload, settings.workload)
    if settings.fence_command:
        yield (
            ("fence_command",),
            partial(checker("fence_command").check_command, settings.fence_command),
        )


def _check_mqtt(table: Broker, where: str) -> None:
    from agent.ops.mqtt import load_access  # noqa: PLC0415 - needs the extra

    load_access(table, where)


def _check_group(settings: AgentSettings) -> None:
    if not settings.group:
        right = "name one with --group, FAILOVER_AGENT_GROUP, or group in a configuration file"
        raise ConfigError(f"group is not set: {right}")


def _add_origin(
    error: ConfigError, origin: Sources[AgentSettings], keys: Sequence[str]
) -> ConfigError:
    """Add to an error where the settings that it names were given."""
    places = [f"{key}: {origin.origin(key)}" for key in keys if origin.origin(key) != "default"]
    where = f" ({', '.join(places)})" if places else ""
    return ConfigError(f"{error}{where}", exit_code=error.exit_code)
