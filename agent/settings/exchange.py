"""Agent settings as a JSON document: how they cross from one process to another.

Every value goes by its name, and the document carries the version of the program that wrote it. Another
version may have other settings, so a document of another version is refused as a whole: reading it by
position, or half of it, could make the demotion hook the promotion hook.

Owns the form of the document. Knows nothing of what a setting means, and checks no ranges: the process
that wrote the document has done that.
"""

import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from agent import __version__
from agent.errors import ConfigError, ExitCode
from agent.settings.values import AgentSettings


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
        settings: AgentSettings = _from_json(given["settings"], AgentSettings, "settings")
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


def _from_json(given: Any, wanted: Any, where: str) -> Any:
    """Read one value of a type of settings/values.py. Raises ValueError or TypeError."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in {Union, types.UnionType}:
        return _from_json(given, _member(given, arguments, where), where)
    if origin is tuple:
        _check(given, list, where)
        return tuple(_from_json(item, arguments[0], where) for item in given)
    if origin is Literal:
        if given not in arguments:
            raise ValueError(f"{where} is {given!r}")
        return given
    if is_dataclass(wanted):
        make: Any = wanted
        _check(given, dict, where)
        hints = get_type_hints(wanted)
        if given.keys() != hints.keys():
            names = sorted(given.keys() ^ hints.keys())
            raise ValueError(f"{where} has other settings than expected: {', '.join(names)}")
        return make(**{name: _from_json(given[name], hint, name) for name, hint in hints.items()})
    if origin is not None:  # a mapping of strings
        _check(given, dict, where)
        return {str(key): str(item) for key, item in given.items()}
    if isinstance(wanted, type) and issubclass(wanted, tuple):  # a NamedTuple
        _check(given, list, where)
        return wanted(*given)
    if wanted is Path:
        _check(given, str, where)
        return Path(given)
    _check(given, (int, float) if wanted is float else wanted, where)
    return given


def _member(given: Any, members: tuple[Any, ...], where: str) -> Any:
    """Which type of a union a value is of: None, a table by its ``type``, or the only other one."""
    if given is None and type(None) in members:
        return type(None)
    others = [member for member in members if member is not type(None)]
    if len(others) == 1:
        return others[0]
    kind = given["type"] if isinstance(given, dict) else None
    for member in others:
        if is_dataclass(member) and kind in get_args(get_type_hints(member)["type"]):
            return member
    raise ValueError(f"{where} is of the unknown type {kind!r}")


def _check(given: Any, wanted: Any, where: str) -> None:
    if not isinstance(given, wanted):
        raise TypeError(f"{where} is {given!r}")
