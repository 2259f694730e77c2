"""``failover-agent sessions``: list the sessions of a group, and forget dead ones."""

import json
from typing import Any

import click

from agent.cli.options import CLIENT_KEYS, JSON_FLAG, load_settings, settings_flags
from agent.cli.remote import id_argument, is_confirmed, print_json, query, table
from agent.drivers.rest import RestClient
from agent.errors import ExitCode, ServerError
from agent.model import SessionView
from agent.schema import api
from agent.schema.settings import AgentSettings

CLIENT_FLAGS = settings_flags(AgentSettings, CLIENT_KEYS)


@click.group("sessions")
def command() -> None:
    """List the sessions of a group, and forget dead ones."""


@command.command("list")
@id_argument("GROUP")
@CLIENT_FLAGS
@JSON_FLAG
def list_sessions(*, group_id: str, as_json: bool, **given: Any) -> int:
    """List the sessions of GROUP. Show which are active, and since when the others are silent."""
    sessions = query(
        load_settings(given),
        lambda client, timeout_s: client.sessions(group_id, timeout_s=timeout_s),
    )
    if as_json:
        print_json([api.ClientSession.from_model(view) for view in sessions])
    else:
        table(
            ("session", "name", "role", "active", "silent since", "override"),
            (
                (
                    view.record.config.id,
                    view.record.config.name,
                    view.role,
                    None if view.active is None else "yes" if view.active else "no",
                    view.silent_since,
                    view.record.override,
                )
                for view in sessions
            ),
        )
    return 0


@command.command("forget")
@id_argument("GROUP")
@id_argument("SESSION", "session_id")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@CLIENT_FLAGS
@JSON_FLAG
def forget(*, group_id: str, session_id: str, yes: bool, as_json: bool, **given: Any) -> int:
    """Remove the record of a dead SESSION from GROUP. Its role override ends.

    Refused for an active session: stop its agent, which then leaves by itself. A session that comes back
    registers again.
    """
    settings = load_settings(given)

    async def find(client: RestClient, timeout_s: float) -> SessionView | None:
        sessions = await client.sessions(group_id, timeout_s=timeout_s)
        return next((one for one in sessions if one.record.config.id == session_id), None)

    _check_dead(query(settings, find), group_id, session_id)
    if not (yes or is_confirmed(f"Forget session {session_id} of group {group_id}?")):
        click.echo("not confirmed, nothing was changed: answer y, or add --yes", err=True)
        raise click.Abort
    query(
        settings,
        lambda client, timeout_s: client.forget_session(group_id, session_id, timeout_s=timeout_s),
    )
    shown = json.dumps({"Forgotten": session_id})
    click.echo(shown if as_json else f"session {session_id} of group {group_id} is forgotten")
    return 0


def _check_dead(view: SessionView | None, group_id: str, session_id: str) -> None:
    """Raise ServerError unless the session exists and is dead. The server checks that again when it removes it."""
    if view is None:
        raise _refusal(
            f"there is no session {session_id} in group {group_id}",
            "'sessions list' shows the existing ones",
        )
    if view.active is None:
        raise _refusal(
            "the server is a plain v1 server, which does not report which sessions are active",
            "stop the client of the session, and delete the session by the server's own means",
        )
    if view.active:
        raise _refusal(
            f"session {session_id} of group {group_id} is active, with the role {view.role}",
            "stop its agent, or wait for the failover timeout after its last heartbeat",
        )


def _refusal(wrong: str, right: str) -> ServerError:
    return ServerError(f"{wrong}: {right}; nothing was changed", exit_code=ExitCode.REFUSED)
