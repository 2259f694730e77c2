"""A connection to an MQTT broker that can harm nothing here; the only part that needs the extra.

Owns making it within a limit, ending it without a rest, the bounds on what a broker may send, and the
waits between attempts. Knows nothing of topics and of what messages mean.
"""

import asyncio
import random
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from agent.errors import ConfigError
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
"""Between two attempts: a broker that restarts is found soon, one that is gone is not pestered."""

MOST_WAITING = 64
"""Messages between two turns of the loop; then the oldest goes."""

LONGEST_PACKET = 256 * 1024
"""Bytes. MQTT allows 256 MiB, which a small host may not have; what we follow has some hundred."""


class Waits:
    """How long to wait before the next attempt: longer each time, with jitter.

    Args:
        chance: a number from 0 up to 1.
    """

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        self._chance = chance
        self._wait_s = FIRST_WAIT_S

    def next_s(self, *, worked: bool) -> float:
        """Seconds. ``worked``: the attempt that has just ended was good for something."""
        self._wait_s = FIRST_WAIT_S if worked else min(LONGEST_WAIT_S, 2 * self._wait_s)
        return self._wait_s * (0.5 + self._chance() / 2)


@dataclass(frozen=True, slots=True)
class Access:
    """What it takes to connect, read once. ``access_of`` makes it."""

    address: Address
    protocol: aiomqtt.ProtocolVersion
    limit_s: float
    keepalive_s: int
    username: str | None
    password: str | None = field(repr=False)
    tls: ssl.SSLContext | None


def access_of(settings: Broker, where: str) -> Access:
    """What it takes to connect, with the secrets and certificates that the settings name.

    Args:
        settings: checked.
        where: the table's name, for errors.

    Raises:
        ConfigError: the password or the certificates cannot be used.
    """
    path = settings.password_file
    tls = None
    if settings.tls:
        try:
            tls = ssl.create_default_context(cafile=settings.ca_file)
        except OSError as error:
            text = f"{where}: ca_file = {settings.ca_file} has no certificates in PEM: {error}"
            raise ConfigError(text) from error
    if tls is not None and settings.certificate is not None:
        key = settings.private_key
        try:  # with a password, or it would be asked for on the terminal
            tls.load_cert_chain(settings.certificate, key, password="")
        except OSError as error:
            files = " and ".join(str(file) for file in (settings.certificate, key) if file)
            raise ConfigError(
                f"{where}: certificate = {files}: must be a certificate and its own private key in"
                f" PEM, without a pass phrase: {error}"
            ) from error
    v5 = settings.protocol == "5"
    return Access(
        address=settings.address,
        protocol=aiomqtt.ProtocolVersion.V5 if v5 else aiomqtt.ProtocolVersion.V311,
        limit_s=settings.limit,
        keepalive_s=settings.keepalive,
        username=settings.username,
        password=None if path is None else read_secret(path),
        tls=tls,
    )


class Latest(asyncio.Queue[aiomqtt.Message]):
    """A full queue drops its oldest message, where aiomqtt's own would drop the newest."""

    def put_nowait(self, item: aiomqtt.Message) -> None:
        if self.full():
            self.get_nowait()
        super().put_nowait(item)


class _Client(aiomqtt.Client):
    """Connects in a thread that nobody waits for at the exit: name servers and handshakes hang.

    It is bounded on the way in, and a publication that the broker refuses is an error, where aiomqtt
    would take it for done.
    """

    def __init__(self, access: Access, will: aiomqtt.Will | None, client_id: str | None) -> None:
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
            queue_type=Latest,
            max_queued_incoming_messages=MOST_WAITING,
        )
        self.left = False
        self._refused: str | None = None
        self._client.connect_timeout = access.limit_s  # the handshake's, too
        self._receive = self._client._sock_recv  # noqa: SLF001 - paho has no such bound
        self._client._sock_recv = self._bounded  # type: ignore[method-assign, assignment] # noqa: SLF001 - see above

    def _bounded(self, size: int) -> bytes:
        length = self._client._in_packet["remaining_length"]  # noqa: SLF001 - see above
        if length > LONGEST_PACKET:
            raise ConnectionError(f"a packet of {length} bytes is more than {LONGEST_PACKET}")
        return self._receive(size)

    def _on_publish(self, client: Any, userdata: Any, mid: int, code: Any, properties: Any) -> None:
        if code.is_failure:
            self._refused = str(code)
        super()._on_publish(client, userdata, mid, code, properties)

    async def publish(self, /, topic: str, *args: Any, **kwargs: Any) -> None:
        await super().publish(topic, *args, **kwargs)
        if self._refused is not None:
            raise aiomqtt.MqttError(f"publication to {topic} refused: {self._refused}")

    def _client_connect(self) -> None:
        """Nothing is left of this for the loop's executor: see ``connect``."""

    async def connect(self) -> None:
        """Make the connection, up to where ``async with`` goes on."""
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
            except Exception as error:  # noqa: BLE001 - is raised where it is waited for
                failed = error
            with suppress(RuntimeError):  # the loop is closed: this process ends
                loop.call_soon_threadsafe(settle, failed)

        threading.Thread(target=work, name="mqtt-connect", daemon=True).start()
        await done

    def leave(self) -> None:
        """Close what aiomqtt leaves open after a failed start."""
        self.left = True
        self._client.disconnect()


@asynccontextmanager
async def connected(
    access: Access, *, will: aiomqtt.Will | None = None, client_id: str | None = None
) -> AsyncIterator[aiomqtt.Client]:
    """A connection, ended cleanly. Iterate its messages, or its loss goes unseen.

    Raises:
        Exception: of any kind; paho raises more than aiomqtt turns into its own.
    """
    client = _Client(access, will, client_id)
    try:
        await client.connect()
        async with client:
            yield client
    finally:
        client.leave()


async def subscribe(client: aiomqtt.Client, *topics: str) -> None:
    """Follow topics. Raises MqttError if the broker refuses one."""
    codes = await client.subscribe([(topic, 1) for topic in topics])
    for topic, code in zip(topics, codes, strict=False):
        if isinstance(code, ReasonCode) and code.is_failure:
            raise aiomqtt.MqttError(f"subscription to {topic} refused: {code}")
