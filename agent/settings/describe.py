"""What a person is told of each setting: for help texts, samples and docs/settings.md."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from agent.settings.forms import Kind
from agent.settings.models import Settings
from agent.settings.values import Address, StatusRange


@dataclass(frozen=True, slots=True)
class Table:
    """One type of the tables that a setting is made of.

    Attributes:
        header: as TOML has it: ``[[check]]``.
        type: what its key ``type`` says, or "" if the setting has one type of table only.
        example: its keys, each as TOML.
        keys: every key that it may have.
    """

    header: str
    type: str
    meaning: str
    example: Mapping[str, str]
    keys: tuple["Described", ...]


@dataclass(frozen=True, slots=True)
class Described:
    """One setting, or one key of a table, as a person is told of it.

    Attributes:
        default: as TOML, or None if it is not set by default (``meaning`` says what happens then).
        example: as TOML; the default where there is one. A key of a table has it in its table.
        required: a table is refused without this key.
        tables: not empty if the setting is made of tables.
    """

    key: str
    metavar: str
    kind: str
    default: str | None
    example: str
    meaning: str
    repeatable: bool = False
    switch: bool = False
    required: bool = False
    tables: tuple[Table, ...] = ()

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
        case BaseModel():
            return toml(value.model_dump(mode="json", exclude_none=True))
        case Address() | StatusRange() | Path() | str():
            return json.dumps(str(value))
        case Mapping():
            return f"{{{', '.join(f'{_key(key)} = {toml(part)}' for key, part in value.items())}}}"
        case list() | tuple():
            return f"[{', '.join(toml(part) for part in value)}]"
        case _:
            raise TypeError(f"no setting has a {type(value).__name__}")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


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


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a type like ``tuple[A | B, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _tables(key: str, annotation: Any, examples: list[Any]) -> Iterator[Table]:
    header = f"[[{key}]]" if get_origin(annotation) is tuple else f"[{key}]"
    models = list(_models(annotation))
    for model, example in zip(models, examples if models else [], strict=True):
        yield Table(
            header=header,
            type=example.get("type", ""),
            meaning=model.__doc__ or "",
            example={name: toml(value) for name, value in example.items()},
            keys=tuple(_described(model, name) for name in model.model_fields),
        )


def _described(model: type[BaseModel], key: str) -> Described:
    info = model.model_fields[key]
    kinds = [part for part in info.metadata if isinstance(part, Kind)]
    kind = kinds[-1] if kinds else _kind(info.annotation)
    unset = info.is_required() or info.default_factory is not None or info.default in (None, "", ())
    unset = unset and key != "probe_listen"
    tables = tuple(_tables(key, info.annotation, info.examples or []))
    examples = [info.examples] if tables else info.examples or [""]
    return Described(
        key=key,
        metavar=kind.metavar,
        kind=kind.text,
        default=None if unset else toml(info.default),
        example=toml(examples[0] if unset else info.default),
        meaning=info.description or "",
        repeatable=key == "endpoint",
        switch=info.annotation is bool,
        required=info.is_required(),
        tables=tables,
    )
