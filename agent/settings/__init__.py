"""What can be set, by whom, and what is refused before anything starts.

A value comes from, in this order: a flag, the environment, a TOML file, the default. The flags, the
samples in config/ and docs/settings.md are made from the models here.
"""

from agent.settings.describe import Described, describe, toml
from agent.settings.forms import (
    Address,
    LogFormat,
    LogLevel,
    RoleForm,
    StoreKind,
    check_id,
    is_loopback,
    read_secret,
)
from agent.settings.models import AgentSettings, CoordinatorSettings, Settings, default_data_dir
from agent.settings.progress import DEFAULT_MAX_FUTURE_S
from agent.settings.sources import Sources, load

__all__ = [
    "DEFAULT_MAX_FUTURE_S",
    "Address",
    "AgentSettings",
    "CoordinatorSettings",
    "Described",
    "LogFormat",
    "LogLevel",
    "RoleForm",
    "Settings",
    "Sources",
    "StoreKind",
    "check_id",
    "default_data_dir",
    "describe",
    "is_loopback",
    "load",
    "read_secret",
    "toml",
]
