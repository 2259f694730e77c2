"""What can be set, by whom, and what is refused before anything starts.

A value comes from, in this order: a flag, the environment, a TOML file, the default. The flags, the
samples in config/ and docs/settings.md are made from ``models``; ``sources`` reads them. What an agent
is told in the end are the plain ``values``, which is all that is imported with this package: the rest
needs pydantic, and a running agent has none.
"""

from agent.settings.values import (
    DEFAULT_MAX_FUTURE_S,
    Address,
    AgentSettings,
    LogFormat,
    LogLevel,
    is_loopback,
    read_secret,
)

__all__ = [
    "DEFAULT_MAX_FUTURE_S",
    "Address",
    "AgentSettings",
    "LogFormat",
    "LogLevel",
    "is_loopback",
    "read_secret",
]
