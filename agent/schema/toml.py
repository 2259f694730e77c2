"""Values of settings as people read them: as TOML, and as JSON."""

import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any


def to_toml(value: object) -> str:
    """Format a value as TOML."""
    match to_json(value):
        case bool(flag):
            return "true" if flag else "false"
        case int() | float() as number:
            return f"{number:.12g}"
        case str(text):
            return json.dumps(text)
        case dict(table):
            pairs = (f"{_key(key)} = {to_toml(part)}" for key, part in table.items())
            return f"{{{', '.join(pairs)}}}"
        case list(parts):
            return f"[{', '.join(map(to_toml, parts))}]"
        case _:
            raise TypeError(f"no setting has a {type(value).__name__}")


def to_json(value: object) -> Any:
    """Convert a value for JSON; keys of a table without a value are left out."""
    if is_dataclass(value):
        given = {item.name: getattr(value, item.name) for item in fields(value)}
        return {name: to_json(part) for name, part in given.items() if part is not None}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path) or hasattr(value, "_fields"):
        return str(value)
    if isinstance(value, list | tuple):
        return list(map(to_json, value))
    return value


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
