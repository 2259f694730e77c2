"""sessions: against a real coordinator, and against a server that has only plain v1."""

import asyncio
import io
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest

from agent.drivers.rest import RestClient
from agent.errors import ExitCode
from agent.model import SessionConfig, SessionView

from .test_remote import PLAIN, become_primary, plain

__all__ = ["plain"]  # a fixture, used by its name

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def at(endpoint: str) -> str:
    return f"--endpoint={endpoint}"


@pytest.fixture
def group(cli: Cli, at: str, endpoint: str) -> str:
    """A group with the active primary ``host-a``."""
    name = f"alive-{uuid.uuid4()}"
    assert cli("groups", "create", name, at, "--failover-timeout", "60")[0] == 0
    become_primary(endpoint, name, "host-a")
    return name


@pytest.fixture
def dead(cli: Cli, at: str, endpoint: str) -> str:
    """A group with the sessions ``gone`` and ``lost``, which are dead."""
    assert cli("groups", "create", "dead", at, "--failover-timeout", "0.2")[0] == 0

    async def join() -> None:
        client = RestClient([endpoint])
        try:
            for session_id in ("gone", "lost"):
                await client.join("dead", SessionConfig(session_id), timeout_s=10)
        finally:
            await client.aclose()

    asyncio.run(join())
    until = time.monotonic() + 30
    while any(one["Active"] for one in listed(cli, at, "dead")):
        assert time.monotonic() < until
    return "dead"


def listed(cli: Cli, at: str, name: str) -> list[dict[str, object]]:
    code, out, _ = cli("sessions", "list", name, at, "--json")
    assert code == 0
    found: list[dict[str, object]] = json.loads(out)
    return found


def test_sessions_are_listed_with_their_silence(cli: Cli, at: str, group: str, dead: str) -> None:
    code, out, _ = cli("sessions", "list", group, at)
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["session", "name", "role", "active", "silent", "since", "override"],
        ["host-a", "Host", "A", "Primary", "yes", "-", "Off"],
    ]
    out = cli("sessions", "list", dead, at)[1]
    row = next(line.split() for line in out.splitlines() if line.startswith("gone "))
    assert row[1:4] == ["-", "Secondary", "no"]
    assert row[5].endswith("Z")


def test_a_dead_session_is_forgotten(cli: Cli, at: str, dead: str) -> None:
    assert cli("sessions", "forget", dead, "gone", at, "--yes") == (
        0,
        "session gone of group dead is forgotten\n",
        "",
    )
    assert "gone" not in {one["Id"] for one in listed(cli, at, dead)}
    code, out, _ = cli("sessions", "forget", dead, "lost", at, "--yes", "--json")
    assert (code, json.loads(out)) == (0, {"Forgotten": "lost"})
    code, _, err = cli("sessions", "forget", dead, "lost", at, "--yes")
    assert code == ExitCode.REFUSED
    assert "there is no session lost in group dead" in err


def test_an_active_session_is_not_forgotten(cli: Cli, at: str, group: str) -> None:
    code, out, err = cli("sessions", "forget", group, "host-a", at, "--yes")
    assert (code, out) == (ExitCode.REFUSED, "")
    assert f"session host-a of group {group} is active, with the role Primary: stop its" in err
    assert err.count("\n") == 1
    assert {one["Id"] for one in listed(cli, at, group)} == {"host-a"}


def test_the_coordinator_refuses_one_that_has_become_active_meanwhile(
    cli: Cli, at: str, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = RestClient.sessions

    async def as_before(self: RestClient, group: str, *, timeout_s: float) -> list[SessionView]:
        found = await sessions(self, group, timeout_s=timeout_s)
        return [replace(one, active=False) for one in found]

    monkeypatch.setattr(RestClient, "sessions", as_before)
    code, _, err = cli("sessions", "forget", group, "host-a", at, "--yes")
    assert code == ExitCode.REFUSED
    assert 'Client session "host-a" is active' in err
    assert {one["Id"] for one in listed(cli, at, group)} == {"host-a"}


@pytest.mark.parametrize(
    ("typed", "forgotten"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_forgetting_asks_first(
    cli: Cli, at: str, dead: str, monkeypatch: pytest.MonkeyPatch, typed: str, *, forgotten: bool
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    code, _, err = cli("sessions", "forget", dead, "gone", at)
    assert "Forget session gone of group dead?" in err
    assert (code == 0) is forgotten
    assert ("nothing was changed" in err) is not forgotten
    assert ("gone" in {one["Id"] for one in listed(cli, at, dead)}) is not forgotten


def test_without_any_input_nothing_is_forgotten(
    cli: Cli, at: str, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    code, _, err = cli("sessions", "forget", dead, "gone", at)
    assert code != 0
    assert "add --yes" in err
    assert "gone" in {one["Id"] for one in listed(cli, at, dead)}


def test_a_plain_v1_server_is_not_asked_to_forget(
    cli: Cli, plain: tuple[str, list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not know the condition, and would delete an active session as well."""
    session = {"Id": "s", "Role": 0}
    monkeypatch.setitem(PLAIN, "/clientfailover/groups/g/clientsessions", [session])
    code, out, _ = cli("sessions", "list", "g", f"--endpoint={plain[0]}")
    assert (code, out.splitlines()[1].split()) == (0, ["s", "-", "Secondary", "-", "-", "Off"])
    code, _, err = cli("sessions", "forget", "g", "s", f"--endpoint={plain[0]}", "--yes")
    assert code == ExitCode.REFUSED
    assert "does not report which sessions are active" in err


@pytest.mark.parametrize("words", [("list", "none"), ("forget", "none", "s", "--yes")])
def test_a_group_that_is_not_there_is_named(cli: Cli, at: str, words: tuple[str, ...]) -> None:
    code, _, err = cli("sessions", *words, at)
    assert code == ExitCode.REFUSED
    assert "none" in err
    assert err.count("\n") == 1
