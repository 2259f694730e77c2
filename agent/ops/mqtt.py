"""Connections to an MQTT broker, with timeouts and bounds. Needs the extra ``mqtt``.

Owns the timeout of a connect, a complete close, bounds on what a broker may send, and the backoff between
attempts. Knows nothing of topics and of what messages mean.
"""

import asyncio
import logging
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from agent.errors import ConfigError
from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.logs import Log
from agent.ops.reserve import run_in_thread
from agent.ops.tasks import retrieve_error
from agent.ops.tls import client_context, load_pair
from agent.schema.addresses import Address
from agent.schema.mqtt import Broker
from agent.schema.secret_files import read_secret

try:
    import aiomqtt
except ModuleNotFoundError as error:
    if error.name not in {"aiomqtt", "paho"}:
        raise
    raise ConfigError(
        "MQTT needs a package that is not installed: run"
        " pip install client-failover-agent[mqtt], or configure no MQTT"
    ) from None
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
"""Backoff between two attempts: a restarted broker is found soon, and a dead one is rarely asked."""

MOST_WAITING = 64
"""How many received messages may wait; beyond that the oldest is dropped."""

T = TypeVar("T")

log = Log(__name__)

LONGEST_PACKET = 256 * 1024
"""The longest packet in bytes. MQTT allows 256 MiB, more than a small host has; our messages have some hundred."""


class Backoff:
    """The growing delay before the next attempt, with jitter.

    Args:
        chance: returns a random number from 0 up to 1.
    """

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        self._chance = chance
        self._wait_s = FIRST_WAIT_S

    def next_s(self, *, worked: bool) -> float:
        """Seconds until the next attempt. After an attempt that ``worked``, the first delay is used again."""
        self._wait_s = FIRST_WAIT_S if worked else min(LONGEST_WAIT_S, 2 * self._wait_s)
        return self._wait_s * (0.5 + self._chance() / 2)


@dataclass(frozen=True, slots=True)
class BrokerAccess:
    """Address, credentials and certificates of a broker, loaded by ``load_access``."""

    address: Address
    protocol: aiomqtt.ProtocolVersion
    limit_s: float
    keepalive_s: int
    username: str | None
    password: str | None = field(repr=False)
    tls: ssl.SSLContext | None


def load_access(settings: Broker, where: str) -> BrokerAccess:
    """Load the secrets and certificates that the settings name.

    Args:
        settings: valid ones.
        where: the table's name, for errors.

    Raises:
        ConfigError: the password or the certificates cannot be used.
    """
    path = settings.password_file
    tls = None
    if settings.tls:
        tls = client_context(f"{where}: ca_file", settings.ca_file)
        if settings.certificate is not None:
            key = settings.private_key or settings.certificate
            load_pair(tls, f"{where}: certificate", settings.certificate, key)
    v5 = settings.protocol == "5"
    return BrokerAccess(
        address=settings.address,
        protocol=aiomqtt.ProtocolVersion.V5 if v5 else aiomqtt.ProtocolVersion.V311,
        limit_s=settings.limit,
        keepalive_s=settings.keepalive,
        username=settings.username,
        password=None if path is None else read_secret(path),
        tls=tls,
    )


class CurrentAccess:
    """The access of a broker, whose files are read again before each connection.

    Args:
        settings: valid ones.
        where: the table's name, for errors.

    Raises:
        ConfigError: as ``load_access``.
    """

    def __init__(self, settings: Broker, where: str) -> None:
        self._settings = settings
        self._where = where
        self._access = load_access(settings, where)
        self._lane = BlockingThread(f"{where} files")
        self._failing = False

    async def load(self) -> BrokerAccess:
        """Load the files again. While they cannot be used, return the former access, and log that once."""
        try:
            self._access = await self._lane.run(
                lambda: load_access(self._settings, self._where), timeout_s=self._settings.limit
            )
        except (ConfigError, TimeoutError, StuckError) as error:
            if not self._failing:
                reason = str(error) or f"not read within {self._settings.limit:g} s"
                log.error("credentials not changed", of=self._where, reason=reason)  # noqa: TRY400 - no traceback needed
            self._failing = True
        else:
            self._failing = False
        return self._access


class DropOldestQueue(asyncio.Queue[aiomqtt.Message]):
    """A queue that drops its oldest message when full; aiomqtt's own drops the newest."""

    def put_nowait(self, item: aiomqtt.Message) -> None:
        if self.full():
            self.get_nowait()
        super().put_nowait(item)


class _SocketLoop:
    """The event loop as aiomqtt sees it. It skips callbacks for a closed socket, which would raise and stop the agent."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: Callable[[], Any]) -> None:
        self._loop, self._socket = loop, socket

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_soon_threadsafe(self, callback: Callable[..., object], *watched: Any) -> None:
        """Schedule a callback; ``watched`` begins with the descriptor to watch, if there is one."""

        def call() -> None:
            socket = self._socket()
            if not watched or (socket is not None and socket.fileno() == watched[0]):
                callback(*watched)

        self._loop.call_soon_threadsafe(call)


class _Client(aiomqtt.Client):
    """Connects in a daemon thread, as look-ups and handshakes may hang, without delaying the exit.

    Received packets are bounded, and a publication that the broker refuses raises, where aiomqtt would
    report success.
    """

    def __init__(
        self, access: BrokerAccess, will: aiomqtt.Will | None, client_id: str | None
    ) -> None:
        properties = None
        if access.protocol is aiomqtt.ProtocolVersion.V5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call] # paho has no type for it
            properties.MaximumPacketSize = LONGEST_PACKET
        super().__init__(
            access.address.host,
            access.address.port,
            protocol=access.protocol,
            username=access.username,
            password=access.password,
            tls_context=access.tls,
            timeout=access.limit_s,
            keepalive=access.keepalive_s,
            will=will,
            identifier=client_id,
            properties=properties,
            queue_type=DropOldestQueue,
            max_queued_incoming_messages=MOST_WAITING,
        )
        # The library logs a traceback for each malformed packet; our own lines report the consequence.
        logging.getLogger("mqtt").setLevel(logging.CRITICAL)
        self.left = False
        self._disconnected.add_done_callback(retrieve_error)  # aiomqtt may drop it unread
        self._loop = _SocketLoop(self._loop, self._client.socket)  # type: ignore[assignment] # stands for the loop
        self._refused: str | None = None
        self._client.connect_timeout = access.limit_s  # also for the handshake
        self._receive = self._client._sock_recv  # noqa: SLF001 - paho has no such bound
        self._client._sock_recv = self._bounded  # type: ignore[method-assign, assignment] # noqa: SLF001 - see above

    def _bounded(self, size: int) -> bytes:
        paho = self._client
        if paho._in_packet["remaining_length"] > LONGEST_PACKET or paho._in_messages:  # noqa: SLF001 - see above
            raise ConnectionError("a packet is too long, or of QoS 2, which nobody asked for")
        return self._receive(size)

    def _on_disconnect(self, *args: Any) -> None:
        if not self._connected.cancelled():  # aiomqtt would raise in a callback of the loop
            super()._on_disconnect(*args)

    def _on_publish(self, client: Any, userdata: Any, mid: int, code: Any, properties: Any) -> None:
        if code.is_failure:
            self._refused = str(code)
        super()._on_publish(client, userdata, mid, code, properties)

    async def publish(self, /, topic: str, *args: Any, **kwargs: Any) -> None:
        await super().publish(topic, *args, **kwargs)
        if self._refused is not None:
            raise aiomqtt.MqttError(f"publication to {topic} refused: {self._refused}")

    async def _wait_for(self, fut: Awaitable[T], timeout: float | None) -> T:  # noqa: ASYNC109 - aiomqtt's signature
        """Wait for the broker's answer, and fail when the connection is lost: aiomqtt waits on."""
        if fut is self._disconnected or fut is self._connected:
            return await super()._wait_for(fut, timeout)
        answer = asyncio.ensure_future(super()._wait_for(fut, timeout))
        answer.add_done_callback(retrieve_error)  # nobody may be waiting for it any more
        try:
            either: set[asyncio.Future[Any]] = {answer, self._disconnected}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise aiomqtt.MqttError("the connection was lost")
            return await answer
        finally:
            answer.cancel()

    def _client_connect(self) -> None:
        """Do nothing in the loop's executor: ``connect`` has already connected."""

    async def connect(self) -> None:
        """Connect; ``async with`` then waits for the broker's answer."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def settle(error: Exception | None) -> None:
            if self.left:
                self._client.disconnect()
            elif not done.done():
                done.set_exception(error) if error is not None else done.set_result(None)

        def work() -> None:
            failed: Exception | None = None
            try:
                super(_Client, self)._client_connect()
            except Exception as error:  # noqa: BLE001 - raised again where it is awaited
                failed = error
            with suppress(RuntimeError):  # the loop is closed, since the process is exiting
                loop.call_soon_threadsafe(settle, failed)

        run_in_thread(work, vital=False)
        await done

    def leave(self) -> None:
        """Close the socket that aiomqtt leaves open after a failed start."""
        self.left = True
        self._disconnected.add_done_callback(retrieve_error)
        self._client.disconnect()


@asynccontextmanager
async def connected(
    access: BrokerAccess, *, will: aiomqtt.Will | None = None, client_id: str | None = None
) -> AsyncIterator[aiomqtt.Client]:
    """A connection, closed cleanly at the end. Iterate its messages: only that notices its loss.

    Raises:
        Exception: of any kind; aiomqtt does not convert all that paho raises.
    """
    client = _Client(access, will, client_id)
    try:
        await client.connect()
        async with client:
            yield client
    finally:
        client.leave()


async def subscribe(client: aiomqtt.Client, *topics: str) -> None:
    """Subscribe to topics. Raises MqttError if the broker refuses one."""
    codes = await client.subscribe([(topic, 1) for topic in topics])
    for topic, code in zip(topics, codes, strict=False):
        if isinstance(code, ReasonCode) and code.is_failure:
            raise aiomqtt.MqttError(f"subscription to {topic} refused: {code}")
