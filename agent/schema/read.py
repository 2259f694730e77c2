"""Read settings from a flag, else the environment, else a TOML file, else the default.

Owns reading and merging the sources, checking values with pydantic models that are built from the
declarations, and the sentence of each fault: where the value was given, what is wrong, and what would be right.
Knows no setting. Needs pydantic, and is imported only where settings are read. Also reports misspelt variables and
missing files, which pydantic-settings ignores.
"""

import difflib
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import pydantic
from pydantic_settings import EnvSettingsSource, SettingsConfigDict

from agent.errors import ConfigError, ExitCode
from agent.files import read_bounded
from agent.schema.fields import (
    Declared,
    DefaultFrom,
    Range,
    Setting,
    Settings,
    TableKinds,
    settings_of,
)
from agent.schema.formats import load_json, shown

D = TypeVar("D", bound=Declared)
S = TypeVar("S", bound=Settings)

MOST_FAULTS = 20
"""The most lines about the tables of one setting, so that a broken file does not fill the screen."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one setting, one table or one key of a table.

    Attributes:
        key: the setting, table or key; "" for an unknown key, which the text names.
        shown: the refused value for the message, or "" without one.
        unknown: whether a key does not exist.
        in_table: whether the text names the place within the setting's tables.
    """

    key: str
    text: str
    shown: str = ""
    unknown: bool = False
    in_table: bool = False

    def __str__(self) -> str:
        """The sentence with its place."""
        place = f"{self.key} = {self.shown}" if self.shown else self.key
        return f"{place}: {self.text}" if place else self.text


class InvalidError(ConfigError, ValueError):
    """Values are wrong, or contradict each other. ``faults`` has at least one for each wrong key."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults


def _faults_of(
    error: pydantic.ValidationError, values: Mapping[str, Any], names: Sequence[str], noun: str
) -> Iterator[Fault]:
    """The faults of each of the given values that pydantic refuses, unknown keys first."""
    seen = set()
    for fault in sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden"):
        key, *inside = map(str, fault["loc"])
        if key in seen:
            continue
        seen.add(key)
        cause = fault.get("ctx", {}).get("error")
        text = str(cause) if cause else fault["msg"].replace("Input should", "must")
        given = fault["input"] if inside else values.get(key)
        match fault["type"]:
            case "extra_forbidden":
                right = _suggest(key, names, f"it has {', '.join(names)}")
                yield Fault("", f"{noun} has no key {shown(key)}: {right}", unknown=True)
            case "missing":
                yield Fault(key, f"is missing, and {noun} needs it")
            case "path_type":
                yield Fault(key, "must be a path, as a string", shown(given))
            case _ if isinstance(cause, InvalidError):
                for inner in cause.faults:
                    yield Fault(key, str(inner), unknown=inner.unknown, in_table=True)
            case _:
                yield Fault(key, text, shown(given))


def _suggest(name: str, names: Sequence[str], otherwise: str) -> str:
    """The sentence that suggests the name probably meant; ``otherwise`` if none is similar."""
    match = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {match[0]}?" if match else otherwise


@cache
def _model_of(declared: Any) -> Any:
    """The pydantic model of a class. Only given values are checked; defaults come from the class."""
    checked: dict[str, Any] = {
        setting.name: (_annotation(setting), ... if setting.required else None)
        for setting in settings_of(declared)
    }
    config = SettingsConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        enable_decoding=False,
        env_prefix=getattr(declared, "env_prefix", ""),
    )
    return pydantic.create_model(declared.__name__, __config__=config, **checked)


model_of: Callable[[Any], Any] = (
    _model_of  # mypy takes classes for unhashable, and refuses them as keys of the cache
)


def _annotation(setting: Setting) -> Any:
    if setting.tables is not None:
        return Annotated[Any, pydantic.PlainValidator(partial(_read_tables, setting.tables))]
    form, limits, checked = setting.format, setting.markers.get(Range), setting.value_type
    if checked is str:
        checked = Annotated[str, pydantic.Field(min_length=0)]  # refuses what is not UTF-8
    if limits is not None and limits.enforced:
        least = {"gt" if limits.above else "ge": limits.least}
        checked = Annotated[checked, pydantic.Field(**least, le=limits.most)]
    if form.check is not None:
        checked = Annotated[checked, pydantic.AfterValidator(form.check)]
    if setting.value_type != setting.annotation:
        checked |= None
    if form.parse is not None:
        parse = partial(_parse, form.parse, setting)
        checked = Annotated[checked, pydantic.BeforeValidator(parse)]
    return checked


def _parse(parse: Callable[[Any], Any], setting: Setting, value: object) -> Any:
    """Parse a value in its format; None, of a setting that is not set, stays None."""
    return None if value is None and setting.default is None else parse(value)


def validate(declared: type[D], values: Mapping[str, Any], noun: str = "the configuration") -> D:
    """Build settings, or a table, from values as a file has them, or from final values; ``noun`` is for errors.

    Raises:
        InvalidError: values are wrong, or contradict each other.
    """
    names = [setting.name for setting in settings_of(declared)]
    try:
        model = model_of(declared).model_validate(dict(values))
    except pydantic.ValidationError as error:
        raise InvalidError(tuple(_faults_of(error, values, names, noun))) from None
    given = {name: getattr(model, name) for name in names if name in model.model_fields_set}
    for setting in settings_of(declared):
        if setting.name not in given and DefaultFrom in setting.markers:
            given[setting.name] = setting.markers[DefaultFrom].derive(given)
    value = declared(**given)
    if faults := tuple(Fault(key, text) for key, text in value.contradictions()):
        raise InvalidError(faults)
    return value


def _read_tables(tables: TableKinds, value: object) -> Any:
    """Parse the table, or tables, of a setting; a flag or a variable has them as JSON.

    Raises:
        ValueError: there are no tables; InvalidError if something in them is wrong.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value = load_json(value, "a table" if tables.most is None else "a list of tables")
    if tables.most is None:
        return _read_table(tables, value, tables.key)
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be tables, each under {tables.header}")  # noqa: TRY004 - for pydantic
    if len(value) > tables.most:
        raise ValueError(f"must be at most {tables.most} tables")
    return _read_list(tables, value)


def _read_list(tables: TableKinds, given: Sequence[Any]) -> tuple[Any, ...]:
    """Parse tables that have a unique name each."""
    found: list[Any] = []
    faults: list[Fault] = []
    first: dict[str, int] = {}
    for number, table in enumerate(given, 1):
        name = table.get("name") if isinstance(table, Mapping) else None
        place = f"{tables.key} {number}"
        place += f" ({shown(name)})" if isinstance(name, str) else ""
        try:
            read = _read_table(tables, table, place)
        except InvalidError as error:
            faults += error.faults
            continue
        if read.name in first:
            other = f"{tables.key} {first[read.name]} has that name already: choose another"
            faults.append(Fault(place, f"name: {other}"))
        first.setdefault(read.name, number)
        found.append(read)
    if faults:
        raise InvalidError(faults[:MOST_FAULTS])
    return tuple(found)


def _read_table(tables: TableKinds, given: object, place: str) -> Any:
    if isinstance(given, Declared):
        return given
    if not isinstance(given, Mapping):
        raise InvalidError([Fault(place, f"must be a table, under {tables.header}", shown(given))])
    kind = given.get("type") if "" not in tables.kinds else ""
    if not isinstance(kind, str) or kind not in tables.kinds:
        wrong = f"type = {shown(kind)}" if "type" in given else "type"
        raise InvalidError([Fault(place, f"{wrong}: must be one of {', '.join(tables.kinds)}")])
    noun = f"{tables.noun} of type {kind}" if kind else tables.noun
    try:
        return validate(tables.load(kind), given, noun)
    except InvalidError as error:
        faults = [Fault(place, str(fault), unknown=fault.unknown) for fault in error.faults]
        raise InvalidError(faults) from None


class Sources(Generic[S]):
    """The values that were given, and where. ``unknown`` has a sentence for each key that no setting has."""

    def __init__(
        self, declared: type[S], flags: Mapping[str, Any] | None = None, path: Path | None = None
    ) -> None:
        """Read all sources. ``flags`` are by setting name; None in them is "not given".

        Raises:
            ConfigError: the file cannot be read or is not TOML.
        """
        table = _read_file(path) if path is not None else {}
        names = [setting.name for setting in settings_of(declared)]
        self.declared, self.path = declared, path
        self.flags = {key: value for key, value in (flags or {}).items() if value is not None}
        self.environment = EnvSettingsSource(model_of(declared))()
        self.file = {key: value for key, value in table.items() if key in names}
        self.unknown = tuple(_unknown(declared.env_prefix, names, path, table))

    def origin(self, key: str) -> str:
        """The origin of the value in force: a flag, a variable, the file, or ``default``."""
        if key in self.flags:
            return "--" + key.replace("_", "-")
        if key in self.environment:
            return self.declared.env_prefix + key.upper()
        return str(self.path) if key in self.file else "default"

    def load(self) -> S:
        """The settings in force.

        Raises:
            ConfigError: something is wrong; the message has a line for each fault, and the exit code
                is the first one's.
        """
        lines = list(self.unknown)
        exit_code = ExitCode.CONFIG_UNKNOWN_KEY if lines else ExitCode.CONFIG_VALUE
        try:
            settings = validate(self.declared, {**self.file, **self.environment, **self.flags})
        except InvalidError as error:
            lines += map(self._line, error.faults)
            if error.faults[0].unknown:
                exit_code = ExitCode.CONFIG_UNKNOWN_KEY
        if lines:
            raise ConfigError("\n".join(lines), exit_code=exit_code)
        return settings

    def _line(self, fault: Fault) -> str:
        """The line of a fault, with the place where the value was given."""
        key, place = fault.key, self.origin(fault.key)
        if fault.in_table:
            return f"{place}: {fault.text}"
        if key in self.flags:
            given = self.flags[key]
            values = given if isinstance(given, tuple) else (given,)
            place = f"{place} {' '.join(map(shown, values))}"
        elif key in self.environment:
            place = f"{place}={shown(self.environment[key])}"
        elif key in self.file:
            place = f"{place}: {key} = {shown(self.file[key])}"
        else:
            place = f"{key} (default)"
        return f"{place}: {fault.text}"


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_bounded(path, 1 << 20).decode())
    except FileNotFoundError:
        reason = "there is no such file: name one that exists, or leave --config out"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte {error.start}), as TOML must be"
    except tomllib.TOMLDecodeError as error:
        reason = f"is not TOML: {error}".replace("\n", "\\n")
    except RecursionError:
        reason = "is not TOML: it nests too deeply"
    raise ConfigError(f"{path}: {reason}", exit_code=ExitCode.CONFIG_FILE)


def _unknown(
    prefix: str, names: Sequence[str], path: Path | None, table: Mapping[str, Any]
) -> Iterator[str]:
    """A sentence for each unknown key or variable; pydantic-settings ignores these variables."""
    listed = "docs/settings.md lists the settings"
    for key in [key for key in table if key not in names]:
        nested = isinstance(table[key], dict)
        otherwise = "settings stand at the top level, without [tables]" if nested else listed
        yield f"{path}: there is no setting {shown(key)}: {_suggest(key, names, otherwise)}"
    variables = [prefix + name.upper() for name in names]
    for name in sorted(os.environ):
        if name.upper().startswith(prefix) and name.upper() not in variables:
            right = _suggest(name.upper(), variables, listed)
            yield f"environment: there is no setting {shown(name)}: {right}"
