"""What a setting that is one table has: relations that are checked, and refusals that name the key.

Owns how a fault in a table is told, and a refused value shown. Refuses to know any table's keys.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from agent.settings.checks import TablesError

LONGEST_SHOWN = 60
"""Characters of a refused value that its error repeats."""


class Table(BaseModel):
    """A table. Raises ValueError, with the key first, for two keys that contradict each other."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        for key, text in self._contradictions():
            raise ValueError(f"{key}: {text}")
        return self

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        yield from ()


def as_table(value: object, header: str) -> Mapping[str, Any]:
    """A table as the file gives it, or the same as JSON (from a flag or a variable).

    Raises:
        ValueError: it is no table.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"must be a table in JSON, but: {error}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a table, under [{header}]")  # noqa: TRY004 - for pydantic
    return value


def read_table(value: Mapping[str, Any], model: type[Table], header: str, what: str) -> Any:
    """The ``model`` of a table. ``what`` is what a refusal calls it.

    Raises:
        TablesError: one sentence for each key.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = dict(_faults(error, model, what))
        unknown = any(key not in model.model_fields for key in faults if key)
        raise TablesError(
            [f"{header}: {text}" for text in faults.values()], unknown_key=unknown
        ) from None


def _faults(error: ValidationError, model: type[Table], what: str) -> Iterator[tuple[str, str]]:
    """Keys and a sentence on each, unknown keys first."""
    found = error.errors(include_url=False)
    for fault in sorted(found, key=lambda fault: fault["type"] != "extra_forbidden"):
        key = str(fault["loc"][0]) if fault["loc"] else ""
        told = fault.get("ctx", {}).get("error")
        text = str(told) if told else fault["msg"].replace("Input should", "must")
        match fault["type"]:
            case "extra_forbidden":
                keys = list(model.model_fields)
                close = difflib.get_close_matches(key, keys, n=1)
                right = f"did you mean {close[0]}?" if close else f"it has {', '.join(keys)}"
                yield key, f"{what} has no key {shown(key)}: {right}"
            case "missing":
                yield key, f"{key}: is missing, and {what} needs it"
            case "path_type":
                yield key, f"{key} = {shown(fault['input'])}: must be a path, as a string"
            case _ if not key:  # a relation names its key itself
                yield key, text
            case _:
                yield key, f"{key} = {shown(fault['input'])}: {text}"


def shown(value: object) -> str:
    """A refused value, without credentials and not too long."""
    text = re.sub(r"//[^/@\s]*@", "//***@", repr(value))
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."
