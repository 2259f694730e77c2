"""The agent's process: its state file lock, its signals, its local HTTP server.

Owns the order of start and shutdown around the loop. To an error before the first demotion (R6) it adds a hint that
a workload of a previous run may still be active.
"""

import asyncio
import hashlib
import socket
import string
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

from agent.daemon.credential_files import CredentialFiles
from agent.daemon.leftover_workload import add_hint
from agent.daemon.loop import Daemon
from agent.daemon.telemetry import PROBES, Snapshot
from agent.drivers.probe import ProbeServer
from agent.drivers.rest import RestClient
from agent.drivers.rest.client import status_path
from agent.drivers.rest.configured import access_files, client_for, load_server_access
from agent.drivers.rest.endpoints import ServerAccess
from agent.drivers.statefile import StateFile, default_directory
from agent.errors import ConfigError, ExitCode, FailoverError
from agent.ops import logs
from agent.ops.probe_access import ProbeAccess, load_probe_access, probe_files, warn_of_exposure
from agent.ops.process import become_subreaper
from agent.ops.reserve import reserve_threads
from agent.ops.resolver import resolve_in_own_threads
from agent.ops.sd_notify import Notify
from agent.ops.signals import forwarded_signals, on_hangup, stop_signals
from agent.schema.addresses import Address
from agent.schema.settings import AgentSettings

if TYPE_CHECKING:
    from agent.daemon.failsafe import UseAccess
    from agent.drivers.failsafe.access import FailsafeAccess

PREVIOUS_GUARD_S = 30.0
"""How long a start waits for the previous agent's guard to exit."""

NAMES_ON_ONE_HOST = 64
"""Cap on the generated session ids of one group on one host."""

PLAIN = (string.ascii_letters + string.digits + "-_").encode()
LONGEST_PART = 100
"""The most bytes that one id adds to a file name: two ids fit into the 255 bytes that Linux allows."""

LONGEST_RECORD = 16 * 1024
"""The largest record of TLS; used as the size of each connection's read buffer."""

log = logs.Log(__name__)


def run(settings: AgentSettings, reread: Callable[[], AgentSettings] | None = None) -> int:
    """Run an agent until SIGTERM or SIGINT; return the exit code.

    Args:
        settings: checked, with their hooks.
        reread: reads the settings again, at SIGHUP; raises ConfigError.

    Raises:
        FailoverError: the agent could not start, or cannot go on; it has demoted by then.
    """
    logs.configure(settings.log_level, settings.log_format)
    become_subreaper()
    # By default 256 KiB are processed at a time: as tiny records (KeyUpdate) they block the event loop for 0.8 s.
    SSLProtocol.max_size = LONGEST_RECORD
    if not reserve_threads():  # the first demotion is tried nevertheless
        log.warning("too few threads can be started for a demotion")
    return asyncio.run(_run(settings, reread))


async def _run(settings: AgentSettings, reread: Callable[[], AgentSettings] | None) -> int:
    resolve_in_own_threads(asyncio.get_running_loop())
    async with AsyncExitStack() as stack:
        notify, credentials = Notify(), CredentialFiles()
        stack.callback(notify.close)
        try:
            state_file, session_id = lock_state_file(settings)
            stack.callback(state_file.close)
            daemon = Daemon(
                settings,
                session_id,
                partial(_make_client, settings, credentials),
                state_file,
                notify=notify,
                start_probe=partial(_start_probe, settings, credentials, stack),
                load_failsafe=partial(load_failsafe, settings, credentials),
                credentials=credentials,
            )
        except FailoverError as error:
            if error.hint is None:
                add_hint(error, settings.hook_secondary)
            raise
        stack.callback(daemon.close)
        stop = stack.enter_context(stop_signals())
        if reread is not None:
            stack.enter_context(on_hangup(partial(daemon.reload, reread)))
        if settings.workload:
            stack.enter_context(forwarded_signals(daemon.signal_workload))
        return await daemon.run(stop)


async def _make_client(settings: AgentSettings, credentials: CredentialFiles) -> RestClient:
    """Open a client for the endpoints; changed credentials are put into force."""

    async def use(access: ServerAccess) -> None:
        path, timeout_s = status_path(settings.group), settings.timing.request_timeout_s
        await client.replace_access(access, path, timeout_s=timeout_s)

    access = await credentials.load(
        "endpoints", access_files(settings), partial(load_server_access, settings), use
    )
    client = client_for(settings, access)
    return client


async def _start_probe(
    settings: AgentSettings, credentials: CredentialFiles, stack: AsyncExitStack, daemon: Daemon
) -> str | None:
    """Start the local HTTP server; return its URL, or None without one."""
    if settings.probe_listen is None:
        return None
    listen = settings.probe_listen
    probe = _probe_server(daemon)

    async def use(access: ProbeAccess) -> None:
        probe.use(access)

    access = await credentials.load(
        "probe", probe_files(settings), partial(load_probe_access, settings), use
    )
    probe.use(access)
    stack.push_async_callback(probe.stop)
    address = Address(*await probe.start(listen.host, listen.port))
    if warning := warn_of_exposure(settings):
        log.warning("probe can be reached from other machines", probe=address, reason=warning)
    return f"{'https' if access.tls is not None else 'http'}://{address}"


async def load_failsafe(
    settings: AgentSettings, credentials: CredentialFiles, use: "UseAccess"
) -> "FailsafeAccess":
    """Load the secret and the certificates of failsafe; pass changed ones to ``use``."""
    from agent.drivers.failsafe import access  # noqa: PLC0415 - memory for an agent without it

    files, load = access.failsafe_files(settings), partial(access.load_failsafe_access, settings)
    return await credentials.load("failsafe", files, load, use)


def _probe_server(daemon: Daemon) -> ProbeServer:
    from prometheus_client import CollectorRegistry  # noqa: PLC0415 - memory for an agent without it

    from agent.daemon import metrics  # noqa: PLC0415 - likewise

    registry = CollectorRegistry()
    metrics.register(registry, daemon.snapshot)
    return ProbeServer(
        daemon.report_progress,
        daemon.describe,
        verdicts={name: partial(_verdict, daemon, ask) for name, ask in PROBES.items()},
        metrics=partial(metrics.build_page, registry),
    )


def _verdict(daemon: Daemon, why_not: Callable[[Snapshot], str | None]) -> str | None:
    return why_not(daemon.snapshot())


def lock_state_file(settings: AgentSettings) -> tuple[StateFile, str]:
    """Lock a state file and a session id for this process."""
    host = socket.gethostname() or "localhost"
    names = [host, *(f"{host}-{n}" for n in range(2, NAMES_ON_ONE_HOST + 1))]
    for name in [settings.session_id] if settings.session_id is not None else names:
        path = settings.state_file
        if path is None:
            path = default_directory() / f"{_escape_id(settings.group)}.{_escape_id(name)}.json"
        state_file = StateFile(path.absolute())  # the guard's working directory is another one
        try:
            state_file.acquire(wait_s=PREVIOUS_GUARD_S)
        except ConfigError as error:
            last = name == names[-1] or settings.session_id or settings.state_file
            if error.exit_code is not ExitCode.SESSION_IN_USE or last:
                raise
        else:
            return state_file, name
    raise AssertionError("the last name raises")


def _escape_id(name: str) -> str:
    """Escape an id for a file name of at most LONGEST_PART bytes; no two ids give the same name."""
    encoded = name.encode(errors="surrogateescape")
    escaped = "".join(chr(byte) if byte in PLAIN else f"%{byte:02X}" for byte in encoded)
    if len(escaped) <= LONGEST_PART:
        return escaped
    return f"{escaped[: LONGEST_PART - 33]}%{hashlib.sha256(encoded).hexdigest()[:32]}"
