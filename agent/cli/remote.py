"""Shared by the commands that query a coordinator: trying the endpoints in turn, and printing tables.

Owns nothing that lasts: one request, one answer, printed. A server's answer is data: no control character
and no markup of it reaches the terminal.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import TypeVar

import click
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agent.drivers.rest import RestClient
from agent.drivers.rest.configured import client_for
from agent.errors import ServerError
from agent.schema import codec
from agent.schema.formats import check_id
from agent.schema.settings import AgentSettings

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 10.0
"""Request timeout unless request_timeout is set: a person is waiting."""

PIPED_COLUMNS = 1000
"""Width of a table that no terminal shows: nothing is folded, so that grep finds whole values."""


def query(settings: AgentSettings, request: Callable[[RestClient, float], Awaitable[T]]) -> T:
    """The answer of the first endpoint that gives one. ``request`` gets the client and its timeout.

    Raises:
        ServerError: no endpoint answered (the last one's error), or one refused.
        ConfigError: a file has no valid secret or certificates in it.
    """

    async def in_turn() -> T:
        client = client_for(settings)
        try:
            for _ in settings.endpoint[1:]:
                asked = client.endpoint
                try:
                    return await request(client, timeout_s)
                except ServerError as error:
                    if not client.ask_next(asked, error):  # another endpoint would refuse it, too
                        raise
            return await request(client, timeout_s)
        finally:
            await client.aclose()

    timeout_s = settings.request_timeout or DEFAULT_TIMEOUT_S
    return asyncio.run(in_turn())


def id_argument(
    name: str, parameter: str = "group_id"
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A command-line argument that is the id of a group, or of a session."""

    def check(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
        try:
            return check_id(value)
        except ValueError as error:
            raise click.BadParameter(f"{value!r} {error}") from None

    return click.argument(parameter, metavar=name, callback=check)


def is_confirmed(question: str) -> bool:
    """Ask a question on stderr; return False without an answer, as at the end of the input."""
    try:
        return sys.stdin is not None and click.confirm(question, err=True)
    except click.Abort:
        return False


def print_json(value: Struct | Sequence[Struct]) -> None:
    """Print shapes of the API as JSON, with roles as names."""
    click.echo(codec.encode(value, enum_names=True).decode())


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table as wide as the terminal, or as wide as it needs to be if there is none."""
    shown = Table(box=None, pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell(value)) for value in row))
    width = None if sys.stdout.isatty() else PIPED_COLUMNS
    Console(width=width, highlight=False).print(shown)


def cell(value: object) -> str:
    """Format a value for people: a dash for none, times to the second, '?' for control characters."""
    match value:
        case None | "":
            return "-"
        case datetime():
            return value.isoformat(sep=" ", timespec="seconds").replace("+00:00", "Z")
        case float():
            return f"{value:g}"
        case _:
            return "".join(c if c.isprintable() else "?" for c in str(value))
