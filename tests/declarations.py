"""What tests and generated pages ask of declared settings: the values of a file, a format and an example in words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from agent.schema.fields import Example, Range, Setting, Settings
from agent.schema.read import Sources

DAY_S = 86_400

FILE_ENDS = {"_certificate": ".crt", "_key": ".key", "ca_file": "ca.pem", "_file": ""}
"""How the example of a file's path ends, by how the name of its setting ends."""

S = TypeVar("S", bound=Settings)


def load(declared: type[S], flags: Mapping[str, Any] | None = None, path: Path | None = None) -> S:
    """The settings in force: flag over environment over file over default. Raises ConfigError."""
    return Sources(declared, flags, path).load()


def format_text(setting: Setting) -> str:
    """The format and the range in words."""
    form, limits = setting.format, setting.markers.get(Range)
    if limits is None:
        return form.noun
    least, most = (_number(value, form.unit) for value in (limits.least, limits.most))
    return f"{form.noun}, {'more than ' * limits.above}{least} to {most}"


def _number(value: float, unit: str) -> str:
    if unit == "s" and value >= DAY_S:
        value, unit = value / DAY_S, "d"
    return f"{value:.12g} {unit}".rstrip()


def sample(setting: Setting) -> Any:
    """The value in the sample file: the default, or an example."""
    if setting.has_default:
        return setting.default
    if Example in setting.markers:
        return setting.markers[Example].value
    if setting.format.metavar != "FILE":
        return ""
    end = next(end for end in FILE_ENDS if setting.name.endswith(end))
    stem = setting.name.removesuffix(end).replace("_", "-")
    folder = "secrets/" if "others cannot read" in setting.format.noun else ""
    return f"/etc/failover-agent/{folder}{stem}{FILE_ENDS[end]}"
