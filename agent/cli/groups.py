"""``failover-agent groups``: list, create, show and delete groups."""

import asyncio
import json
from typing import Any

import click

from agent.cli.options import CLIENT_KEYS, JSON_FLAG, load_settings, settings_flags
from agent.cli.remote import id_argument, print_json, query, table
from agent.cli.status import Report, print_sessions, status_rows
from agent.drivers.rest import RestClient
from agent.errors import ExitCode, ServerError
from agent.model import (
    TICKS_PER_SECOND,
    GroupConfig,
    GroupStatus,
    HistoryEntry,
    SessionView,
)
from agent.schema import api
from agent.schema.settings import AgentSettings

RECENT = 10
"""Tenures that ``show`` prints: recent history fits on a screen."""

NOT_FOUND = 404

CLIENT_FLAGS = settings_flags(AgentSettings, CLIENT_KEYS)


@click.group("groups")
def command() -> None:
    """List, create, show and delete groups."""


@command.command("list")
@CLIENT_FLAGS
@JSON_FLAG
def list_groups(*, as_json: bool, **given: Any) -> int:
    """List the groups of the coordinator."""
    groups = query(
        load_settings(given),
        lambda client, timeout_s: client.groups(timeout_s=timeout_s),
    )
    if as_json:
        print_json([api.GroupConfiguration.from_model(group) for group in groups])
    else:
        table(
            ("group", "name", "failover timeout", "description"),
            ((g.id, g.name, f"{g.lease_s:g} s", g.description) for g in groups),
        )
    return 0


@command.command("create")
@id_argument("ID")
@settings_flags(AgentSettings, ("failover_timeout", *CLIENT_KEYS))
@click.option("--name", metavar="TEXT", help="Name for people.")
@click.option("--description", metavar="TEXT", help="What the group is for.")
@JSON_FLAG
def create(
    *, group_id: str, name: str | None, description: str | None, as_json: bool, **given: Any
) -> int:
    """Create a group with ID; its configuration cannot be changed later.

    Succeeds too if the group exists already with the same configuration.
    """
    settings = load_settings(given)
    wanted = GroupConfig(
        id=group_id,
        timeout_ticks=round(settings.failover_timeout * TICKS_PER_SECOND),
        name=name,
        description=description,
    )
    group = query(
        settings, lambda client, timeout_s: client.create_group(wanted, timeout_s=timeout_s)
    )
    if as_json:
        print_json(api.GroupConfiguration.from_model(group))
    else:
        click.echo(f"group {group.id} exists, failover timeout {group.lease_s:g} s")
    return 0


@command.command("show")
@id_argument("ID")
@CLIENT_FLAGS
@JSON_FLAG
def show(*, group_id: str, as_json: bool, **given: Any) -> int:
    """Show a group: configuration, status, sessions, recent tenures."""

    async def request(
        client: RestClient, timeout_s: float
    ) -> tuple[GroupConfig, GroupStatus, list[SessionView], list[HistoryEntry] | None]:
        return await asyncio.gather(
            client.group(group_id, timeout_s=timeout_s),
            client.status(group_id, timeout_s=timeout_s),
            client.sessions(group_id, timeout_s=timeout_s),
            _history(client, group_id, timeout_s),
        )

    group, status, sessions, history = query(load_settings(given), request)
    if as_json:
        print_json(
            Report(
                Group=api.GroupConfiguration.from_model(group),
                Status=api.GroupStatus.from_model(status),
                Sessions=[api.ClientSession.from_model(view) for view in sessions],
                History=None
                if history is None
                else [api.HistoryEntry.from_model(tenure) for tenure in history],
            )
        )
        return 0
    table(
        ("group", group.id),
        [
            ("name", group.name),
            ("description", group.description),
            ("failover timeout", f"{group.lease_s:g} s"),
            *status_rows(status),
        ],
    )
    click.echo()
    print_sessions(sessions)
    if history is not None:
        click.echo()
        _print_history(history)
    return 0


def _print_history(history: list[HistoryEntry]) -> None:
    table(
        ("epoch", "session", "from", "until", "why it began", "why it ended"),
        ((t.epoch, t.session_id, t.since, t.until, t.why_started, t.why_ended) for t in history),
    )


async def _history(client: RestClient, group: str, timeout_s: float) -> list[HistoryEntry] | None:
    """Recent tenures, or None if the server keeps none: a plain v1 server does not have this call."""
    try:
        return await client.history(group, count=RECENT, timeout_s=timeout_s)
    except ServerError as error:
        if error.status == NOT_FOUND or error.exit_code is ExitCode.NOT_THE_API:
            return None
        raise


@command.command("delete")
@id_argument("ID")
@CLIENT_FLAGS
@JSON_FLAG
def delete(*, group_id: str, as_json: bool, **given: Any) -> int:
    """Delete a group that has no active sessions, with its history."""
    query(
        load_settings(given),
        lambda client, timeout_s: client.delete_group(group_id, timeout_s=timeout_s),
    )
    click.echo(json.dumps({"Deleted": group_id}) if as_json else f"group {group_id} is deleted")
    return 0
