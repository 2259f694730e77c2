"""The guard's helper that releases the role after a demotion (docs/guard.md).

The guard of a dead agent starts it at the beginning of the demotion, so that its imports take no time
later. Once the demotion has succeeded and nothing of the tenure is alive, the guard sends one byte on
stdin; without it the helper does nothing. It then releases the tenure at every endpoint, with the
agent's credentials, so that the coordinator need not wait for the lease to expire.

A late or repeated release changes nothing: it carries the tenure's epoch and the agent's instance, and
a coordinator ignores it unless both are the holder's.
"""

import asyncio
import json
import os
import select
from collections.abc import Sequence
from dataclasses import dataclass, replace

from agent import __version__
from agent.drivers.rest import RestClient
from agent.drivers.rest.configured import client_for
from agent.errors import ConfigError, FailoverError, ServerError
from agent.ops import logs
from agent.schema.exchange import dump, load
from agent.schema.settings import AgentSettings

DOCUMENT_FD = 3
"""The descriptor of the document, which is kept in memory only: it has the paths of files with secrets."""

RELEASE_TIMEOUT_S = 10.0
"""Timeout of the whole release; by then the lease has usually expired."""

REQUEST_TIMEOUT_S = 2.0
"""Timeout of one request."""

PAUSE_S = 0.2
REASON = "demoted by the guard"
FINAL_STATUSES = range(400, 500)
"""Statuses after which a retry at this endpoint is pointless."""
TOO_MANY_REQUESTS = 429

log = logs.Log(__name__)


@dataclass(frozen=True, slots=True)
class ReleaseDocument:
    """The holder of the tenure, and the settings for reaching the coordinator."""

    session_id: str
    instance: str
    store_id: str
    settings: AgentSettings


def format_document(
    settings: AgentSettings, session_id: str, instance: str, store_id: str
) -> bytes:
    """Format the document that the guard keeps for the helper, with this program's version.

    Args:
        settings: the agent's; those that no request needs are left out.
        session_id: the agent's.
        instance: of this process.
        store_id: of the coordinator that the agent has joined. A plain v1 server has none, and no
            release: build no document for it.
    """
    needed = replace(settings, check=(), progress=None, mqtt=None, hook_environment={}, workload=())
    given = {
        "version": __version__,
        "session": session_id,
        "instance": instance,
        "store": store_id,
        "settings": dump(needed).decode(),
    }
    return json.dumps(given).encode()


def parse_document(text: bytes) -> ReleaseDocument:
    """Parse a document of ``format_document``.

    Raises:
        ConfigError: it is of another version, or damaged.
    """
    try:
        given = json.loads(text)
        settings = load(given["settings"].encode())
        return ReleaseDocument(
            str(given["session"]), str(given["instance"]), str(given["store"]), settings
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"the document for the release cannot be read: {error}") from error


async def release_everywhere(
    document: ReleaseDocument, epoch: int, clients: Sequence[RestClient]
) -> bool:
    """Release the tenure at every endpoint; return whether one has accepted it. Closes the clients."""
    done = await asyncio.gather(*(_release_at(client, document, epoch) for client in clients))
    return any(done)


async def _release_at(client: RestClient, document: ReleaseDocument, epoch: int) -> bool:
    """Release at one endpoint, with retries until it answers or the time is up."""
    reason = f"no answer within {RELEASE_TIMEOUT_S:g} s"
    try:
        async with asyncio.timeout(RELEASE_TIMEOUT_S):
            while True:
                try:
                    await _release(client, document, epoch)
                except ServerError as error:
                    reason = str(error)
                    if error.status in FINAL_STATUSES and error.status != TOO_MANY_REQUESTS:
                        break
                    pause_s = max(PAUSE_S, error.retry_after_s or 0.0)
                else:
                    log.info("role released by the guard", endpoint=client.endpoint, epoch=epoch)
                    return True
                await asyncio.sleep(pause_s)
    except TimeoutError:
        pass
    finally:
        await client.aclose()
    log.warning("role not released by the guard", endpoint=client.endpoint, reason=reason)
    return False


async def _release(client: RestClient, document: ReleaseDocument, epoch: int) -> None:
    await client.release(
        document.settings.group,
        document.session_id,
        epoch=epoch,
        instance=document.instance,
        reason=REASON,
        timeout_s=REQUEST_TIMEOUT_S,
    )


def main(words: Sequence[str]) -> int:
    """Wait for the guard's byte, then release the role; return the exit code.

    Args:
        words: the epoch, and how long to wait for the byte, in seconds.
    """
    epoch, wait_s = int(words[0]), float(words[1])
    logs.configure("INFO", "text")  # until the settings are read
    try:
        document = parse_document(os.pread(DOCUMENT_FD, os.fstat(DOCUMENT_FD).st_size, 0))
        settings = document.settings
        logs.configure(settings.log_level, settings.log_format)
        clients = [client_for(replace(settings, endpoint=(one,))) for one in settings.endpoint]
        ready, _, _ = select.select([0], [], [], wait_s)
        if not ready or not os.read(0, 1):
            return 0
        return 0 if asyncio.run(release_everywhere(document, epoch, clients)) else 1
    except FailoverError as error:
        log.error("role not released by the guard", reason=error)  # noqa: TRY400 - no traceback needed
        return error.exit_code
