"""The MQTT topic that times are published to; the only part that needs the extra ``mqtt``.

Owns the connection: it is made again for ever, with growing and jittered waits. Knows nothing of
what a message means. A dead broker is noticed within 1.5 times KEEPALIVE_S. Not promised: a bound on
the memory that one huge message takes while it arrives; the broker sets that one.
"""

import asyncio
import random
import ssl
from collections.abc import Callable

from agent.drivers.progress.times import Reason, Refused
from agent.errors import ConfigError
from agent.settings import read_secret
from agent.settings.progress import MqttProgress

try:
    import aiomqtt
except ModuleNotFoundError as error:
    if error.name not in {"aiomqtt", "paho"}:
        raise
    raise ConfigError(
        "progress: type = 'mqtt' needs a package that is not installed: run"
        " pip install client-failover-agent[mqtt], or use another type"
    ) from None

KEEPALIVE_S = 10
"""Between pings of an idle connection."""

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
"""Between two attempts: a broker that restarts is found soon, one that is gone is not pestered."""

MOST_WAITING = 64
"""Messages between two turns of the loop; then the oldest goes."""


class _Latest(asyncio.Queue[aiomqtt.Message]):
    """A full queue drops its oldest message, where aiomqtt's own would drop the newest."""

    def put_nowait(self, item: aiomqtt.Message) -> None:
        if self.full():
            self.get_nowait()
        super().put_nowait(item)


class Subscriber:
    """One topic of one broker.

    Args:
        take: given each message's payload.
        refuse: given why there are none now.

    Raises:
        ConfigError: the password or the certificates cannot be used.
    """

    def __init__(
        self,
        settings: MqttProgress,
        take: Callable[[bytes], None],
        refuse: Callable[[Refused], None],
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._take = take
        self._refuse = refuse
        self._chance = chance
        path = settings.password_file
        self._password = None if path is None else read_secret(path)
        self._tls = None
        if settings.tls:
            try:
                self._tls = ssl.create_default_context(cafile=settings.ca_file)
            except OSError as error:
                raise ConfigError(
                    f"progress: ca_file = {settings.ca_file} has no certificates in PEM: {error}"
                ) from error

    async def run(self) -> None:
        """Follow the topic until cancelled."""
        wait_s = FIRST_WAIT_S
        while True:
            self._heard = False
            try:
                await self._follow()
            except Exception as error:  # noqa: BLE001 - paho raises more than aiomqtt turns into its own
                text = f"{self._settings.broker}: {str(error) or type(error).__name__}"
                self._refuse(Refused(Reason.UNREADABLE, text))
            wait_s = FIRST_WAIT_S if self._heard else min(LONGEST_WAIT_S, 2 * wait_s)
            await asyncio.sleep(wait_s * (0.5 + self._chance() / 2))

    async def _follow(self) -> None:
        """Until the connection is lost, which aiomqtt tells only those who iterate its messages."""
        settings = self._settings
        client = aiomqtt.Client(
            settings.address.host,
            settings.address.port,
            username=settings.username,
            password=self._password,
            tls_context=self._tls,
            timeout=settings.limit,
            keepalive=KEEPALIVE_S,
            queue_type=_Latest,
            max_queued_incoming_messages=MOST_WAITING,
        )
        # aiomqtt has no setting for the one, and leaves the socket open after a failed start
        paho = client._client  # noqa: SLF001 - see above
        paho.connect_timeout = settings.limit
        try:
            async with client:
                for code in await client.subscribe(settings.topic, qos=1):
                    if not isinstance(code, int) and code.is_failure:
                        text = f"subscription to {settings.topic} refused: {code}"
                        raise aiomqtt.MqttError(text)
                self._heard = True
                async for message in client.messages:
                    payload = message.payload
                    assert isinstance(payload, bytes)  # noqa: S101 - what paho receives is
                    self._take(payload)
        finally:
            paho.disconnect()
