"""``failover-agent hash-password``: a line for the coordinator's users file."""

import re
import sys

import click

from agent.coordinator.auth import hash_password
from agent.schema.secret_files import LONGEST_SECRET


def _name(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if (
        not re.fullmatch(r"[^\s:#][^:]*", value)
        or not value.isprintable()
        or value != value.strip()
    ):
        raise click.BadParameter(
            f"{value!r} must have one or more printable characters, no ':', no '#' at its beginning,"
            " and no blank at its beginning or end"
        )
    return value


def _roles(
    _ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    for value in values:
        if not value.isprintable() or "," in value or not value or value != value.strip():
            raise click.BadParameter(
                f"{value!r} must have one or more printable characters, no ',', and no blank at its"
                " beginning or end"
            )
    return values


@click.command("hash-password")
@click.argument("user", callback=_name)
@click.option(
    "--role", "roles", multiple=True, callback=_roles, help="A role of the user; may be repeated."
)
def command(*, user: str, roles: tuple[str, ...]) -> int:
    """Print the line of USER for the coordinator's users_file.

    The password is asked for twice at a terminal; otherwise it is the first line of the standard
    input. It is hashed with scrypt, and neither shown nor kept.
    """
    if sys.stdin is None:  # it was closed
        password = ""
    elif sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if (
        not 1 <= len(password.encode(errors="replace")) <= LONGEST_SECRET
        or not password.isprintable()
    ):
        raise click.UsageError(
            f"the password must be one line of 1 to {LONGEST_SECRET} bytes of printable characters"
        )
    click.echo(f"{user}:{hash_password(password, roles)}")
    return 0
