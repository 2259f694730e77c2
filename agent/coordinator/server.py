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
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

import uvloop

from agent.coordinator.access import Access, Files, load
from agent.coordinator.api import Api
from agent.coordinator.calls import Forwarder
from agent.coordinator.connection import Connection
from agent.coordinator.file_watch import FileWatch
from agent.coordinator.limits import Admission, Reports
from agent.coordinator.listener import Listener
from agent.coordinator.metrics import Metrics
from agent.coordinator.restored import declare_restored
from agent.coordinator.route_table import API_ROUTES, METRICS_ROUTES, ROUTES
from agent.coordinator.routes import Route
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

MOST_FILES = 65_536
MOST_CONNECTIONS = 20_000
SPARE_FILES = 64
"""The most connections at once, some 20 kB each: two for each of 10,000 agents. The other open files are for spare
connections, metrics_listen, the store and the log. The limit of open files is raised to the sum if the system
allows it."""

MAX_METRICS_CONNECTIONS = 16
"""The most connections of metrics_listen, for a few scrapers and probes."""

RELOAD_S = 30.0
"""How long a reload waits for files on a disk that may hang."""

GC_THRESHOLDS = (10_000, 50, 100)
"""Thresholds of the garbage collector. Under load a full collection by default runs every second and visits every
group (50 ms for 2,000), in vain, since a heartbeat leaves no cycles. With these thresholds it runs after 50 million
objects; young objects are still checked."""

RESTORED = "restored store declared: nobody is primary before 'failover-agent failsafe lift'"

log = logs.Log(__name__)


def run(
    settings: CoordinatorSettings,
    reread: Callable[[], CoordinatorSettings] | None = None,
    *,
    restored: bool = False,
) -> int:
    """Serve until SIGTERM or SIGINT; return 0 after an orderly stop.

    Args:
        settings: checked.
        reread: reads the settings anew, at SIGHUP; raises ConfigError.
        restored: whether the store was put back from an older copy (R34).

    Raises:
        ConfigError: a file that a setting names is wrong, or the address is taken (LISTEN).
        StoreError: the data directory cannot be used; the exit code has the reason.
    """
    logs.configure(settings.log_level, settings.log_format)
    gc.set_threshold(*GC_THRESHOLDS)
    return uvloop.run(_run(settings, reread, restored=restored))


async def _run(
    settings: CoordinatorSettings,
    reread: Callable[[], CoordinatorSettings] | None,
    *,
    restored: bool,
) -> int:
    with closing(Notify()) as notify, stop_signals() as stop:
        notify.status("loading the groups")
        access = Access(settings)
        async with serving(settings, access, restored=restored) as url:
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

    access.on_reload(False)  # a reload counts as failed until it has succeeded
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
    """Wait until ``stop`` is set, and notify systemd's watchdog in each iteration."""
    interval_s = notify.watchdog_s / 2 if notify.watchdog_s is not None else None
    while not stop.is_set():
        notify.watchdog()
        with suppress(TimeoutError):
            async with asyncio.timeout(interval_s):
                await stop.wait()


class _Sockets(NamedTuple):
    """The addresses that are served: of the API, and of the metrics if they have one of their own."""

    api: socket.socket
    metrics: socket.socket | None


@asynccontextmanager
async def serving(
    settings: CoordinatorSettings, access: Access | None = None, *, restored: bool = False
) -> AsyncIterator[str]:
    """Run a coordinator in this event loop while the block runs; yields its URL. Raises as ``run`` does."""
    access = access or Access(settings)
    clock = Clock()
    metrics = Metrics(sessions=settings.session_metrics)
    access.on_reload = metrics.reloaded
    with _bind(settings) as sockets:
        if settings.store == "etcd":
            serving = _serving_cluster(settings, access, clock, metrics, sockets, restored=restored)
            async with serving as url:
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
            if restored:
                declared = await declare_restored(store, clock.now, policy_of(settings))
                log.warning(RESTORED, groups=declared)
            groups = await coordinator.start()
            log.info(
                "coordinator started",
                store=settings.store,
                data_dir=settings.data_dir if settings.store == "sqlite" else None,
                groups=groups,
            )
            try:
                async with _listening(
                    settings, access, clock, metrics, coordinator, sockets
                ) as url:
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
    sockets: _Sockets,
    *,
    restored: bool,
) -> AsyncIterator[str]:
    """Run one of several coordinators over etcd while the block runs (R19)."""
    from agent.coordinator.cluster import Cluster  # noqa: PLC0415 - other stores do without

    cluster = await Cluster.open(settings, clock, metrics)
    coordinator = cluster.coordinator
    try:
        if restored:
            log.warning(RESTORED, groups=await cluster.declare_restored())
        await cluster.start()
        log.info(
            "coordinator started",
            store=settings.store,
            store_id=cluster.store_id,
            prefix=settings.etcd_prefix,
            shards=settings.shards,
        )
        try:
            async with _listening(
                settings, access, clock, metrics, coordinator, sockets, cluster.forwarder
            ) as url:
                try:
                    yield url
                finally:
                    await cluster.hand_over()
        finally:
            await cluster.hand_over()
            await coordinator.stop()
    finally:
        await cluster.aclose()


@contextmanager
def _bind(settings: CoordinatorSettings) -> Iterator[_Sockets]:
    with ExitStack() as stack:
        api = stack.enter_context(bound_socket(settings.listen, "--listen"))
        metrics = None
        if settings.metrics_listen is not None:
            metrics = stack.enter_context(bound_socket(settings.metrics_listen, "--metrics-listen"))
        yield _Sockets(api, metrics)


@asynccontextmanager
async def _listening(  # noqa: PLR0917 - the parts of one process
    settings: CoordinatorSettings,
    access: Access,
    clock: Clock,
    metrics: Metrics,
    coordinator: Coordinator,
    sockets: _Sockets,
    forwarder: Forwarder | None = None,
) -> AsyncIterator[str]:
    """Serve on the sockets while the block runs; yields the URL of the API."""
    names = settings.host_names
    if settings.advertise is not None:  # other coordinators send their requests to it
        names = (*names, urlsplit(settings.advertise).hostname or "")

    def application(listen: Address, routes: Sequence[Route]) -> Api:
        return Api(
            coordinator,
            clock.now,
            access.auth,
            max_body_bytes=settings.max_body_bytes,
            role_names=settings.role_form == "name",
            metrics=metrics,
            browsers=BrowserCheck(loopback=listen.loopback, names=names),
            routes=routes,
            forwarder=forwarder,
        )

    admission: Admission[Connection] = Admission(
        _most_connections(), settings.max_connections_per_address
    )
    metrics.count_connections(admission)
    serve = partial(
        web_server,
        reports=Reports(metrics, time.monotonic),
        max_body_bytes=settings.max_body_bytes,
    )
    async with access.auth.running(), AsyncExitStack() as servers:
        routes = ROUTES
        if settings.metrics_listen is not None and sockets.metrics is not None:
            few: Admission[Connection] = Admission(MAX_METRICS_CONNECTIONS, MAX_METRICS_CONNECTIONS)
            app = application(settings.metrics_listen, METRICS_ROUTES)
            server = serve(app, sockets.metrics, None, admission=few)
            url = await servers.enter_async_context(server)
            log.info("metrics listening", url=url)
            routes = API_ROUTES
        app = application(settings.listen, routes)
        url = await servers.enter_async_context(
            serve(app, sockets.api, access.tls, admission=admission)
        )
        log.info("coordinator listening", url=url)
        try:
            yield url
        finally:
            coordinator.refuse_requests()


@asynccontextmanager
async def web_server(
    app: Api,
    listener: socket.socket,
    tls: ssl.SSLContext | None,
    *,
    admission: Admission[Connection],
    reports: Reports,
    max_body_bytes: int,
) -> AsyncIterator[str]:
    """Serve an application on a socket while the block runs; yields the URL."""
    server = Listener(
        app, listener, tls, admission=admission, reports=reports, max_body_bytes=max_body_bytes
    )
    server.start()
    host, port = listener.getsockname()[:2]
    try:
        yield f"{'https' if tls else 'http'}://{Address(host, port)}"
    finally:
        await server.stop()


def _most_connections() -> int:
    """How many connections the limit of open files allows, after raising it as far as possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    files = MOST_FILES if soft == resource.RLIM_INFINITY else soft
    return max(SPARE_FILES, min(MOST_CONNECTIONS, files - SPARE_FILES))


@contextmanager
def bound_socket(address: Address, flag: str) -> Iterator[socket.socket]:
    """A socket bound to the address of a setting. It does not listen yet."""
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
            f" name a free port and an address of this machine with {flag} HOST:PORT",
            exit_code=ExitCode.LISTEN,
        ) from None
    with listener:
        yield listener


async def _open(settings: CoordinatorSettings) -> Store:
    if settings.store == "memory":
        return MemoryStore()
    return await asyncio.to_thread(SqliteStore.open, settings.data_dir)
