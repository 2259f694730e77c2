"""``failover-agent failsafe``: lift the restriction that failsafe has put on a group."""

import json
from typing import Any

import click

from agent.cli.options import CLIENT_KEYS, JSON_FLAG, load_settings, settings_flags
from agent.cli.remote import id_argument, is_confirmed, query
from agent.drivers.rest import RestClient
from agent.errors import ExitCode, ServerError
from agent.model import MAX_EPOCH, FailsafeState, FailsafeStatus, GroupStatus
from agent.schema.settings import AgentSettings

LONGEST_REASON = 256
"""The most characters of a reason that the API accepts."""


@click.group("failsafe")
def command() -> None:
    """Lift the restriction that failsafe has put on a group."""


@command.command("lift")
@id_argument("GROUP")
@click.option(
    "--epoch",
    type=click.IntRange(0, MAX_EPOCH),
    required=True,
    metavar="N",
    help="Newest epoch of the group, as 'status' shows it.",
)
@click.option(
    "--reason", required=True, metavar="TEXT", help="Why nobody is active; kept in the history."
)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@settings_flags(AgentSettings, CLIENT_KEYS)
@JSON_FLAG
def lift(*, group_id: str, epoch: int, reason: str, yes: bool, as_json: bool, **given: Any) -> int:
    """Allow every member of GROUP to be promoted. First make sure that nobody is active.

    A primary that lost the coordinator may be active for as long as all members that it knows agree. Look at
    every host first: if one is still active, two will be. Refused while somebody is primary.
    """
    if not 1 <= len(reason) <= LONGEST_REASON:
        raise click.BadParameter(
            f"it must have 1 to {LONGEST_REASON} characters", param_hint="--reason"
        )
    settings = load_settings(given)

    async def read(client: RestClient, timeout_s: float) -> GroupStatus:
        return await client.status(group_id, timeout_s=timeout_s)

    status = query(settings, read)
    _check(status, group_id, epoch)
    question = f"{_describe(status.failsafe)}Is no member of group {group_id} active, on any host?"
    if not (yes or is_confirmed(question)):
        click.echo("not confirmed, nothing was changed: answer y, or add --yes", err=True)
        raise click.Abort
    query(
        settings,
        lambda client, timeout_s: client.lift_failsafe(
            group_id, epoch=epoch, reason=reason, timeout_s=timeout_s
        ),
    )
    shown = json.dumps({"Lifted": group_id, "Epoch": epoch})
    click.echo(shown if as_json else f"every member of group {group_id} may be promoted now")
    return 0


def _check(status: GroupStatus, group_id: str, epoch: int) -> None:
    """Raise ServerError if the coordinator would refuse the lift, so that nobody is asked in vain."""
    failsafe = status.failsafe
    if status.primary is not None:
        raise _refusal(
            f"session {status.primary} is primary of group {group_id}",
            "there is nothing to lift while somebody is primary",
        )
    if failsafe is None or failsafe.state is not FailsafeState.RESTRICTED:
        raise _refusal(
            f"group {group_id} is not restricted",
            "every member may be promoted already; see 'failover-agent status'",
        )
    if status.epoch != epoch:
        raise _refusal(
            f"the newest epoch of group {group_id} is {status.epoch}, not {epoch}",
            "make sure that nobody is active in that epoch either, and set --epoch to it",
        )


def _describe(failsafe: FailsafeStatus | None) -> str:
    """Who may still be active, as the first sentence of the question."""
    if failsafe is None or failsafe.why is None:
        return ""
    return f"{failsafe.why}.\n"


def _refusal(wrong: str, right: str) -> ServerError:
    return ServerError(f"{wrong}: {right}; nothing was changed", exit_code=ExitCode.REFUSED)
