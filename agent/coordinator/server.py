"""The coordinator as a process: store, service, application and web server, started and stopped.

``run`` is the process; ``serving`` is the same inside another one (the demonstration, tests). The
order matters: settings are checked before the data directory is touched, and no client can connect before
every group is loaded.
"""

import asyncio
import gc
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from typing import Any, cast

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from agent.coordinator.access import Access, Files, load
from agent.coordinator.api import CERTIFICATE_STATE, Api, Forwarder
from agent.coordinator.auth.certificates import certificate_of
from agent.coordinator.file_watch import FileWatch
from agent.coordinator.metrics import Metrics
from agent.coordinator.service import Coordinator, policy_of
from agent.coordinator.store import Store
from agent.coordinator.store.memory import MemoryStore
from agent.coordinator.store.sqlite import SqliteStore
from agent.errors import ConfigError, ExitCode
from agent.ops import logs
from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.browsers import BrowserCheck
from agent.ops.clock import Clock
from agent.ops.sd_notify import Notify
from agent.ops.signals import on_hangup, stop_signals
from agent.schema.addresses import Address
from agent.schema.coordinator_settings import CoordinatorSettings

KEEP_ALIVE_S = 75
"""An idle connection is closed after this: longer than any beat (an agent's is 10 s at most, a v1
client's 30 s with the usual FailoverTimeout of a minute), so that a heartbeat finds its connection."""

BACKLOG = 2048
"""Connections that wait to be accepted: all agents come back at once after a restart."""

MOST_FILES = 65_536
MOST_CONNECTIONS = 20_000
SPARE_FILES = 64
"""Connections that are served at once, some 20 kB each: two for each of 10,000 agents. Files are for
them, the store and the log; the limit of open files is raised so far if the system lets us."""

GRACE_S = 5
"""Time for the requests in progress at a shutdown; then they are aborted. Durable writes are finished in any
case."""

RELOAD_S = 30.0
"""How long a reload waits for files on a disk that may hang."""

GC_THRESHOLDS = (10_000, 50, 100)
"""A full collection walks every group, 50 ms for 2,000 of them, finds nothing (what a heartbeat leaves
has no cycles) and by default comes every second under load. With these it comes after 50 million
objects; the young ones are still looked at."""

log = logs.Log(__name__)


def run(
    settings: CoordinatorSettings, reread: Callable[[], CoordinatorSettings] | None = None
) -> int:
    """Serve until SIGTERM or SIGINT; 0 after an orderly stop.

    Args:
        settings: checked.
        reread: reads the settings anew, at SIGHUP; raises ConfigError.

    Raises:
        ConfigError: a file that a setting names is wrong, or the address is taken (LISTEN).
        StoreError: the data directory cannot be used; the exit code has the reason.
    """
    logs.configure(settings.log_level, settings.log_format)
    gc.set_threshold(*GC_THRESHOLDS)
    return uvloop.run(_run(settings, reread))


async def _run(
    settings: CoordinatorSettings, reread: Callable[[], CoordinatorSettings] | None
) -> int:
    with closing(Notify()) as notify, stop_signals() as stop:
        notify.status("loading the groups")
        access = Access(settings)
        async with serving(settings, access) as url:
            notify.ready(f"serving at {url}")
            with _reloading(access, reread, notify, f"serving at {url}"):
                await _wait(stop, notify)
            notify.stopping()
        log.info("coordinator stopped")
    return ExitCode.OK


@contextmanager
def _reloading(
    access: Access,
    reread: Callable[[], CoordinatorSettings] | None,
    notify: Notify,
    status: str,
) -> Iterator[None]:
    """Read settings and files again at each SIGHUP, and the files alone when they change."""
    if reread is None:
        yield
        return
    hangup = asyncio.Event()

    async def follow() -> None:
        lane = BlockingThread("settings")
        files = FileWatch(lambda: access.paths, lane, access.seen)
        while True:
            read = reread if await files.wait(hangup) else access.check_again
            notify.reloading()
            try:
                await _reload(access, read, lane)
            except Exception:  # a task's edge: a fault of a reload must not end reloads
                log.exception("configuration not changed")
            notify.ready(status)

    task = asyncio.create_task(follow())
    try:
        with on_hangup(hangup.set):
            yield
    finally:
        task.cancel()


async def _reload(
    access: Access, reread: Callable[[], CoordinatorSettings], lane: BlockingThread
) -> None:
    def read() -> tuple[CoordinatorSettings, list[str], Files]:
        settings, refused = access.merge_reloadable(reread())
        return settings, refused, load(settings)

    access.on_reload(False)  # until it is done
    try:
        settings, refused, files = await lane.run(read, timeout_s=RELOAD_S)
    except (ConfigError, StuckError) as error:
        log.error("configuration not changed", reason=error)  # noqa: TRY400 - no traceback needed
        return
    except TimeoutError:
        log.error(  # noqa: TRY400 - no traceback needed
            "configuration not changed", reason=f"its files were not read within {RELOAD_S:g} s"
        )
        return
    changed = access.apply(settings, files)
    logs.configure(settings.log_level, settings.log_format)
    if refused:
        log.warning(
            "settings not changed",
            refused=refused,
            resolution="restart the coordinator to change them",
        )
    access.on_reload(True)
    log.info("configuration read again", changed=changed)


async def _wait(stop: asyncio.Event, notify: Notify) -> None:
    """Until ``stop`` is set; systemd's watchdog hears of each turn of this loop."""
    turn_s = notify.watchdog_s / 2 if notify.watchdog_s is not None else None
    while not stop.is_set():
        notify.watchdog()
        with suppress(TimeoutError):
            async with asyncio.timeout(turn_s):
                await stop.wait()


@asynccontextmanager
async def serving(
    settings: CoordinatorSettings, access: Access | None = None
) -> AsyncIterator[str]:
    """A coordinator that serves in this event loop; its URL. Raises what ``run`` raises."""
    access = access or Access(settings)
    clock = Clock()
    metrics = Metrics(sessions=settings.session_metrics)
    access.on_reload = metrics.reloaded
    with _bound(settings.listen) as listener:
        if settings.store == "etcd":
            async with _serving_cluster(settings, access, clock, metrics, listener) as url:
                yield url
            return
        store = await _open(settings)
        try:
            coordinator = Coordinator(
                store,
                clock.now,
                policy_of(settings),
                max_groups=settings.max_groups,
                meter=metrics,
            )
            groups = await coordinator.start()
            log.info(
                "coordinator started",
                store=settings.store,
                data_dir=settings.data_dir if settings.store == "sqlite" else None,
                groups=groups,
            )
            try:
                app = _api(settings, access, clock, metrics, coordinator)
                async with (
                    access.auth.running(),
                    _web_server(app, listener, access.tls, coordinator) as url,
                ):
                    yield url
            finally:
                await coordinator.stop()
        finally:
            await store.close()


@asynccontextmanager
async def _serving_cluster(
    settings: CoordinatorSettings,
    access: Access,
    clock: Clock,
    metrics: Metrics,
    listener: socket.socket,
) -> AsyncIterator[str]:
    """One of several coordinators over etcd (R19)."""
    from agent.coordinator.cluster import Cluster  # noqa: PLC0415 - other stores do without

    cluster = await Cluster.open(settings, clock, metrics)
    coordinator = cluster.coordinator
    try:
        await cluster.start()
        log.info(
            "coordinator started",
            store=settings.store,
            store_id=cluster.store_id,
            prefix=settings.etcd_prefix,
            shards=settings.shards,
        )
        try:
            app = _api(settings, access, clock, metrics, coordinator, cluster.forwarder)
            async with (
                access.auth.running(),
                _web_server(app, listener, access.tls, coordinator) as url,
            ):
                try:
                    yield url
                finally:
                    await cluster.hand_over()
        finally:
            await cluster.hand_over()
            await coordinator.stop()
    finally:
        await cluster.aclose()


def _api(  # noqa: PLR0917 - the parts of one process
    settings: CoordinatorSettings,
    access: Access,
    clock: Clock,
    metrics: Metrics,
    coordinator: Coordinator,
    forwarder: Forwarder | None = None,
) -> Api:
    return Api(
        coordinator,
        clock.now,
        access.auth,
        max_body_bytes=settings.max_body_bytes,
        role_names=settings.role_form == "name",
        metrics=metrics,
        browsers=BrowserCheck(loopback=settings.listen.loopback, names=settings.host_names),
        forwarder=forwarder,
    )


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers, which would end the process instead of the server."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()


class _JoiningTransport:
    """Sends head and body of an answer together, at the end of the loop's turn they were written in.

    Uvicorn writes them apart, and uvloop sends a first write at once. Each send is a system call, which
    costs more than making the answer, and wakes the client.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._unsent: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._unsent and not self._transport.is_closing():
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()


class _Protocol(HttpToolsProtocol):
    def connection_made(self, transport: Any) -> None:
        super().connection_made(cast("asyncio.Transport", _JoiningTransport(transport)))
        certificate = certificate_of(transport.get_extra_info("ssl_object"))
        if certificate is not None:
            self.app_state = self.app_state | {CERTIFICATE_STATE: certificate}


@asynccontextmanager
async def _web_server(
    app: Api, listener: socket.socket, tls: ssl.SSLContext | None, coordinator: Coordinator
) -> AsyncIterator[str]:
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        loop="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,  # it would be up to a second old: api.py writes its own
        backlog=BACKLOG,
        limit_concurrency=_most_connections(),
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        ssl_context_factory=(lambda _config, _default: tls) if tls is not None else None,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    accepting = asyncio.create_task(server.accepting.wait())
    await asyncio.wait([task, accepting], return_when=asyncio.FIRST_COMPLETED)
    accepting.cancel()
    if task.done():
        task.result()
    host, port = listener.getsockname()[:2]
    url = f"{'https' if tls else 'http'}://{Address(host, port)}"
    log.info("coordinator listening", url=url)
    try:
        yield url
    finally:
        coordinator.refuse_requests()
        server.should_exit = True
        await task


def _most_connections() -> int:
    """How many connections the limit of open files allows, after raising it as far as we may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    files = MOST_FILES if soft == resource.RLIM_INFINITY else soft
    return max(SPARE_FILES, min(MOST_CONNECTIONS, files - SPARE_FILES))


@contextmanager
def _bound(address: Address) -> Iterator[socket.socket]:
    """A socket that has the address, and does not listen yet."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address}: {error.strerror or error};"
            " name a free port and an address of this machine with --listen HOST:PORT",
            exit_code=ExitCode.LISTEN,
        ) from None
    with listener:
        yield listener


async def _open(settings: CoordinatorSettings) -> Store:
    if settings.store == "memory":
        return MemoryStore()
    return await asyncio.to_thread(SqliteStore.open, settings.data_dir)
