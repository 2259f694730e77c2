"""The flag of a list is repeated, with one item each time: no item may be lost."""

from typing import Any

import click
import pytest
from click.testing import CliRunner

from agent.cli.options import settings_flags, sources
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.fields import Settings
from agent.schema.settings import AgentSettings

ETCD = ("--store=etcd", "--advertise=http://127.0.0.1:1")

TOKENS = (
    "--token-issuer=x",
    "--token-audience=y",
    "--token-keys-url=https://127.0.0.1/keys",
    "--token-tenant=z",
)


@pytest.mark.parametrize(
    ("declared", "name", "parts", "more"),
    [
        (AgentSettings, "endpoint", ("http://a/clientfailover", "http://b/clientfailover"), ()),
        (
            CoordinatorSettings,
            "etcd_endpoint",
            ("http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3"),
            ETCD,
        ),
        (CoordinatorSettings, "host_names", ("a.example", "b.example"), ()),
        (CoordinatorSettings, "administrator", ("user:ann", "role:ops"), TOKENS),
    ],
)
def test_every_part_of_a_repeated_flag_counts(
    declared: type[Settings], name: str, parts: tuple[str, ...], more: tuple[str, ...]
) -> None:
    loaded: list[Any] = []

    @click.command()
    @settings_flags(declared)
    def command(**given: Any) -> None:
        loaded.append(sources(declared, given).load())

    flags = [f"--{name.replace('_', '-')}={part}" for part in parts]
    done = CliRunner().invoke(command, [*flags, *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert len(getattr(loaded[0], name)) == len(parts)
