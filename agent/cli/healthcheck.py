"""``failover-agent healthcheck``: check the health of a running agent or coordinator.

For a container's HEALTHCHECK and for exec probes: it imports next to nothing, so that it starts quickly.
"""

import base64
import http.client
import json
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

import click

from agent.drivers.statefile import MAX_BYTES, default_directory
from agent.errors import ConfigError
from agent.files import read_regular
from agent.schema.secret_files import read_secret

if TYPE_CHECKING:
    import ssl

TIMEOUT_S = 3.0
"""A healthy agent answers in milliseconds; one that is stalled does not."""

ANSWER_BYTES = 64 * 1024
CERTIFICATE = "FAILOVER_COORDINATOR_TLS_CERTIFICATE"
PROBE_CERTIFICATE = "FAILOVER_AGENT_PROBE_TLS_CERTIFICATE"
PROBE_USERNAME = "FAILOVER_AGENT_PROBE_USERNAME"
PROBE_PASSWORD_FILE = "FAILOVER_AGENT_PROBE_PASSWORD_FILE"  # noqa: S105 - the name of a variable


class Unhealthy(Exception):  # noqa: N818 - an answer, no fault of ours
    """The agent is not healthy, or does not have that role; the message has the reason."""


@click.command("healthcheck")
@click.argument(
    "question",
    type=click.Choice(["livez", "readyz", "primary", "secondary"]),
    default="livez",
)
@click.option(
    "--ca-file",
    metavar="FILE",
    help="Certificates (PEM) to verify an https address by. Not set: the file in the variable"
    f" {PROBE_CERTIFICATE}, else the system's.",
)
@click.option(
    "--username",
    metavar="NAME",
    help=f"The probe's user, if it asks for one. Not set: {PROBE_USERNAME}.",
)
@click.option(
    "--password-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help=f"File with that user's password. Not set: {PROBE_PASSWORD_FILE}.",
)
@click.option(
    "--probe",
    metavar="URL|FILE",
    help="Where to ask: a probe's URL, or a state file that names it. A URL with a path, such as a"
    " coordinator's /healthz, is requested as it is. Not set: FAILOVER_AGENT_STATE_FILE, else the port"
    " of FAILOVER_AGENT_PROBE_LISTEN, else the only state file of this host. Without any of these: the"
    " coordinator at FAILOVER_COORDINATOR_LISTEN, which has to show the certificate in"
    " FAILOVER_COORDINATOR_TLS_CERTIFICATE if that is set.",
)
def command(
    *,
    question: str,
    probe: str | None,
    ca_file: str | None,
    username: str | None,
    password_file: Path | None,
) -> int:
    """Ask an agent whether it is live (livez, the default), ready, primary or secondary.

    Prints the answer. The exit code is 0 for yes; for no, and for no answer within 3 s, it is 1.
    """
    try:
        url = address(probe)
        context = trust(url, ca_file, given=probe is not None and "://" in probe)
        click.echo(ask(url, question, context, authorization(username, password_file)))
    except Unhealthy as unhealthy:
        click.echo(str(unhealthy), err=True)
        return 1
    return 0


def address(given: str | None) -> str:
    """The URL to ask, with or without a path.

    Raises:
        Unhealthy: no address is configured, it is no URL of HTTP, or the state file names no probe.
    """
    given = given or os.environ.get("FAILOVER_AGENT_STATE_FILE") or None
    if given is not None and "://" not in given:
        return probe_of(Path(given))
    if given is not None:
        if not given.startswith(("http://", "https://")):
            raise Unhealthy(f"{given} must be an http:// or https:// URL")
        return given
    if listens := listener("FAILOVER_AGENT_PROBE_LISTEN"):
        return _over_tls(listens) if os.environ.get(PROBE_CERTIFICATE) else listens
    files = state_files()
    if not files and (listens := listener("FAILOVER_COORDINATOR_LISTEN")):
        secure = os.environ.get(CERTIFICATE)
        return f"{_over_tls(listens) if secure else listens}/healthz"
    if len(files) != 1:
        raise Unhealthy(f"{len(files)} state files on this host: name the agent by --probe")
    return probe_of(files[0])


def listener(variable: str) -> str | None:
    """The URL of the HOST:PORT in a variable, or None if it has no fixed port."""
    host, _, port = os.environ.get(variable, "").rpartition(":")
    return f"http://{host}:{port}" if host and port.isdecimal() and int(port) else None


def trust(url: str, ca_file: str | None, *, given: bool) -> "ssl.SSLContext | None":
    """The TLS context to verify the other side by; None without TLS.

    An agent or coordinator of this host is verified by its own certificate, whatever its name and
    authority; and by ``ca_file`` whatever its name, unless its URL was ``given``.

    Raises:
        Unhealthy: the certificates cannot be read.
    """
    if not url.startswith("https:"):
        return None
    import ssl  # noqa: PLC0415 - most checks do without

    own = None
    if not given and ca_file is None:
        own = os.environ.get(CERTIFICATE if url.endswith("/healthz") else PROBE_CERTIFICATE)
    try:
        context = ssl.create_default_context(cafile=own or ca_file)
    except OSError as error:  # ssl.SSLError is an OSError, too
        raise Unhealthy(
            f"{own or ca_file} must be a file with certificates in PEM: {error}"
        ) from None
    if own is not None or ca_file is not None:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.check_hostname = given
    return context


def authorization(username: str | None, password_file: Path | None) -> str | None:
    """The header Authorization for a probe that asks for a password; None without one.

    Raises:
        Unhealthy: there is only one of user and password, or the file cannot be used.
    """
    username = username or os.environ.get(PROBE_USERNAME)
    given = password_file or os.environ.get(PROBE_PASSWORD_FILE)
    if not username and not given:
        return None
    if not username or not given:
        raise Unhealthy("--username and --password-file are needed together")
    try:
        pair = f"{username}:{read_secret(Path(given))}"
    except ConfigError as error:
        raise Unhealthy(str(error)) from None
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _over_tls(url: str) -> str:
    return url.replace("http:", "https:", 1)


def state_files() -> list[Path]:
    """The state files in the directory where agents put theirs.

    Raises:
        Unhealthy: that directory cannot be used.
    """
    try:
        return list(default_directory().glob("*.json"))
    except ConfigError as error:
        raise Unhealthy(str(error)) from None


def probe_of(path: Path) -> str:
    """The address of the probe that a state file names.

    Raises:
        Unhealthy: there is none.
    """
    try:
        state = json.loads(read_regular(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise Unhealthy(f"state file {path} cannot be read: {error}") from None
    probe = state.get("probe") if isinstance(state, dict) else None
    if not isinstance(probe, str):
        raise Unhealthy(
            f"state file {path} names no probe: the agent is starting, or its probe_listen is off"
        )
    return probe


def ask(
    url: str,
    question: str,
    context: "ssl.SSLContext | None" = None,
    authorization: str | None = None,
) -> str:
    """Ask a probe; return the text of its answer, if that is yes.

    Args:
        url: of the probe, with or without a path.
        question: the path, if the URL has none.
        context: for https.
        authorization: the header of that name.

    Raises:
        Unhealthy: the answer is no, or there is none.
    """
    try:
        parts = urlsplit(url)
        path = parts.path if parts.path.strip("/") else f"/{question}"
        with closing(_connection(parts, context)) as connection:
            headers = {} if authorization is None else {"Authorization": authorization}
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            text = " ".join(answer.read(ANSWER_BYTES).decode("utf-8", "replace").split())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unhealthy(f"{url} gives no answer: {str(error) or type(error).__name__}") from None
    if answer.status != http.HTTPStatus.OK:
        raise Unhealthy(f"{url} answers {answer.status}: {text}")
    return text


def _connection(parts: SplitResult, context: "ssl.SSLContext | None") -> http.client.HTTPConnection:
    host = parts.hostname or ""
    if context is None:
        return http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT_S)
    return http.client.HTTPSConnection(host, parts.port, timeout=TIMEOUT_S, context=context)
