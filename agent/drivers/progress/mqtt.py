"""The MQTT topic that times are published to; the only part that needs the extra ``mqtt``.

Owns following the topic, for ever. Knows nothing of what a message means.
"""

import asyncio
import random
from collections.abc import Callable

from agent.drivers.progress.times import Reason, Refused
from agent.ops.mqtt import Backoff, connected, load_access, subscribe
from agent.settings.values import MqttProgress


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
        self._access = load_access(settings, "progress")
        self._take = take
        self._refuse = refuse
        self._chance = chance

    async def run(self) -> None:
        """Follow the topic until cancelled."""
        waits = Backoff(self._chance)
        while True:
            self._heard = False
            try:
                await self._follow()
            except Exception as error:  # noqa: BLE001 - paho raises more than aiomqtt turns into its own
                text = f"{self._settings.broker}: {str(error) or type(error).__name__}"
                self._refuse(Refused(Reason.UNREADABLE, text))
            await asyncio.sleep(waits.next_s(worked=self._heard))

    async def _follow(self) -> None:
        """Until the connection is lost, which aiomqtt tells only those who iterate its messages."""
        async with connected(self._access) as client:
            await subscribe(client, self._settings.topic)
            self._heard = True
            async for message in client.messages:
                payload = message.payload
                assert isinstance(payload, bytes)  # noqa: S101 - what paho receives is
                self._take(payload)
