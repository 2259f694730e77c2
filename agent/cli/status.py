"""``failover-agent status GROUP``: the primary and the other members of a group."""

import asyncio
from typing import Any

import click
from msgspec import Struct

from agent.cli.options import CLIENT_KEYS, JSON_FLAG, load_settings, settings_flags
from agent.cli.remote import id_argument, print_json, query, table
from agent.drivers.rest import RestClient
from agent.model import FailsafeState, FailsafeStatus, GroupStatus, Member, SessionView
from agent.schema import api
from agent.schema.settings import AgentSettings


class Report(Struct, omit_defaults=True, kw_only=True):
    """What ``status --json`` and ``groups show --json`` print: the API's own shapes."""

    Group: api.GroupConfiguration | None = None
    Status: api.GroupStatus
    Sessions: list[api.ClientSession]
    History: list[api.HistoryEntry] | None = None


@click.command("status")
@id_argument("GROUP")
@settings_flags(AgentSettings, CLIENT_KEYS)
@JSON_FLAG
def command(*, group_id: str, as_json: bool, **given: Any) -> int:
    """Show the primary and the other members of GROUP."""

    async def request(
        client: RestClient, timeout_s: float
    ) -> tuple[GroupStatus, list[SessionView]]:
        return await asyncio.gather(
            client.status(group_id, timeout_s=timeout_s),
            client.sessions(group_id, timeout_s=timeout_s),
        )

    status, sessions = query(load_settings(given), request)
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
    """The status of a group, one fact a row. What a plain v1 server does not report is a dash."""
    leader = [] if status.leader is None else [("coordinator", status.leader)]
    return [
        ("primary", status.primary),
        ("primary since", status.primary_since),
        ("pending primary", status.pending),
        ("data processed", status.last_data),
        ("epoch", status.epoch),
        ("revision", status.revision),
        *leader,
        *_failsafe_rows(status.failsafe),
    ]


def _failsafe_rows(failsafe: FailsafeStatus | None) -> list[tuple[str, object]]:
    """The rows about failsafe: its state, and who may be chosen or active. None in a group without it."""
    if failsafe is None:
        return []
    why = f": {failsafe.why}" if failsafe.why is not None else ""
    rows: list[tuple[str, object]] = [("failsafe", f"{failsafe.state}{why}")]
    if failsafe.members:
        rows.append(("failsafe members", _format_members(failsafe.members)))
    if failsafe.state is FailsafeState.RESTRICTED:
        rows.append(("choosable", _format_members(failsafe.choosable or ()) or "nobody"))
    if failsafe.lapsed is not None:
        lapsed = failsafe.lapsed
        rows.append(("may be active", f"{lapsed.session_id} in epoch {lapsed.epoch}"))
        rows.append(("lease ended at", lapsed.since))
    return rows


def _format_members(members: tuple[Member, ...]) -> str:
    return ", ".join(f"{member.id} ({member.url})" for member in members)


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
