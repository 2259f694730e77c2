"""Announcements of this member's role to an MQTT broker (docs/mqtt.md). Advisory, in a task of its own.

Owns the topics of one session, and one slot for what is to be said: a state, not a history, so a
newer one replaces one that still waits. Whoever announces never waits and never fails. Level-triggered:
what the broker has on our topics is followed, and anything else than the truth there is replaced, be
it garbage or the last will of a connection that was lost. Knows nothing of leases and decides nothing.
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
from agent.ops.mqtt import Waits, access_of, connected, subscribe
from agent.schema.scalars import format_date_time
from agent.settings.values import Mqtt

LEAVE_S = 1.0
"""How long the exit waits until a connected broker has taken ``offline``."""

CORRECT_S = 1.0
"""Between two looks at what others write to our topics: two who both correct cannot make a storm."""

STEADY_S = 10.0
"""A connection that lasted so long was good; two clients with one id throw each other out at once, and
are to do it ever more seldom."""

MOST_ECHOES = 8
"""Publications of ours that are still to come back to us as subscribers; there are two topics."""

LONGEST_READ = 4096
"""Bytes of an announcement: ours have some hundred."""

LARGEST_EPOCH = 2**63 - 1
LARGEST_TIMESTAMP = 2**64 - 2
"""Of a Sparkplug STATE: 64 bits, and one that is newer must be possible."""

log = Log(__name__)


class Said(Protocol):
    """What a member says of itself: a frozen record. ``since`` when it has this role (aware, UTC)."""

    @property
    def role(self) -> Role: ...
    @property
    def epoch(self) -> int | None: ...
    @property
    def since(self) -> datetime: ...


class Announcer:
    """One member of one group, at one broker. Make it in a running loop, ``start``, ``stop``.

    Args:
        settings: the broker, and what is said how.
        group: id of the group.
        session: id of the member.
        clock: for timestamps.
        first: what is true now.
        chance: jitter, from 0 up to 1.

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
        first: Said,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._access = access_of(settings, "mqtt")
        self._session = session
        self._clock = clock
        self._chance = chance
        self._sparkplug = settings.payload == "sparkplug"
        if self._sparkplug:
            self._own = f"spBv1.0/STATE/{settings.sparkplug_host_id or level(group)}"
            self._topics: tuple[str, ...] = (self._own,)
        else:
            base = f"{settings.topic_prefix}/{level(group)}"
            self._own = f"{base}/sessions/{level(session)}"
            self._primary = f"{base}/primary"
            self._topics = (self._own, self._primary)
        self._client_id = settings.client_id or default_client_id(group, session)
        self._said = first
        self._changed = asyncio.Event()
        self._held: dict[str, bytes] = {}
        self._seen_epoch = -1
        self._newest_ms = -1
        """The newest timestamp of any STATE, ours too; edge nodes ignore what is older."""
        self._outdated = False
        self._rebirths = Waits(chance)
        self._behind = False
        self._ending = False
        self._echoes: deque[tuple[str, bytes]] = deque(maxlen=MOST_ECHOES)
        self._up_since: float | None = None
        self._connected = False
        """Whether the broker may hold an ``online`` of this connection."""
        self.failures = 0
        """Connections that failed or were lost."""
        self._trouble: str | None = ""
        self._task: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """Whether the broker is connected, and told."""
        return self._up_since is not None

    def announce(self, said: Said) -> None:
        """Say this as soon as the broker can be told. Never waits, never raises."""
        self._said = said
        self._changed.set()

    def start(self) -> None:
        """Begin to announce."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Say offline, if there is a broker that takes it within LEAVE_S; then leave it."""
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
        waits = Waits(self._chance)
        while not self._ending:
            try:
                await self._visit()
            except Exception as error:  # noqa: BLE001 - paho raises more than aiomqtt turns into its own
                self.failures += 1
                self._tell(str(error.__cause__ or error) or type(error).__name__)
            else:
                continue
            finally:
                self._connected = False
            steady, self._up_since = self._steady, None
            await asyncio.sleep(waits.next_s(worked=steady))

    @property
    def _steady(self) -> bool:
        """Whether the connection is up, and has been so for long."""
        since = self._up_since
        return since is not None and self._clock.boottime() - since > STEADY_S

    def _tell(self, trouble: str | None) -> None:
        """Log a change of the connection, not each attempt."""
        if trouble == self._trouble:
            return
        self._trouble = trouble
        broker = self._settings.broker
        if trouble is None:
            log.info("role is announced by MQTT", broker=broker, topic=self._own)
        else:
            log.warning("role is not announced by MQTT", broker=broker, reason=trouble)

    async def _visit(self) -> None:
        """One connection. Ends when we leave, and when what its last will would say is wrong."""
        speaks = self._speaks
        born_ms = self._now_ms()
        if self._sparkplug and speaks:
            born_ms = self._newest_ms = max(born_ms, self._newest_ms + 1)
        self._outdated = False
        will = Will(self._own, offline(born_ms), qos=1, retain=True) if speaks else None
        self._held.clear()
        self._echoes.clear()
        self._seen_epoch = -1
        async with connected(self._access, will=will, client_id=self._client_id) as client:
            self._connected = True
            await subscribe(client, *self._topics)
            if speaks and self._speaks:  # the answer to it comes after what is retained
                await self._put(client, self._own, self._online(born_ms))
            while len(client.messages):
                self._see(await anext(client.messages), born_ms)
            self._up_since = self._clock.boottime()
            self._tell(None)
            work = [
                asyncio.create_task(self._follow(client, born_ms)),
                asyncio.create_task(self._keep_told(client, born_ms, speaks=speaks)),
            ]
            try:
                done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in work:
                    task.cancel()
                await asyncio.gather(*work, return_exceptions=True)

    async def _follow(self, client: Client, born_ms: int) -> None:
        """Take in what is on our topics until the connection is lost, which only this would notice."""
        async for message in client.messages:
            if self._see(message, born_ms):
                self._changed.set()
                await asyncio.sleep(CORRECT_S)

    def _see(self, message: Message, born_ms: int) -> bool:
        """Whether it is news: from somebody else, and not older than what we have put there."""
        topic, payload = message.topic.value, message.payload
        assert isinstance(payload, bytes)  # noqa: S101 - what paho receives is
        if (topic, payload) in self._echoes:
            self._echoes.remove((topic, payload))
            return False
        if topic not in self._topics:
            return False
        if not self._sparkplug and topic == self._primary:
            self._seen_epoch = max(self._seen_epoch, epoch_in(payload))
        if self._sparkplug:
            self._see_state(payload, born_ms)
        if message.retain and topic in self._held:  # it was retained when we subscribed
            return False
        self._held[topic] = payload
        return True

    def _see_state(self, payload: bytes, born_ms: int) -> None:
        """Notice an ``offline`` that edge nodes believe rather than our older ``online``."""
        online, time_ms = state_in(payload)
        self._newest_ms = max(self._newest_ms, time_ms)
        if not online and time_ms > born_ms and self._speaks and not self._outdated:
            self._outdated = True
            self._changed.set()
            log.warning(
                "a newer offline STATE was found; connecting anew with a newer timestamp",
                topic=self._own,
                timestamp=time_ms,
                ours=born_ms,
                resolution="keep the clocks of all members in step, and give no other host this id",
            )

    async def _keep_told(self, client: Client, born_ms: int, *, speaks: bool) -> None:
        """Have the broker hold what is true, until this connection is not the right one for it."""
        reborn_at: float | None = None
        while not self._ending and self._speaks is speaks:
            self._changed.clear()
            if speaks:
                for topic, payload in self._wanted(born_ms):
                    if self._held.get(topic) != payload:
                        await self._put(client, topic, payload)
            if self._outdated and reborn_at is None:
                now = asyncio.get_running_loop().time()
                reborn_at = now + self._rebirths.next_s(worked=self._steady)
            try:
                async with asyncio.timeout_at(reborn_at):
                    await self._changed.wait()
            except TimeoutError:  # birth and will have one timestamp, so it takes a new connection
                await self._put(client, self._own, offline(born_ms))
                return
        others = self._sparkplug and self._held.get(self._own) != self._online(born_ms)
        if speaks and not others:  # the next primary's STATE stays
            left_ms = max(born_ms, self._now_ms())
            self._newest_ms = max(self._newest_ms, left_ms)
            await self._put(client, self._own, offline(left_ms))

    async def _put(self, client: Client, topic: str, payload: bytes) -> None:
        self._held[topic] = payload
        self._echoes.append((topic, payload))
        await client.publish(topic, payload, qos=1, retain=True)

    # -- what is said ---------------------------------------------------------------------------

    @property
    def _speaks(self) -> bool:
        """Whether this member is to be seen: in Sparkplug's STATE, the primary alone."""
        return not self._sparkplug or self._said.role is Role.PRIMARY

    def _wanted(self, born_ms: int) -> Iterator[tuple[str, bytes]]:
        """What our topics should hold."""
        yield self._own, self._online(born_ms)
        said = self._said
        if self._sparkplug or said.role is not Role.PRIMARY:
            return
        behind = said.epoch is not None and said.epoch < self._seen_epoch
        if behind and not self._behind:
            log.warning(
                "primary is not announced by MQTT",
                topic=self._primary,
                epoch=said.epoch,
                reason=f"a newer epoch, {self._seen_epoch}, is retained there",
                resolution="if no such tenure ever was, clear the topic: publish nothing, retained",
            )
        self._behind = behind
        if not behind:
            yield (
                self._primary,
                _json(session=self._session, epoch=said.epoch, since=format_date_time(said.since)),
            )

    def _online(self, born_ms: int) -> bytes:
        if self._sparkplug:
            return _json(online=True, timestamp=born_ms)
        said = self._said
        return _json(
            role=said.role.value,
            epoch=said.epoch,
            since=format_date_time(said.since),
            timestamp=born_ms,
            online=True,
        )

    def _now_ms(self) -> int:
        return int(self._clock.wall().timestamp() * 1000)


def _json(**told: object) -> bytes:
    return json.dumps(told, ensure_ascii=False).encode()


def offline(time_ms: int) -> bytes:
    """What the last will says, and a clean leave."""
    return _json(online=False, timestamp=time_ms)


def epoch_in(payload: bytes) -> int:
    """The epoch that the group's topic tells, or -1 for what no agent has put there."""
    if len(payload) > LONGEST_READ:
        return -1
    try:
        told = json.loads(payload)
    except (ValueError, RecursionError):
        return -1
    epoch = told.get("epoch") if isinstance(told, dict) else None
    if isinstance(epoch, bool) or not isinstance(epoch, int) or not 0 <= epoch <= LARGEST_EPOCH:
        return -1
    return epoch


def state_in(payload: bytes) -> tuple[bool, int]:
    """Whether a Sparkplug STATE is ``online``, and its timestamp, or -1 for what edge nodes ignore."""
    try:
        told = json.loads(payload) if len(payload) <= LONGEST_READ else None
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        return False, -1
    time_ms = told.get("timestamp")
    if isinstance(time_ms, bool) or not isinstance(time_ms, int):
        return False, -1
    if not 0 <= time_ms <= LARGEST_TIMESTAMP:
        return False, -1
    return told.get("online") is True, time_ms


def level(name: str) -> str:
    """An id as one level of a topic: ``+``, ``#`` and ``%`` as in URLs."""
    return re.sub(r"[+#%]", lambda found: f"%{ord(found[0]):02X}", name)


def default_client_id(group: str, session: str) -> str:
    """The same for the same member, and in the form that every broker has to take: 23 characters."""
    digest = hashlib.sha256(f"{group}/{session}".encode()).hexdigest()
    return f"failover{digest[:15]}"
