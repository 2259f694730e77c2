"""failsafe lift, and what status shows of failsafe: against a real coordinator."""

import asyncio
import io
import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from agent.drivers.rest import RestClient
from agent.errors import ExitCode, ServerError
from agent.model import TICKS_PER_SECOND, GroupConfig, Role, SessionConfig

TOO_SOON = 429

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def at(endpoint: str) -> str:
    return f"--endpoint={endpoint}"


async def beat(client: RestClient, group: str, session: str, **more: Any) -> Role:
    """A heartbeat, as soon as the minimum interval of the group has passed."""
    while True:
        try:
            return await send_beat(client, group, session, **more)
        except ServerError as error:
            if error.status != TOO_SOON:
                raise
            await asyncio.sleep(0.02)


async def send_beat(client: RestClient, group: str, session: str, **more: Any) -> Role:
    answer = await client.heartbeat(
        group,
        session,
        score=100.0,
        last_data=None,
        instance=f"{session}1",
        seen_epoch=more.get("holds", 0),
        timeout_s=10,
        failsafe_url=f"http://{session}:9",
        **more,
    )
    return answer.role


def make_primary(endpoint: str, lease_s: float) -> str:
    """A group whose primary a uses a set of a and b."""
    group = f"failsafe-{uuid.uuid4()}"

    async def work() -> None:
        client = RestClient([endpoint])
        try:
            wanted = GroupConfig(group, round(lease_s * TICKS_PER_SECOND))
            await client.create_group(wanted, timeout_s=10)
            for session in ("a", "b"):
                await client.join(group, SessionConfig(session), timeout_s=10)
            while await beat(client, group, "a") is not Role.PRIMARY:
                pass
            await beat(client, group, "b")
            for revision in (0, 1):
                await beat(client, group, "a", holds=1, failsafe_revision=revision)
        finally:
            await client.aclose()

    asyncio.run(work())
    return group


def restricted(cli: Cli, at: str, endpoint: str) -> str:
    """The same after the lease of its primary has ended."""
    group = make_primary(endpoint, 1.0)
    until = time.monotonic() + 30
    while "Restricted" not in cli("status", group, at)[1]:
        assert time.monotonic() < until
    return group


def lift(cli: Cli, group: str, at: str, *flags: str, epoch: int = 1) -> tuple[int, str, str]:
    return cli("failsafe", "lift", group, at, f"--epoch={epoch}", "--reason=a is scrapped", *flags)


def rows(text: str) -> dict[str, str]:
    pairs = [line.split("  ", 1) for line in text.split("\n\n", maxsplit=1)[0].splitlines()]
    return {pair[0].strip(): pair[-1].strip() for pair in pairs}


def test_status_shows_that_failsafe_is_ready(cli: Cli, at: str, endpoint: str) -> None:
    group = make_primary(endpoint, 60.0)
    code, out, _ = cli("status", group, at)
    assert code == 0
    assert rows(out)["failsafe"] == "Ready"
    assert rows(out)["failsafe members"] == "a (http://a:9), b (http://b:9)"
    code, _, err = lift(cli, group, at, "--yes")
    assert code == ExitCode.REFUSED
    assert "session a is primary" in err


def test_a_restricted_group_is_shown_and_lifted_after_a_question(
    cli: Cli, at: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = restricted(cli, at, endpoint)
    shown = rows(cli("status", group, at)[1])
    why = 'client session "a" may still be primary by failsafe in epoch 1'
    assert shown["failsafe"] == f"Restricted: {why}"
    assert shown["choosable"] == "a (http://a:9), b (http://b:9)"
    assert shown["may be active"] == "a in epoch 1"
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    code, _, err = lift(cli, group, at)
    assert code == 130
    assert f"{why}.\nIs no member of group {group} active, on any host?" in err
    assert "nothing was changed" in err
    code, _, err = lift(cli, group, at, "--yes", epoch=7)
    assert (code, "is 1, not 7" in err) == (ExitCode.REFUSED, True)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    code, out, _ = lift(cli, group, at)
    assert (code, out) == (0, f"every member of group {group} may be promoted now\n")
    history = json.loads(cli("groups", "show", group, at, "--json")[1])["History"]
    assert history[0]["WhyStarted"] == "lifted by an operator: a is scrapped"
    code, _, err = lift(cli, group, at, "--yes")
    assert (code, "is not restricted" in err) == (ExitCode.REFUSED, True)


def test_a_lift_without_a_question_is_printed_as_json(cli: Cli, at: str, endpoint: str) -> None:
    group = restricted(cli, at, endpoint)
    code, out, _ = lift(cli, group, at, "--yes", "--json")
    assert (code, json.loads(out)) == (0, {"Lifted": group, "Epoch": 1})


@pytest.mark.parametrize("reason", ["", "x" * 257])
def test_a_reason_has_to_be_given(cli: Cli, at: str, reason: str) -> None:
    code, _, err = cli("failsafe", "lift", "g", at, "--epoch=1", f"--reason={reason}", "--yes")
    assert (code, "1 to 256 characters" in err) == (2, True)
