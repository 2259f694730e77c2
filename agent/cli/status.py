"""``failover-agent status GROUP``: who is primary, and who else is there."""

import asyncio
from typing import Any

import click
from msgspec import Struct

from agent.cli.options import CLIENT_KEYS, JSON_FLAG, settings_flags, settings_of
from agent.cli.remote import ask, id_argument, print_json, table
from agent.drivers.rest import RestClient
from agent.model import GroupStatus, SessionView
from agent.schema import api
from agent.settings.models import AgentForm


class Report(Struct, omit_defaults=True):
    """What ``status --json`` prints: the API's own api."""

    Status: api.GroupStatus
    Sessions: list[api.ClientSession]


@click.command("status")
@id_argument("GROUP")
@settings_flags(AgentForm, CLIENT_KEYS)
@JSON_FLAG
def command(*, group_id: str, as_json: bool, **given: Any) -> int:
    """Say who is primary in GROUP, and who else is there."""

    async def question(
        client: RestClient, timeout_s: float
    ) -> tuple[GroupStatus, list[SessionView]]:
        return await asyncio.gather(
            client.status(group_id, timeout_s=timeout_s),
            client.sessions(group_id, timeout_s=timeout_s),
        )

    status, sessions = ask(settings_of(given), question)
    if as_json:
        print_json(
            Report(
                Status=api.GroupStatus.from_model(status),
                Sessions=[api.ClientSession.from_model(view) for view in sessions],
            )
        )
    else:
        table(("group", group_id), status_rows(status))
        click.echo()
        print_sessions(sessions)
    return 0


def status_rows(status: GroupStatus) -> list[tuple[str, object]]:
    """The status of a group, one fact a row. What a plain v1 server does not tell is a dash."""
    return [
        ("primary", status.primary),
        ("primary since", status.primary_since),
        ("pending primary", status.pending),
        ("data processed", status.last_data),
        ("epoch", status.epoch),
        ("revision", status.revision),
    ]


def print_sessions(sessions: list[SessionView]) -> None:
    """The members of a group, one a line."""
    table(
        ("session", "name", "role", "score", "last heartbeat", "data processed", "override"),
        (
            (
                view.record.config.id,
                view.record.config.name,
                view.role,
                view.score,
                view.heartbeat_at,
                view.last_data,
                view.record.override,
            )
            for view in sessions
        ),
    )
