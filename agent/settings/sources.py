"""Where values come from: a flag, else the environment, else a TOML file, else the default.

Owns reading and merging the sources, and saying of each fault where it stands. Refuses to know what
a setting means. pydantic-settings ignores misspelt variables and missing files: found here.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from agent.errors import ConfigError, ExitCode
from agent.settings.checks import TablesError
from agent.settings.models import ContradictionError, Settings

LONGEST_SHOWN = 80
"""Characters of a refused value that its error repeats: enough to find it, and still one line."""

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Sources(Generic[S]):
    """The values that were given, and from where. Make one by ``read``, then ask it for ``load``.

    Attributes:
        unknown: one sentence per key and variable that no setting has.
    """

    model: type[S]
    flags: Mapping[str, Any]
    environment: Mapping[str, Any]
    file: Mapping[str, Any]
    path: Path | None
    unknown: Sequence[str] = field(default=())

    @classmethod
    def read(
        cls,
        model: type[S],
        flags: Mapping[str, Any] | None = None,
        path: Path | None = None,
    ) -> "Sources[S]":
        """Look at all sources. ``flags`` are by setting name; None in them is "not given".

        Raises:
            ConfigError: the file cannot be read or is not TOML.
        """
        table = _read_file(path) if path is not None else {}
        known = {key: value for key, value in table.items() if key in model.model_fields}
        return cls(
            model=model,
            flags={key: value for key, value in (flags or {}).items() if value is not None},
            environment=EnvSettingsSource(model)(),
            file=known,
            path=path,
            unknown=(*_unknown_keys(model, path, table), *_unknown_variables(model)),
        )

    def origin(self, key: str) -> str:
        """Where the value in force is from: a flag, a variable, the file, or ``default``."""
        if key in self.flags:
            return "--" + key.replace("_", "-")
        if key in self.environment:
            return self.model.env_prefix + key.upper()
        return str(self.path) if key in self.file else "default"

    def load(self) -> S:
        """The settings in force.

        Raises:
            ConfigError: something is wrong; the message has a line for each fault, and the exit code
                is the first one's.
        """
        faults = list(self.unknown)
        exit_code = ExitCode.CONFIG_UNKNOWN_KEY if faults else ExitCode.CONFIG_VALUE
        try:
            settings = self.model(**{**self.file, **self.environment, **self.flags})
        except ValidationError as error:
            found = list(_faults(error))
            faults += [line for fault in found for line in self._lines(*fault)]
            if found and isinstance(found[0][1], TablesError) and found[0][1].unknown_key:
                exit_code = ExitCode.CONFIG_UNKNOWN_KEY
        except ContradictionError as error:
            faults += [self._place(*fault) for fault in error.faults]
        if faults:
            raise ConfigError("\n".join(faults), exit_code=exit_code)
        return settings

    def _lines(self, key: str, fault: str | TablesError) -> list[str]:
        if isinstance(fault, TablesError):  # it says itself which table and key
            return [f"{self.origin(key)}: {text}" for text in fault.faults]
        return [self._place(key, fault)]

    def _place(self, key: str, text: str) -> str:
        """A fault with the place where the value was given."""
        if key in self.flags:
            return f"{self.origin(key)} {_shown(self.flags[key])}: {text}"
        if key in self.environment:
            return f"{self.origin(key)}={_shown(self.environment[key])}: {text}"
        if key in self.file:
            return f"{self.path}: {key} = {_shown(self.file[key])}: {text}"
        return f"{key} (default): {text}"


def load(model: type[S], flags: Mapping[str, Any] | None = None, path: Path | None = None) -> S:
    """The settings in force: flag over environment over file over default.

    Raises:
        ConfigError: one line for each fault, with the exit code of the first.
    """
    return Sources.read(model, flags, path).load()


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        reason = "there is no such file: name one that exists, or leave --config out"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte {error.start}), as TOML must be"
    except tomllib.TOMLDecodeError as error:
        reason = f"is not TOML: {error}".replace("\n", "\\n")
    except RecursionError:
        reason = "is not TOML that anybody meant: it nests too deeply"
    raise ConfigError(f"{path}: {reason}", exit_code=ExitCode.CONFIG_FILE)


def _close(name: str, names: Sequence[str], otherwise: str) -> str:
    match = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {match[0]}?" if match else otherwise


def _unknown_keys(
    model: type[Settings], path: Path | None, table: Mapping[str, Any]
) -> Iterator[str]:
    for key, value in table.items():
        if key in model.model_fields:
            continue
        otherwise = (
            "settings stand at the top level, without [tables]"
            if isinstance(value, dict)
            else "docs/settings.md lists the settings"
        )
        right = _close(key, list(model.model_fields), otherwise)
        yield f"{path}: there is no setting {_shown(key)}: {right}"


def _unknown_variables(model: type[Settings]) -> Iterator[str]:
    """pydantic-settings ignores these, so a typing error would silently change nothing."""
    names = [model.env_prefix + key.upper() for key in model.model_fields]
    for name in sorted(os.environ):
        if name.upper().startswith(model.env_prefix) and name.upper() not in names:
            right = _close(name.upper(), names, "docs/settings.md lists the settings")
            yield f"environment: there is no setting {_shown(name)}: {right}"


def _shown(value: object) -> str:
    text = re.sub(r"//[^/@\s]*@", "//***@", repr(value))
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def _faults(error: ValidationError) -> Iterator[tuple[str, str | TablesError]]:
    """One (key, sentence) per setting: the first of what pydantic says of it."""
    seen = set()
    for fault in error.errors(include_url=False, include_input=False):
        key = str(fault["loc"][0])
        if key not in seen:
            seen.add(key)
            told = fault.get("ctx", {}).get("error")
            if isinstance(told, TablesError):
                yield key, told
            elif fault["type"] == "path_type":
                yield key, "must be a path, as a string"
            else:
                yield key, str(told) if told else fault["msg"].replace("Input should", "must")
