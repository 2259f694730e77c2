"""One of several coordinators over etcd, put together from its settings (R19).

Imported only with ``store = "etcd"``. Connects store/etcd.py (the store), leadership.py (who leads) and forwarding.py
(requests for groups of other leaders).
"""

import asyncio
import secrets
import ssl
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from agent.coordinator.cluster_metrics import ClusterMetrics
from agent.coordinator.forwarded_clients import ForwardedClients
from agent.coordinator.forwarding import Forwarder
from agent.coordinator.leadership import LEAVE_SHARE, Leadership
from agent.coordinator.metrics import Metrics
from agent.coordinator.restored import declare_restored
from agent.coordinator.service import Coordinator, policy_of
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import Etcd, EtcdError, EtcdRefused, if_revision, put
from agent.coordinator.store.etcd_gateway import Gateway, Login
from agent.errors import ConfigError, ExitCode, LeadershipLost, StoreError
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.secret_files import read_secret

STARTUP_S = 15.0
"""How long a start waits for an etcd that does not answer: an election takes 1 to 2 s. After that the
process exits, and the service manager starts it again."""

STARTUP_RETRY_S = 0.5

PEER_KEY_BYTES = 32
MOST_PEER_KEYS = 2
PEER_KEY_INTERVAL_S = 5.0
"""Interval of reading the peer keys: an operator who replaces one waits a few of these between two steps."""

T = TypeVar("T")

log = Log(__name__)


class Cluster:
    """A coordinator with its part in a cluster. ``open`` it, ``start`` it, ``stop`` it, ``aclose`` it."""

    def __init__(
        self,
        store: EtcdCluster,
        settings: CoordinatorSettings,
        clock: Clock,
        metrics: Metrics,
        clients: ForwardedClients | None = None,
    ) -> None:
        assert settings.advertise is not None  # noqa: S101 - the settings come together
        self._store = store
        self._clients = clients
        self._following: asyncio.Task[None] | None = None
        self._settings = settings
        self._clock = clock
        self.coordinator = Coordinator(
            None,
            clock.now,
            policy_of(settings),
            max_groups=settings.max_groups,
            meter=metrics,
            directory=store,
            shard_of=store.layout.shard_of,
            problem=self._problem,
            report=self._report,
            url=settings.advertise,
        )
        self.leadership = Leadership(
            store,
            self.coordinator.engine,
            clock.boottime,
            ttl_s=settings.leadership_ttl,
            url=settings.advertise,
            on_access_change=self.coordinator.forget_access,
        )
        self.forwarder = Forwarder(
            self.leadership,
            _tls("peer_ca_file", settings.peer_ca_file),
            encrypted=settings.advertise.startswith("https:"),
            connections_per_address=settings.max_connections_per_address,
            clients=clients,
        )
        metrics.registry.register(ClusterMetrics(self.leadership, self.forwarder))

    @property
    def store_id(self) -> str:
        """The id of the store."""
        return self._store.store_id

    @classmethod
    async def open(
        cls,
        settings: CoordinatorSettings,
        clock: Clock,
        metrics: Metrics,
    ) -> "Cluster":
        """Open the store, which is made if there is none.

        Raises:
            ConfigError: a file is wrong, or the store has another number of shards.
            StoreError: etcd cannot be used, or the store was moved.
        """
        etcd = await asyncio.to_thread(connect, settings)
        try:
            store = await _retry_at_start(
                lambda: EtcdCluster.open(etcd, settings.etcd_prefix, settings.shards)
            )
            clients = None
            if settings.tls_client_ca_file is not None:
                clients = ForwardedClients(await _retry_at_start(lambda: read_peer_keys(store)))
            return cls(store, settings, clock, metrics, clients)
        except BaseException:
            await etcd.aclose()
            raise

    async def declare_restored(self) -> int:
        """Declare every group of the store as restored, before a shard is led (R34); return their number.

        The copy may contain keys of coordinators that ran when it was made, until their leases expire.

        Raises:
            StoreError: other coordinators serve the store, or etcd fails.
        """
        store, clock = self._store, asyncio.get_running_loop().time
        until = clock() + self._settings.leadership_ttl + STARTUP_S
        policy = policy_of(self._settings)
        while True:
            with suppress(LeadershipLost):
                if not await store.is_served():
                    shards = [store.shard(number, 0) for number in range(store.layout.shards)]
                    return sum([await declare_restored(s, self._clock.now, policy) for s in shards])
            if clock() >= until:
                raise StoreError(
                    "other coordinators serve the store: stop all of them, start one with --restored, and,"
                    " when that one serves, the others without it",
                    exit_code=ExitCode.DATA_DIR_LOCKED,
                )
            log.warning("other coordinators serve the store, waiting for them to stop")
            await asyncio.sleep(STARTUP_RETRY_S)

    async def start(self) -> None:
        """Start to serve requests, to compete for shards and to forward."""
        await self.coordinator.start()
        self.leadership.start()
        self.forwarder.start()
        if self._clients is not None:
            self._following = asyncio.create_task(
                follow_peer_keys(self._store, self._clients), name="follow the peer keys"
            )

    async def hand_over(self) -> None:
        """Give every shard to the other coordinators, and end the requests that wait for their answers.

        May be called twice.
        """
        await self.leadership.stop()
        self.forwarder.stop()

    async def aclose(self) -> None:
        """Close every connection, after the coordinator was stopped."""
        if self._following is not None:
            self._following.cancel()
        await self.forwarder.aclose()
        await self._store.aclose()

    def _report(self) -> Mapping[str, object]:
        view = self.leadership.view
        return {
            "Url": self.leadership.url,
            "Coordinators": sorted(view.members.values()),
            "ShardsLed": self.leadership.led,
            "ShardsWithoutLeader": self.leadership.without_leader,
        }

    def _problem(self) -> str | None:
        fault = self.leadership.fault
        return None if fault is None else f"no session with etcd: {fault}"


def connect(settings: CoordinatorSettings) -> Etcd:
    """A client of etcd, which sends nothing yet. Reads files: call it in a thread.

    Raises:
        ConfigError: a file cannot be used.
    """
    tls = None
    if any(url.startswith("https:") for url in settings.etcd_endpoint):
        tls = _tls("etcd_ca_file", settings.etcd_ca_file)
        if settings.etcd_certificate is not None:
            assert settings.etcd_key is not None  # noqa: S101 - the settings come together
            try:
                # Without a password, OpenSSL prompts for one on the terminal.
                tls.load_cert_chain(settings.etcd_certificate, settings.etcd_key, password="")
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                raise ConfigError(
                    f"etcd_certificate {settings.etcd_certificate} and etcd_key {settings.etcd_key}"
                    f" are not a certificate and its private key in PEM: {error}"
                ) from None
    login = None
    if settings.etcd_username is not None:
        assert settings.etcd_password_file is not None  # noqa: S101 - the settings come together
        login = Login(settings.etcd_username, read_secret(settings.etcd_password_file))
    leave_after_s = settings.leadership_ttl * LEAVE_SHARE
    gateway = Gateway(settings.etcd_endpoint, tls=tls, login=login, leave_after_s=leave_after_s)
    return Etcd(gateway, settings.leadership_ttl)


def _tls(setting: str, file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=file)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"{setting} {file} has no certificates in PEM: {error}") from None


async def read_peer_keys(store: EtcdCluster) -> tuple[bytes, ...]:
    """Read the keys that sign forwarded requests, one a line; the first coordinator that needs one makes it.

    Raises:
        StoreError: etcd fails, or its value is not such keys.
    """
    place = f"{store.layout.prefix}/peer-key"
    found = await store.etcd.get(place)
    if found is None:
        made = put(place, secrets.token_hex(PEER_KEY_BYTES))
        await store.etcd.txn([if_revision(place, 0)], [made])
        found = await store.etcd.get(place)
    try:
        keys = [bytes.fromhex(one) for one in found.value.split()] if found is not None else []
    except ValueError:
        keys = []
    if not 1 <= len(keys) <= MOST_PEER_KEYS or {len(one) for one in keys} != {PEER_KEY_BYTES}:
        raise StoreError(
            f"{place} in etcd must have one key that a coordinator made, or two, one a line: delete it, and"
            " a coordinator makes a new one"
        )
    return tuple(keys)


async def follow_peer_keys(store: EtcdCluster, clients: ForwardedClients) -> None:
    """Read the keys again and again, so that they can be replaced while coordinators run."""
    fault: str | None = None
    while True:
        await asyncio.sleep(PEER_KEY_INTERVAL_S)
        try:
            keys = await read_peer_keys(store)
        except StoreError as error:
            if fault is None and not isinstance(error, EtcdError):  # leadership.py logs those
                fault = str(error)
                log.warning("peer keys not changed", error=fault)
            continue
        fault = None
        if keys != clients.keys:
            clients.keys = keys
            log.info("peer keys read again", keys=len(keys))


async def _retry_at_start(opening: Callable[[], Awaitable[T]]) -> T:
    until, logged = asyncio.get_running_loop().time() + STARTUP_S, ""
    while True:
        try:
            return await opening()
        except EtcdRefused:
            raise
        except EtcdError as error:
            if asyncio.get_running_loop().time() >= until:
                raise StoreError(
                    f"{error}; tried for {STARTUP_S:g} s: check --etcd-endpoint, and that a majority of"
                    " etcd's members runs",
                    exit_code=error.exit_code,
                ) from error
            if str(error) != logged:
                logged = str(error)
                log.warning("etcd cannot be used yet, retrying", error=error)
        await asyncio.sleep(STARTUP_RETRY_S)
