"""Facts that coordinators have acknowledged to a client, and whether they still know them.

A client asks a coordinator at random, and keeps what each answer has promised. A change without an answer may have
happened or not, now or later, until a later change of the same thing is acknowledged. Owns one thread.
"""

import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from .requests import Reply

PERIOD_S = 0.15
KEPT = 150
"""Groups that exist at a time; the oldest are deleted, and must be gone."""

GROUP = "ledger"
PROGRESS = "progress"
PRIMARY = 1
SESSIONS = ("s0", "s1", "s2")
DURABLE_S = 1.0
"""Within this the data-processed time is durable (R13); between changes of role an answer does not wait for it."""

PATIENCE_S = 30.0

Ask = Callable[[int, str, str, object], Reply | None]


class Fact:
    """One thing that can be changed: its value as acknowledged, and the values that it may have instead."""

    def __init__(self, path: str, read: Callable[[Reply], Any], value: object) -> None:
        self.path = path
        self.read = read
        self.possible: list[object] = [value]


class Ledger:
    """The client. ``failure`` is the first broken promise, which ``check`` raises."""

    def __init__(self, ask: Ask, chance: random.Random) -> None:
        self._ask = ask
        self._chance = chance
        self._facts: dict[str, Fact] = {}
        self._groups: list[str] = []
        self._made = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ledger")
        self.failure: str | None = None
        self.acknowledged = 0
        self.unanswered = 0
        self.read = 0
        self._progress = datetime.min.replace(tzinfo=UTC)

    def start(self) -> None:
        """Begin."""
        self.prepare()
        self._thread.start()

    def prepare(self) -> None:
        """Make the groups and sessions that facts are about."""
        timeout = "00:00:02"
        for group in (GROUP, PROGRESS):
            self._insist("POST", "groups", {"Id": group, "FailoverTimeout": timeout}, {200, 201})
        for session in SESSIONS:
            path = f"groups/{GROUP}/clientsessions"
            self._insist("POST", path, {"Id": session}, {200, 201})
            fact = Fact(f"{path}/{session}", lambda reply: reply.body["RoleOverride"], 0)
            self._facts[f"override of {session}"] = fact
        self._insist("POST", f"groups/{PROGRESS}/clientsessions", {"Id": "p"}, {200, 201})

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def record_progress(self) -> None:
        """Have a data-processed time of a primary acknowledged, and wait until it has to be durable."""
        now = datetime.now(UTC)
        self._beat(now, {"LastDataProcessedTime": now.isoformat()})
        self._progress = now
        time.sleep(DURABLE_S)

    def check(self) -> None:
        """Read everything back; raises AssertionError for a fact that was lost."""
        assert self.failure is None, self.failure
        with self._lock:
            for name in list(self._facts):
                self._verify(name, insist=True)
        assert self.failure is None, self.failure
        self._beat(self._progress, {})

    def _beat(self, at_least: datetime, progress: dict[str, str]) -> None:
        """Heartbeats of the one session of a group, until an answer has that progress, or a later one.

        The heartbeat that makes it primary is too early: its progress is from before the tenure (R18).
        """
        path = f"groups/{PROGRESS}/clientsessions/p/heartbeat"
        end_at = time.monotonic() + PATIENCE_S
        while True:
            body = {"FailoverScore": 100, **progress}
            reply = self._ask(self._chance.randrange(3), "POST", path, body)
            answer = reply.body if reply is not None and reply.status == HTTPStatus.OK else {}
            shown = answer.get("LastDataProcessedTime")
            if shown is not None and datetime.fromisoformat(shown) >= at_least:
                return
            lost = answer.get("Role") == PRIMARY and not progress
            assert not lost, f"progress {at_least} is lost: {answer}"
            assert time.monotonic() < end_at, f"a lone session does not become primary: {reply}"
            time.sleep(PERIOD_S)

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended.wait(PERIOD_S):
            self.act()

    def act(self) -> None:
        """Change or read one fact, chosen at random."""
        with self._lock:
            self._chance.choice((self._create, self._override, self._override, self._look))()
            if len(self._groups) > KEPT:
                self._delete()

    def _create(self) -> None:
        self._made += 1
        name = f"fact-{self._made}"
        data = {"Number": self._made, "Padding": "x" * self._chance.randrange(2000)}
        fact = Fact(f"groups/{name}", lambda reply: reply.body.get("AdditionalData"), None)
        self._facts[name] = fact
        self._groups.append(name)
        body = {"Id": name, "FailoverTimeout": "00:00:30", "AdditionalData": data}
        self._change(fact, data, "POST", "groups", body)

    def _delete(self) -> None:
        name = self._groups[0]
        fact = self._facts[name]
        self._change(fact, None, "DELETE", fact.path, None)
        if fact.possible == [None]:
            self._groups.pop(0)
            self._verify(name)
            del self._facts[name]

    def _override(self) -> None:
        name = f"override of {self._chance.choice(SESSIONS)}"
        fact = self._facts[name]
        value = self._chance.choice((0, 1))
        self._change(fact, value, "POST", f"{fact.path}/roleoverride", {"Value": value})

    def _look(self) -> None:
        self._verify(self._chance.choice(list(self._facts)))

    def _change(self, fact: Fact, value: object, method: str, path: str, body: object) -> None:
        reply = self._ask(self._chance.randrange(3), method, path, body)
        # Asked again, a creation is answered 200, and a deletion 404.
        good = {204, 404} if method == "DELETE" else {200, 201}
        if reply is not None and reply.status in good:
            fact.possible = [value]
            self.acknowledged += 1
        else:
            fact.possible.append(value)
            self.unanswered += 1

    def _verify(self, name: str, *, insist: bool = False) -> None:
        fact = self._facts[name]
        if insist:
            reply: Reply | None = self._insist("GET", fact.path, None, {200, 404})
        else:
            reply = self._ask(self._chance.randrange(3), "GET", fact.path, None)
        if reply is None or reply.status not in {200, 404}:
            return
        self.read += 1
        found = None if reply.status == 404 else fact.read(reply)
        if found not in fact.possible and self.failure is None:
            self.failure = f"{name} is {found!r}, acknowledged was {fact.possible!r}"

    def _insist(self, method: str, path: str, body: object, good: set[int]) -> Reply:
        end_at = time.monotonic() + PATIENCE_S
        while True:
            reply = self._ask(self._chance.randrange(3), method, path, body)
            if reply is not None and reply.status in good:
                return reply
            assert time.monotonic() < end_at, f"{method} {path} fails: {reply}"
            time.sleep(0.05)
