"""Pass agent settings from one process to another, as a JSON document.

Every value has its name, and the document has the version of the program that wrote it. Another version may have
other settings, so its document is refused as a whole: reading a part of it could take the demotion hook for the
promotion hook.

Owns the form of the document. Knows no meaning of a setting, and checks no ranges, as the process that wrote the
document has done that.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from msgspec import ValidationError, convert

from agent import __version__
from agent.errors import ConfigError, ExitCode
from agent.schema.fields import Setting, settings_of
from agent.schema.settings import AgentSettings


def dump(settings: AgentSettings) -> bytes:
    """Write settings as a document that ``load`` reads."""
    return json.dumps({"version": __version__, "settings": settings}, default=_to_json).encode()


def dump_error(error: ConfigError, state_file: object) -> bytes:
    """Write a document with the error that settings could not be read, and the state file that was given."""
    given = {"version": __version__, "error": str(error), "exit_code": int(error.exit_code)}
    return json.dumps({**given, "state_file": str(state_file or "")}).encode()


def load(document: bytes) -> AgentSettings:
    """Read the settings of a document.

    Raises:
        ConfigError: the error of ``dump_error``; or the document is of another version, or not one that
            ``dump`` has written.
    """
    try:
        given = json.loads(document)  # not by msgspec: a path or an argument need not be UTF-8
        if (version := given["version"]) != __version__:
            raise ValueError(f"version {version} wrote it, {__version__} reads it")  # noqa: TRY301 - caught below
        if "error" in given:
            code, state_file = ExitCode(given["exit_code"]), given["state_file"]
            raise ConfigError(given["error"], exit_code=code, state_file=state_file)
        settings: AgentSettings = _table(given["settings"], AgentSettings)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"the settings document cannot be read ({type(error).__name__}: {error}): the installed"
            " program differs from the running one; restart to use it",
            exit_code=ExitCode.INTERNAL,
        ) from error
    return settings


def _to_json(value: Any) -> Any:
    """Convert a path or a table; all other values have a JSON type."""
    if isinstance(value, Path):
        return str(value)
    return {item.name: getattr(value, item.name) for item in fields(value)}


def _table(given: Any, declared: type[Any]) -> Any:
    """Read the settings of one class. Raises as ``load`` catches, as all functions below."""
    values = convert(given, dict[str, Any])
    settings = settings_of(declared)
    if differing := values.keys() ^ {setting.name for setting in settings}:
        raise ValueError(f"{declared.__name__} has other settings: {', '.join(sorted(differing))}")
    return declared(
        **{setting.name: _setting(values[setting.name], setting) for setting in settings}
    )


def _setting(given: Any, setting: Setting) -> Any:
    tables = setting.tables
    if tables is not None and given is not None:
        many = convert([given] if tables.most is None else given, list[dict[str, Any]])
        read = tuple(_table(one, tables.load(one.get("type", ""))) for one in many)
        return read[0] if tables.most is None else read
    try:
        return convert(given, setting.annotation, dec_hook=lambda path, text: path(text))
    except ValidationError as error:
        raise ValueError(f"{setting.name}: {error}") from None
