"""Announce this member's role to an MQTT broker (docs/mqtt.md). Advisory, in a task of its own.

Owns the topics of one session, and the newest state to publish, which replaces one that still waits.
Callers never wait, and get no errors. Level-triggered: it subscribes to its own topics, and replaces every
retained message that differs from the current state, be it garbage or the last will of a lost connection.
Knows nothing of leases and decides nothing.
"""

import asyncio
import hashlib
import json
import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Protocol

from aiomqtt import Client, Message, Will

from agent.model import Role
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.ops.mqtt import Backoff, CurrentAccess, connected, subscribe
from agent.ops.tasks import start_task
from agent.schema.mqtt import Mqtt
from agent.schema.scalars import format_date_time

LEAVE_S = 1.0
"""How long the exit waits for a connected broker to acknowledge ``offline``."""

CORRECTION_S = 1.0
"""Least interval between corrections, so that two members that both correct a topic do not flood the broker."""

STEADY_S = 10.0
"""A connection that lasted this long resets the backoff. Two clients with the same id disconnect each other at once,
so they have to reconnect ever more rarely."""

MOST_ECHOES = 8
"""How many own publications are remembered until the subscription returns them; there are two topics."""

LONGEST_PAYLOAD = 4096
"""The longest payload that is parsed; our own have some hundred bytes."""

LARGEST_EPOCH = 2**63 - 1
LARGEST_TIMESTAMP = 2**64 - 2
"""The largest timestamp that is sent: one below the largest of 64 bits, so that a newer one is possible."""

log = Log(__name__)


class RoleState(Protocol):
    """A member's role, as a frozen record. ``since``: when the role began (aware, UTC)."""

    @property
    def role(self) -> Role: ...
    @property
    def epoch(self) -> int | None: ...
    @property
    def since(self) -> datetime: ...


class Announcer:
    """One member of one group, at one broker. ``start`` it inside a running loop; ``stop`` it there too.

    Args:
        settings: the broker, and the format of payloads.
        group: id of the group.
        session: id of the member.
        clock: for timestamps.
        first: the current state.
        chance: returns a random number from 0 up to 1, for jitter.

    Raises:
        ConfigError: the password or the certificates cannot be used.
    """

    def __init__(
        self,
        settings: Mqtt,
        group: str,
        session: str,
        *,
        clock: Clock,
        first: RoleState,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._access = CurrentAccess(settings, "mqtt")
        self._session = session
        self._clock = clock
        self._chance = chance
        self._sparkplug = settings.payload == "sparkplug"
        if self._sparkplug:
            self._own = f"spBv1.0/STATE/{settings.sparkplug_host_id or topic_level(group)}"
            self._topics: tuple[str, ...] = (self._own,)
        else:
            base = f"{settings.topic_prefix}/{topic_level(group)}"
            self._own = f"{base}/sessions/{topic_level(session)}"
            self._primary = f"{base}/primary"
            self._topics = (self._own, self._primary)
        self._client_id = settings.client_id or default_client_id(group, session)
        self._state = first
        self._changed = asyncio.Event()
        self._retained: dict[str, bytes] = {}
        """The payload that the broker has on each topic, as far as known."""
        self._seen_epoch = -1
        self._newest_ms = -1
        """The newest timestamp of any STATE, also ours; edge nodes ignore older ones."""
        self._outdated = False
        self._reconnects = Backoff(chance)
        self._behind = False
        self._ending = False
        self._echoes: deque[tuple[str, bytes]] = deque(maxlen=MOST_ECHOES)
        self._up_since: float | None = None
        self._connected = False
        """Whether the broker may have an ``online`` of this connection."""
        self.failures = 0
        """Number of connections that failed or were lost."""
        self._trouble: str | None = ""
        self._task: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """Whether the broker is connected, and has the current state."""
        return self._up_since is not None

    def announce(self, state: RoleState) -> None:
        """Publish a state as soon as the broker is connected. Never waits, never raises."""
        self._state = state
        self._changed.set()

    def start(self) -> None:
        """Start to connect and publish."""
        self._task = start_task(self._run())

    async def stop(self) -> None:
        """Publish ``offline`` if a connected broker acknowledges it within LEAVE_S; then disconnect."""
        if self._task is None:
            return
        self._ending = True
        self._changed.set()
        if self._connected:
            await asyncio.wait({self._task}, timeout=LEAVE_S)
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=LEAVE_S)
        self._task = None

    # -- one connection after the other ---------------------------------------------------------

    async def _run(self) -> None:
        backoff = Backoff(self._chance)
        while not self._ending:
            try:
                await self._connect_once()
            except Exception as error:  # noqa: BLE001 - aiomqtt does not convert all that paho raises
                self.failures += 1
                self._log_change(str(error.__cause__ or error) or type(error).__name__)
            else:
                continue
            finally:
                self._connected = False
            steady, self._up_since = self._steady, None
            await asyncio.sleep(backoff.next_s(worked=steady))

    @property
    def _steady(self) -> bool:
        """Whether the connection has been up for more than STEADY_S."""
        since = self._up_since
        return since is not None and self._clock.boottime() - since > STEADY_S

    def _log_change(self, trouble: str | None) -> None:
        """Log a change of the connection, but not each attempt."""
        if trouble == self._trouble:
            return
        self._trouble = trouble
        broker = self._settings.broker
        if trouble is None:
            log.info("role is announced by MQTT", broker=broker, topic=self._own)
        else:
            log.warning("role is not announced by MQTT", broker=broker, reason=trouble)

    async def _connect_once(self) -> None:
        """Keep one connection, until the exit, or until another last will is needed."""
        access = await self._access.load()
        visible = self._visible
        born_ms = self._now_ms()
        if self._sparkplug and visible:
            born_ms = self._newest_ms = max(born_ms, self._newest_ms + 1)
        self._outdated = False
        will = Will(self._own, offline(born_ms), qos=1, retain=True) if visible else None
        self._retained.clear()
        self._echoes.clear()
        self._seen_epoch = -1
        async with connected(access, will=will, client_id=self._client_id) as client:
            self._connected = True
            await subscribe(client, *self._topics)
            if visible and self._visible:  # its acknowledgement comes after the retained messages
                await self._publish(client, self._own, self._online(born_ms))
            while len(client.messages):
                self._on_message(await anext(client.messages), born_ms)
            self._up_since = self._clock.boottime()
            self._log_change(None)
            work = [
                asyncio.create_task(self._receive(client, born_ms)),
                asyncio.create_task(self._keep_published(client, born_ms, visible=visible)),
            ]
            try:
                done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in work:
                    task.cancel()
                await asyncio.gather(*work, return_exceptions=True)

    async def _receive(self, client: Client, born_ms: int) -> None:
        """Receive messages on our topics until the connection is lost, which only this notices."""
        async for message in client.messages:
            if self._on_message(message, born_ms):
                self._changed.set()
                await asyncio.sleep(CORRECTION_S)

    def _on_message(self, message: Message, born_ms: int) -> bool:
        """Record a message; return whether it is another client's, and newer than our publication."""
        topic, payload = message.topic.value, message.payload
        assert isinstance(payload, bytes)  # noqa: S101 - paho receives bytes
        if (topic, payload) in self._echoes:
            self._echoes.remove((topic, payload))
            return False
        if topic not in self._topics:
            return False
        if not self._sparkplug and topic == self._primary:
            self._seen_epoch = max(self._seen_epoch, parse_epoch(payload))
        if self._sparkplug:
            self._on_state(payload, born_ms)
        if message.retain and topic in self._retained:  # retained before we published
            return False
        self._retained[topic] = payload
        return True

    def _on_state(self, payload: bytes, born_ms: int) -> None:
        """Notice an ``offline`` that overrides our older ``online`` at edge nodes."""
        online, time_ms = parse_state(payload)
        self._newest_ms = max(self._newest_ms, time_ms)
        if not online and time_ms > born_ms and self._visible and not self._outdated:
            self._outdated = True
            self._changed.set()
            log.warning(
                "newer offline STATE found; reconnecting with a newer timestamp",
                topic=self._own,
                timestamp=time_ms,
                ours=born_ms,
                resolution="synchronize the clocks of all members, and give no other host this id",
            )

    async def _keep_published(self, client: Client, born_ms: int, *, visible: bool) -> None:
        """Keep the broker's messages current, until the exit, or until a reconnect is needed."""
        reconnect_at: float | None = None
        while not self._ending and self._visible is visible:
            self._changed.clear()
            if visible:
                for topic, payload in self._wanted(born_ms):
                    if self._retained.get(topic) != payload:
                        await self._publish(client, topic, payload)
            if self._outdated and reconnect_at is None:
                now = asyncio.get_running_loop().time()
                reconnect_at = now + self._reconnects.next_s(worked=self._steady)
            try:
                async with asyncio.timeout_at(reconnect_at):
                    await self._changed.wait()
            except TimeoutError:  # a newer timestamp needs a new last will, so a new connection
                await self._publish(client, self._own, offline(born_ms))
                return
        others = self._sparkplug and self._retained.get(self._own) != self._online(born_ms)
        if visible and not others:  # else the next primary has announced itself there
            left_ms = max(born_ms, self._now_ms())
            self._newest_ms = max(self._newest_ms, left_ms)
            await self._publish(client, self._own, offline(left_ms))

    async def _publish(self, client: Client, topic: str, payload: bytes) -> None:
        self._retained[topic] = payload
        self._echoes.append((topic, payload))
        await client.publish(topic, payload, qos=1, retain=True)

    # -- payloads -------------------------------------------------------------------------------

    @property
    def _visible(self) -> bool:
        """Whether this member publishes: in Sparkplug's STATE, only the primary does."""
        return not self._sparkplug or self._state.role is Role.PRIMARY

    def _wanted(self, born_ms: int) -> Iterator[tuple[str, bytes]]:
        """Topics with the payloads that they should have."""
        yield self._own, self._online(born_ms)
        state = self._state
        if self._sparkplug or state.role is not Role.PRIMARY:
            return
        behind = state.epoch is not None and state.epoch < self._seen_epoch
        if behind and not self._behind:
            log.warning(
                "primary is not announced by MQTT",
                topic=self._primary,
                epoch=state.epoch,
                reason=f"a newer epoch, {self._seen_epoch}, is retained there",
                resolution="if there was no such tenure, clear the topic: publish an empty retained message",
            )
        self._behind = behind
        if not behind:
            yield (
                self._primary,
                _json(
                    session=self._session, epoch=state.epoch, since=format_date_time(state.since)
                ),
            )

    def _online(self, born_ms: int) -> bytes:
        if self._sparkplug:
            return _json(online=True, timestamp=born_ms)
        state = self._state
        return _json(
            role=state.role.value,
            epoch=state.epoch,
            since=format_date_time(state.since),
            timestamp=born_ms,
            online=True,
        )

    def _now_ms(self) -> int:
        return int(self._clock.wall().timestamp() * 1000)


def _json(**fields: object) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def offline(time_ms: int) -> bytes:
    """The payload of the last will, and of a clean exit."""
    return _json(online=False, timestamp=time_ms)


def parse_epoch(payload: bytes) -> int:
    """Parse the epoch of a payload on the group's topic; -1 if no agent has published it."""
    if len(payload) > LONGEST_PAYLOAD:
        return -1
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError):
        return -1
    epoch = fields.get("epoch") if isinstance(fields, dict) else None
    if isinstance(epoch, bool) or not isinstance(epoch, int) or not 0 <= epoch <= LARGEST_EPOCH:
        return -1
    return epoch


def parse_state(payload: bytes) -> tuple[bool, int]:
    """Parse a Sparkplug STATE: whether it is ``online``, and its timestamp; -1 if edge nodes ignore it."""
    try:
        fields = json.loads(payload) if len(payload) <= LONGEST_PAYLOAD else None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return False, -1
    time_ms = fields.get("timestamp")
    if isinstance(time_ms, bool) or not isinstance(time_ms, int):
        return False, -1
    if not 0 <= time_ms <= LARGEST_TIMESTAMP:
        return False, -1
    return fields.get("online") is True, time_ms


def topic_level(name: str) -> str:
    """An id as one level of a topic: ``+``, ``#`` and ``%`` are escaped as in URLs."""
    return re.sub(r"[+#%]", lambda found: f"%{ord(found[0]):02X}", name)


def default_client_id(group: str, session: str) -> str:
    """The client id of a member; 23 characters, which every broker has to accept."""
    digest = hashlib.sha256(f"{group}/{session}".encode()).hexdigest()
    return f"failover{digest[:15]}"
