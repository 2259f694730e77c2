"""Format a fault of a setting as a sentence: what is wrong, and what would be right.

Owns the wording, and how a refused value is shown. read.py adds where the value was given.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.errors import ConfigError

LONGEST_SHOWN = 80
"""The most characters of a refused value in its error: enough to find it, and still one line."""

MOST_FAULTS = 20
"""The most lines about the tables of one setting, so that a broken file does not fill the screen."""


class TableError(ValueError):
    """The faults in the tables of one setting: one sentence for each, which names table and key.

    Attributes:
        unknown_key: whether the first fault is an unknown key.
    """

    def __init__(self, faults: Sequence[str], *, unknown_key: bool = False) -> None:
        super().__init__("; ".join(faults))
        self.faults = tuple(faults)
        self.unknown_key = unknown_key


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one setting or one key of a table.

    Attributes:
        shown: the refused value for the message, or "" without one.
        unknown: whether the key does not exist.
        tables: the faults in the setting's tables, if they are the fault.
    """

    key: str
    text: str
    shown: str = ""
    unknown: bool = False
    tables: TableError | None = None

    def __str__(self) -> str:
        """The sentence for a key of a table."""
        if self.unknown:
            return self.text
        return (
            f"{self.key} = {self.shown}: {self.text}" if self.shown else f"{self.key}: {self.text}"
        )


class InvalidError(ConfigError):
    """Values are wrong, or contradict each other. ``faults`` has one for each key."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults


def faults_of(
    errors: Sequence[Mapping[str, Any]], names: Sequence[str], noun: str
) -> Iterator[Fault]:
    """One fault for each key that pydantic refuses, unknown keys first.

    Args:
        errors: as ``ValidationError.errors`` returns them.
        names: the keys that exist.
        noun: the owner of the keys, in words.
    """
    seen = set()
    for error in sorted(errors, key=lambda error: error["type"] != "extra_forbidden"):
        key = str(error["loc"][0])
        if key in seen:
            continue
        seen.add(key)
        cause = error.get("ctx", {}).get("error")
        text = str(cause) if cause else error["msg"].replace("Input should", "must")
        match error["type"]:
            case "extra_forbidden":
                right = suggest(key, names, f"it has {', '.join(names)}")
                yield Fault(key, f"{noun} has no key {shown(key)}: {right}", unknown=True)
            case "missing":
                yield Fault(key, f"is missing, and {noun} needs it")
            case "path_type":
                yield Fault(key, "must be a path, as a string", shown(error["input"]))
            case _:
                tables = cause if isinstance(cause, TableError) else None
                yield Fault(key, text, shown(error["input"]), tables=tables)


def suggest(name: str, names: Sequence[str], otherwise: str) -> str:
    """The sentence that suggests the name probably meant; ``otherwise`` if none is similar."""
    match = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {match[0]}?" if match else otherwise


def shown(value: object) -> str:
    """Format a refused value, without credentials and not too long."""
    text = re.sub(r"//[^/@\s]*@", "//***@", repr(value))
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."
