"""The source ``mqtt``: a topic that times are published to; it needs the extra ``mqtt``.

Owns following the topic, for ever. Knows nothing of what a message means.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from agent.drivers.progress.kind import Receiver, Source, SourceKind
from agent.drivers.progress.times import Reason, Refused
from agent.ops.tasks import start_task
from agent.schema.kinds import DEFAULT_MAX_FUTURE_S, JsonKey, MaxFuture
from agent.schema.mqtt import Broker, Topic


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttProgress(Broker, SourceKind):
    """An MQTT topic whose messages are times."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "type": "mqtt",
        "broker": "mqtts://broker.example:8883",
        "topic": "plant/line7/processed",
        "key": "time",
        "username": "failover",
        "password_file": "/etc/failover-agent/mqtt-password",
        "ca_file": "/etc/failover-agent/mqtt-ca.pem",
    }

    type: Literal["mqtt"] = "mqtt"
    max_future: MaxFuture = DEFAULT_MAX_FUTURE_S
    topic: Topic
    """The topic; a retained message counts."""
    key: JsonKey | None = None

    def open(self, receiver: Receiver) -> Source:
        return Subscriber(self, receiver)


class Subscriber:
    """One topic of one broker.

    Raises:
        ConfigError: the extra is not installed, or the password or the certificates cannot be used.
    """

    def __init__(
        self,
        settings: MqttProgress,
        receiver: Receiver,
        chance: Callable[[], float] = random.random,
    ) -> None:
        from agent.ops.mqtt import CurrentAccess  # noqa: PLC0415 - needs the extra

        self._settings = settings
        self._access = CurrentAccess(settings, "progress")
        self._receiver = receiver
        self._chance = chance
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = start_task(self.run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def run(self) -> None:
        """Follow the topic until cancelled."""
        from agent.ops.mqtt import Backoff  # noqa: PLC0415 - needs the extra

        waits = Backoff(self._chance)
        while True:
            self._subscribed = False
            try:
                await self._follow()
            except Exception as error:  # noqa: BLE001 - paho raises more than aiomqtt turns into its own
                text = f"{self._settings.broker}: {str(error) or type(error).__name__}"
                self._receiver.refuse(Refused(Reason.UNREADABLE, text))
            await asyncio.sleep(waits.next_s(worked=self._subscribed))

    async def _follow(self) -> None:
        """Receive messages until the connection is lost: aiomqtt reports that to their iterator only."""
        from agent.ops.mqtt import connected, subscribe  # noqa: PLC0415 - needs the extra

        async with connected(await self._access.load()) as client:
            await subscribe(client, self._settings.topic)
            self._subscribed = True
            async for message in client.messages:
                payload = message.payload
                assert isinstance(payload, bytes)  # noqa: S101 - what paho receives is
                self._receiver.receive_text(payload, self._settings.key)
