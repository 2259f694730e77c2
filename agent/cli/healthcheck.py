"""``failover-agent healthcheck``: ask a running agent, or coordinator, whether it is well.

For a container's HEALTHCHECK and for exec probes: it starts quickly, so it imports next to nothing.
"""

import http.client
import json
import os
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import click

from agent.drivers.statefile import MAX_BYTES, default_directory
from agent.errors import ConfigError

ANSWER_S = 3.0
"""A healthy agent answers in milliseconds; one that is stalled does not."""

ANSWER_BYTES = 64 * 1024


class Unwell(Exception):  # noqa: N818 - an answer, no fault of ours
    """Why the answer is no, in one sentence."""


@click.command("healthcheck")
@click.argument(
    "question",
    type=click.Choice(["livez", "readyz", "primary", "secondary"]),
    default="livez",
)
@click.option(
    "--probe",
    metavar="URL|FILE",
    help="Where to ask: a probe's address, or a state file that names it. A URL with a path is asked as"
    " it is, such as a coordinator's /healthz. Not set: FAILOVER_AGENT_STATE_FILE, else the port of"
    " FAILOVER_AGENT_PROBE_LISTEN, else the one state file of this host; and where there is none,"
    " the coordinator at FAILOVER_COORDINATOR_LISTEN.",
)
def command(*, question: str, probe: str | None) -> int:
    """Ask an agent QUESTION: livez (the default), readyz, primary or secondary.

    Prints the answer. The exit code is 0 for yes; for no, and for no answer within 3 s, it is 1.
    """
    try:
        click.echo(ask(address(probe), question))
    except Unwell as unwell:
        click.echo(str(unwell), err=True)
        return 1
    return 0


def address(given: str | None) -> str:
    """The URL to ask, with or without a path.

    Raises:
        Unwell: nobody says where, or the state file names no probe.
    """
    given = given or os.environ.get("FAILOVER_AGENT_STATE_FILE")
    if given is not None:
        return given if "://" in given else of_state(Path(given))
    if listens := listener("FAILOVER_AGENT_PROBE_LISTEN"):
        return listens
    files = state_files()
    if not files and (listens := listener("FAILOVER_COORDINATOR_LISTEN")):
        return f"{listens}/healthz"
    if len(files) != 1:
        raise Unwell(f"{len(files)} state files on this host: say by --probe which agent is meant")
    return of_state(files[0])


def listener(variable: str) -> str | None:
    """The URL of the HOST:PORT that a variable says, or None if it says no fixed port."""
    host, _, port = os.environ.get(variable, "").rpartition(":")
    return f"http://{host}:{port}" if host and port.isdecimal() and int(port) else None


def state_files() -> list[Path]:
    """Those in the directory where agents put theirs.

    Raises:
        Unwell: that directory cannot be used.
    """
    try:
        return list(default_directory().glob("*.json"))
    except ConfigError as error:
        raise Unwell(str(error)) from None


def of_state(path: Path) -> str:
    """The address of the probe that a state file names.

    Raises:
        Unwell: there is none.
    """
    try:
        with path.open("rb") as file:
            state = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise Unwell(f"state file {path} cannot be read: {error}") from None
    probe = state.get("probe") if isinstance(state, dict) else None
    if not isinstance(probe, str):
        raise Unwell(
            f"state file {path} names no probe: the agent is starting, or its probe_listen is off"
        )
    return probe


def ask(url: str, question: str) -> str:
    """The answer's text, if it is yes.

    Raises:
        Unwell: it is no, or there is none.
    """
    parts = urlsplit(url)
    path = parts.path if parts.path.strip("/") else f"/{question}"
    try:
        secure = parts.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        with closing(connect(parts.hostname or "", parts.port, timeout=ANSWER_S)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            said = " ".join(answer.read(ANSWER_BYTES).decode("utf-8", "replace").split())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unwell(f"{url} gives no answer: {str(error) or type(error).__name__}") from None
    if answer.status != http.HTTPStatus.OK:
        raise Unwell(f"{url} says {answer.status}: {said}")
    return said
