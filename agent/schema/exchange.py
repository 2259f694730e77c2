"""Agent settings as a JSON document: how they pass from one process to another.

Every value goes by its name, and the document carries the version of the program that wrote it. Another
version may have other settings, so a document of another version is refused as a whole: reading it by
position, or half of it, could make the demotion hook the promotion hook.

Owns the form of the document. Knows no meaning of a setting, and checks no ranges: the process that wrote
the document has done that.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from agent import __version__
from agent.errors import ConfigError, ExitCode
from agent.schema.fields import Setting, Tables, settings_of
from agent.schema.settings import AgentSettings


def dump(settings: AgentSettings) -> bytes:
    """Write settings as a document that ``load`` reads."""
    return json.dumps({"version": __version__, "settings": _to_json(settings)}).encode()


def dump_error(error: ConfigError) -> bytes:
    """Write, in place of settings, why they could not be read."""
    return json.dumps(
        {"version": __version__, "error": str(error), "exit_code": int(error.exit_code)}
    ).encode()


def load(document: bytes) -> AgentSettings:
    """Read the settings of a document.

    Raises:
        ConfigError: the error of ``dump_error``; or the document is of another version, or not one that
            ``dump`` has written.
    """
    try:
        given = json.loads(document)
        check_version(given["version"])
        if "error" in given:
            raise ConfigError(given["error"], exit_code=ExitCode(given["exit_code"]))
        settings: AgentSettings = _table(given["settings"], AgentSettings, "settings")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"the settings document cannot be read ({type(error).__name__}: {error}): the installed"
            " program differs from the running one; restart to use it",
            exit_code=ExitCode.INTERNAL,
        ) from error
    return settings


def check_version(installed: str) -> None:
    """Refuse what another version of the program has written.

    Raises:
        ConfigError: the versions differ.
    """
    if installed != __version__:
        raise ConfigError(
            f"installed version {installed} differs from the running {__version__}: restart to use it",
            exit_code=ExitCode.INTERNAL,
        )


def _to_json(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _to_json(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _table(given: Any, declared: type[Any], where: str) -> Any:
    """Read the settings of one class. Raises ValueError, TypeError or KeyError, as all below."""
    _check(given, dict, where)
    settings = settings_of(declared)
    if differing := given.keys() ^ {setting.name for setting in settings}:
        names = ", ".join(sorted(differing))
        raise ValueError(f"{where} has other settings than expected: {names}")
    return declared(
        **{setting.name: _setting(given[setting.name], setting) for setting in settings}
    )


def _setting(given: Any, setting: Setting) -> Any:
    if given is None and setting.value_type != setting.annotation:
        return None
    if setting.tables is None:
        return _value(given, setting.value_type, setting.name)
    if setting.tables.most is None:
        return _kind(given, setting.tables)
    _check(given, list, setting.name)
    return tuple(_kind(table, setting.tables) for table in given)


def _kind(given: Any, tables: Tables) -> Any:
    """Read a table of the kind that it names."""
    _check(given, dict, tables.key)
    kind = given.get("type", "")
    if kind not in tables.kinds:
        raise ValueError(f"{tables.key} is of the unknown type {kind!r}")
    return _table(given, tables.load(kind), tables.key)


def _value(given: Any, wanted: Any, where: str) -> Any:
    """Read a value that is no table."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is tuple:
        _check(given, list, where)
        return tuple(_value(item, arguments[0], where) for item in given)
    if origin is Literal:
        if given not in arguments:
            raise ValueError(f"{where} is {given!r}")
        return given
    if origin is not None:  # a mapping of strings
        _check(given, dict, where)
        return {str(key): str(item) for key, item in given.items()}
    if issubclass(wanted, tuple):  # a NamedTuple
        _check(given, list, where)
        return wanted(*given)
    if wanted is Path:
        _check(given, str, where)
        return Path(given)
    _check(given, (int, float) if wanted is float else wanted, where)
    return given


def _check(given: Any, wanted: Any, where: str) -> None:
    if not isinstance(given, wanted):
        raise TypeError(f"{where} is {given!r}")
