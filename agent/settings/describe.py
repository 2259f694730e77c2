"""What a person is told of each setting: for help texts, samples and docs/settings.md."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from agent.settings.forms import Address, Kind
from agent.settings.models import Settings


@dataclass(frozen=True, slots=True)
class Described:
    """One setting, as a person is told of it.

    Attributes:
        default: as TOML, or None if it is not set by default (``meaning`` says what happens then).
        example: as TOML; the default where there is one.
    """

    key: str
    metavar: str
    kind: str
    default: str | None
    example: str
    meaning: str
    repeatable: bool = False
    switch: bool = False

    @property
    def flag(self) -> str:
        """The flag of this name."""
        return "--" + self.key.replace("_", "-")


def toml(value: object) -> str:
    """A setting's value as TOML has it."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"{value:.12g}"
        case Address() | Path() | str():
            return json.dumps(str(value))
        case list() | tuple():
            return f"[{', '.join(toml(part) for part in value)}]"
        case _:
            raise TypeError(f"no setting has a {type(value).__name__}")


def _kind(annotation: object) -> Kind:
    for part in (annotation, *get_args(annotation)):
        for kind in getattr(part, "__metadata__", ()):
            if isinstance(kind, Kind):
                return kind
    raise TypeError(f"{annotation} has no Kind")


def describe(model: type[Settings]) -> tuple[Described, ...]:
    """Every setting of a model, its own before those that both programs have."""
    shared = set(Settings.model_fields)
    keys = [key for key in model.model_fields if key not in shared]
    return tuple(_described(model, key) for key in (*keys, *Settings.model_fields))


def _described(model: type[Settings], key: str) -> Described:
    info = model.model_fields[key]
    kinds = [part for part in info.metadata if isinstance(part, Kind)]
    kind = kinds[0] if kinds else _kind(info.annotation)
    unset = info.default_factory is not None or info.default in (None, "", ())
    unset = unset and key != "probe_listen"
    return Described(
        key=key,
        metavar=kind.metavar,
        kind=kind.text,
        default=None if unset else toml(info.default),
        example=toml(info.examples[0] if unset and info.examples else info.default),
        meaning=info.description or "",
        repeatable=key == "endpoint",
        switch=info.annotation is bool,
    )
