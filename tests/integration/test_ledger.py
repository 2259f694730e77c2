"""The ledger finds what a coordinator has lost."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from .ledger import Ledger
from .requests import Reply


class Service:
    """A coordinator in memory, of which one answer in some has no effect."""

    def __init__(self, loses: str = "", every: int = 3) -> None:
        self._loses = loses
        self._every = every
        self._changes = 0
        self._groups: dict[str, Any] = {}
        self._overrides: dict[str, int] = {}
        self._progress = ""

    def ask(self, number: int, method: str, path: str, body: Any) -> Reply | None:
        parts = path.split("/")
        kind = {1: "group", 2: "group", 3: "session", 4: "session", 5: parts[-1]}[len(parts)]
        if method == "GET":
            return self._read(kind, parts)
        self._changes += kind == self._loses
        lost = kind == self._loses and self._changes % self._every == 0
        match method, kind:
            case "POST", "group":
                if not lost:
                    self._groups[body["Id"]] = body.get("AdditionalData")
                return Reply(201, {})
            case "DELETE", "group":
                self._groups.pop(parts[1], None)
                return Reply(204, None)
            case "POST", "session":
                return Reply(201, {})
            case "POST", "roleoverride":
                if not lost:
                    self._overrides[parts[3]] = body["Value"]
                return Reply(200, {})
            case _:
                if "LastDataProcessedTime" in body:
                    self._progress = body["LastDataProcessedTime"]
                return Reply(200, {"Role": 1, "LastDataProcessedTime": self._progress})

    def _read(self, kind: str, parts: list[str]) -> Reply:
        if kind == "session":
            return Reply(200, {"RoleOverride": self._overrides.get(parts[3], 0)})
        if parts[1] not in self._groups:
            return Reply(404, {})
        return Reply(200, {"AdditionalData": self._groups[parts[1]]})

    def forget_progress(self) -> None:
        self._progress = "2026-01-01T00:00:00+00:00"


def acts(ledger: Ledger) -> None:
    for _ in range(300):
        ledger.act()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[Service], Ledger]:
    def made(service: Service) -> Ledger:
        monkeypatch.setattr("tests.integration.ledger.DURABLE_S", 0.0)
        ledger = Ledger(service.ask, random.Random(1))
        ledger.prepare()
        return ledger

    return made


def test_a_coordinator_that_keeps_everything_passes(make: Callable[[Service], Ledger]) -> None:
    ledger = make(Service())
    ledger.record_progress()
    acts(ledger)
    ledger.check()
    assert ledger.acknowledged > 100
    assert ledger.read > 100


@pytest.mark.parametrize("loses", ["group", "roleoverride"])
def test_a_lost_fact_is_found(make: Callable[[Service], Ledger], loses: str) -> None:
    ledger = make(Service(loses))
    acts(ledger)
    with pytest.raises(AssertionError, match="acknowledged was"):
        ledger.check()


def test_lost_progress_is_found(make: Callable[[Service], Ledger]) -> None:
    service = Service()
    ledger = make(service)
    ledger.record_progress()
    service.forget_progress()
    with pytest.raises(AssertionError, match="is lost"):
        ledger.check()
