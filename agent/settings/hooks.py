"""The forms of what hooks are told: a hook itself, a user, variables.

Owns reading one value; whether a hook can be run is drivers/hooks' to say.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from agent.settings.forms import NUMBER, Kind, argv_of

MOST_RETRIES = 100
"""Half a second each: more would outlast any limit."""

MOST_VARIABLES = 64
LONGEST_VALUE = 4096
"""Characters of one variable; what is longer belongs into a file."""

LONGEST_NAME = 32
"""Characters of a user or group, as the system has them."""

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@-]*")


def _hook(value: object) -> tuple[str, ...]:
    if isinstance(value, str) and not value.lstrip().startswith("[") and _is_url(value.strip()):
        value = [value.strip()]  # a query's & and ? are nothing for a shell's rules
    if (
        isinstance(value, list | tuple)
        and value
        and isinstance(value[0], str)
        and _is_url(value[0])
    ):
        if len(value) > 1:
            raise ValueError("must be the URL alone: a webhook has no arguments")
        return (_webhook(value[0]),)
    return argv_of(value)


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _webhook(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port  # is checked when it is read
    except ValueError as error:
        raise ValueError(f"must be a URL: {error}") from None
    if not parts.hostname:
        raise ValueError("must be an http:// or https:// URL with a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not have credentials in the URL: sign it by webhook_secret_file")
    if parts.fragment or any(c.isspace() or not c.isprintable() for c in url):
        raise ValueError("must not have a fragment or white space")
    return url


def _owner(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or len(value) > LONGEST_NAME or not _NAME.fullmatch(value):
        raise ValueError("must be a name or a number of this host")
    return value


def _directory(path: Path) -> Path:
    if not path.is_absolute() or "\0" in str(path):
        raise ValueError("must be the absolute path of a directory")
    return path


def _variables(value: object) -> dict[str, str]:
    if isinstance(value, str):
        value = _given(value)
    if not isinstance(value, Mapping):
        raise ValueError('must be a table of variables, like { UNIT = "collector.service" }')  # noqa: TRY004 - for pydantic
    if len(value) > MOST_VARIABLES:
        raise ValueError(f"must be at most {MOST_VARIABLES} variables")
    for name, text in value.items():
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise ValueError(
                f"{name!r} must be of capitals, digits and _, and not begin with a digit"
            )
        if name.startswith("FAILOVER_"):
            raise ValueError(
                f"{name} must not begin with FAILOVER_, as the agent's own variables do"
            )
        if not isinstance(text, str) or len(text) > LONGEST_VALUE or "\0" in text:
            raise ValueError(
                f"{name} must be a string of at most {LONGEST_VALUE} characters, without NUL"
            )
    return dict(value)


def _given(text: str) -> object:
    """What a flag or variable says: a JSON object, or NAME=VALUE words as a shell splits them."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"must be an object in JSON, but: {error}") from None
    try:
        words = [word.partition("=") for word in shlex.split(text)]
    except ValueError as error:
        raise ValueError(f"must be words as a shell splits them, but: {error}") from None
    if not all(is_ for _, is_, _ in words):
        raise ValueError("must be NAME=VALUE words, or a JSON object")
    return {name: text for name, _, text in words}


Hook = Annotated[
    tuple[str, ...],
    BeforeValidator(_hook),
    Kind("HOOK", "list of strings: a command, one directory, or one URL"),
]
Owner = Annotated[str, BeforeValidator(_owner), Kind("NAME", "name or number")]
Directory = Annotated[Path, AfterValidator(_directory), Kind("DIRECTORY", "absolute path")]
Retries = Annotated[
    int, NUMBER, Field(ge=0, le=MOST_RETRIES), Kind("NUMBER", f"number, 0 to {MOST_RETRIES}")
]
Variables = Annotated[
    dict[str, str], BeforeValidator(_variables), Kind("VARIABLES", "table of strings")
]
