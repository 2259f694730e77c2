"""Format a fault of a setting as a sentence: what is wrong, and what would be right.

Owns the wording. read.py adds where the value was given.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.errors import ConfigError
from agent.schema.formats import shown

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


def faults_of(
    errors: Sequence[Mapping[str, Any]], names: Sequence[str], noun: str
) -> Iterator[Fault]:
    """The faults of each key that pydantic refuses, unknown keys first.

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
                yield Fault("", f"{noun} has no key {shown(key)}: {right}", unknown=True)
            case "missing":
                yield Fault(key, f"is missing, and {noun} needs it")
            case "path_type":
                yield Fault(key, "must be a path, as a string", shown(error["input"]))
            case _ if isinstance(cause, InvalidError):
                for fault in cause.faults:
                    yield Fault(key, str(fault), unknown=fault.unknown, in_table=True)
            case _:
                yield Fault(key, text, shown(error["input"]))


def suggest(name: str, names: Sequence[str], otherwise: str) -> str:
    """The sentence that suggests the name probably meant; ``otherwise`` if none is similar."""
    match = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {match[0]}?" if match else otherwise
