"""Settings pass from one process to another unchanged, and an agent that runs has no pydantic."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.errors import ConfigError
from agent.schema import exchange
from agent.schema.kinds import CHECKS, PROGRESS
from agent.schema.mqtt import Mqtt
from agent.schema.read import validate
from agent.schema.settings import AgentSettings


@pytest.mark.parametrize("kind", PROGRESS.kinds)
def test_settings_with_every_kind_of_table_are_handed_over_unchanged(
    tmp_path: Path, kind: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    secret.chmod(0o600)

    def with_files(table: Mapping[str, Any]) -> dict[str, Any]:
        return {k: str(secret) if k.endswith("_file") else v for k, v in table.items()}

    settings = validate(
        AgentSettings,
        {
            "group": "g",
            "check": [CHECKS.load(check).EXAMPLE for check in CHECKS.kinds],
            "progress": with_files(PROGRESS.load(kind).EXAMPLE),
            "mqtt": with_files(Mqtt.EXAMPLE),
        },
    )
    read = exchange.load(exchange.dump(settings))
    assert read == settings
    assert type(read.progress) is PROGRESS.load(kind)
    assert [type(check) for check in read.check] == [CHECKS.load(check) for check in CHECKS.kinds]


def test_bytes_that_are_no_utf_8_are_handed_over(tmp_path: Path) -> None:
    """Linux allows them in paths and arguments, and the start of such an agent ended as a fault of the program."""
    odd = os.fsdecode(b"/srv/\xfc")
    settings = validate(AgentSettings, {"group": "g", "state_file": odd, "hook_primary": [odd]})
    assert exchange.load(exchange.dump(settings)) == settings
    error = ConfigError(f"no {odd}", state_file=odd)
    with pytest.raises(ConfigError) as caught:
        exchange.load(exchange.dump_error(error, odd))
    assert (str(caught.value), caught.value.state_file) == (f"no {odd}", odd)


def test_every_value_is_frozen_and_has_slots() -> None:
    tables = [kinds.load(kind) for kinds in (CHECKS, PROGRESS) for kind in kinds.kinds]
    for declared in (AgentSettings, Mqtt, *tables):
        assert is_dataclass(declared)
        assert declared.__dataclass_params__.frozen  # type: ignore[attr-defined] # CPython has it
        assert not hasattr(declared, "__dict__") or "__dict__" not in dir(declared), declared
        assert fields(declared)


@pytest.mark.parametrize(
    "module", ["agent.cli.main", "agent.cli.settings_process", "agent.daemon.main"]
)
def test_what_an_agent_keeps_in_memory_is_only_what_it_needs(module: str) -> None:
    code = f"import {module}, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    unwanted = (
        "pydantic",
        "pydantic_core",
        "pydantic_settings",
        "rich",
        "aiomqtt",
        "apsw",
        "click",
        "uvicorn",
    )
    assert module in loaded
    assert not [name for name in loaded if name.split(".")[0] in unwanted]


def test_libraries_leave_no_importlib_metadata_in_an_agent() -> None:
    """They read their own versions by it. It works for whatever else is asked of it."""
    code = (
        "import sys\n"
        "from agent.cli.settings_process import NoSettings, run_agent\n"
        "try: run_agent(['run', '--help'], debug=False)\n"
        "except NoSettings: pass\n"
        "print(*{'httpx2', 'importlib.metadata', 'csv'} & set(sys.modules), file=sys.stderr)\n"
        "from importlib.metadata import version\n"
        "assert version('httpx2') > '0'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.split() == ["httpx2"]


def test_the_kinds_load_without_pydantic() -> None:
    code = (
        "import sys; from agent.schema.kinds import CHECKS, PROGRESS, MQTT\n"
        "for tables in (CHECKS, PROGRESS, MQTT):\n"
        "    for kind in tables.kinds: tables.load(kind)\n"
        "print(*{'pydantic', 'aiomqtt', 'rich'} & set(sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert loaded.strip() == ""
