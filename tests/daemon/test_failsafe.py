"""Failsafe in a daemon of this process: its questions and its votes, and what becomes of faults."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import httpx2
import pytest

from agent.core.effects import Ask, Effect, Vote
from agent.core.events import Answered, Asked, Event
from agent.core.session import Session
from agent.daemon import failsafe as daemon_failsafe
from agent.daemon import guard_control
from agent.daemon.credential_files import CredentialFiles
from agent.daemon.failsafe import Failsafe
from agent.daemon.failsafe_report import Outcome
from agent.daemon.loop import Daemon
from agent.daemon.main import load_failsafe
from agent.drivers.failsafe.access import load_failsafe_access, warn_of_shared_url
from agent.drivers.failsafe.asker import Asker, AskError, Peer
from agent.drivers.failsafe.messages import LONGEST_WHY, Answer
from agent.drivers.guardian.supervisor import Guardian
from agent.drivers.rest import RestClient
from agent.drivers.statefile import StateFile
from agent.errors import ConfigError, ExitCode
from agent.model import Member
from tests.test_daemon import Host, endpoint, living, settings_for

__all__ = ["endpoint"]  # the fixture

SECRET, OTHER = "a secret of the whole group\n", "a secret of somebody else\n"
LIMIT_S = 20.0


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


def put(secret: Path, content: str) -> None:
    secret.write_text(content)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@asynccontextmanager
async def a_member(
    endpoint: str, directory: Path, secret: Path, **more: Any
) -> AsyncIterator[tuple[Host, Peer, Asker]]:
    """A daemon with failsafe that is not started yet, its URL, and another member that may ask it."""
    port = free_port()
    settings = settings_for(
        endpoint,
        **{"failsafe_listen": f"127.0.0.1:{port}", "failsafe_secret_file": str(secret), **more},
    )
    state_file = StateFile(directory / "state.json")
    state_file.acquire()
    credentials = CredentialFiles()

    async def make_client() -> RestClient:
        return RestClient(settings.endpoint)

    daemon = Daemon(
        settings,
        "host-a",
        make_client,
        state_file,
        load_failsafe=partial(load_failsafe, settings, credentials),
        credentials=credentials,
    )
    try:
        peer = Peer("host-a", str(settings.member_url))
        asker = Asker(settings.group, "host-b", "process", load_failsafe_access(settings))
        yield Host(daemon, state_file.path, []), peer, asker
    finally:
        daemon.close()
        state_file.close()


def failsafe_of(host: Host, post_event: Callable[[Event], None]) -> Failsafe:
    """One beside the daemon's own, for its member. It is not started."""
    member = host.daemon._member  # only a daemon makes one
    access = load_failsafe_access(member.settings)
    return Failsafe(member, access, vote=lambda _: Vote(yes=True, why=""), post_event=post_event)


async def answer_of(asker: Asker, peer: Peer, *, rehearsal: bool = False) -> Vote:
    answer = await asker.ask(peer, 100, rehearsal=rehearsal, limit_s=LIMIT_S)
    return Vote(answer.yes, answer.why)


async def test_a_member_answers_from_its_first_demotion_on_and_votes_by_its_core(
    endpoint: str, tmp_path: Path, secret: Path
) -> None:
    async with a_member(endpoint, tmp_path, secret) as (host, peer, asker), living(host):
        await host.until_role("Primary")
        vote = await answer_of(asker, peer)
        assert (vote.yes, vote.why) == (False, "it is Primary")
        failsafe = host.daemon.snapshot().failsafe
        assert failsafe is not None
        assert failsafe.votes == {Outcome.YES: 0, Outcome.NO: 1}
        await answer_of(asker, peer, rehearsal=True)
        assert host.daemon.snapshot().failsafe.votes[Outcome.NO] == 1  # type: ignore[union-attr] # see above


async def test_a_vote_of_a_member_that_cannot_reach_the_coordinator_promises(
    tmp_path: Path, secret: Path
) -> None:
    """R29, R30: joined or not."""
    nowhere = f"http://127.0.0.1:{free_port()}/api/v1/clientfailover"
    async with a_member(nowhere, tmp_path, secret) as (host, peer, asker), living(host):
        await host.until(lambda: "failsafe" in host.daemon.describe(), "a state")
        await host.until(lambda: host.daemon.snapshot().failsafe is not None, "the listener")
        end_at = asyncio.get_running_loop().time() + LIMIT_S
        while not (vote := await answer_of(asker, peer)).yes:
            assert asyncio.get_running_loop().time() < end_at, vote
        described = host.daemon.describe()["failsafe"]
        assert (described["state"], described["promised_to"]) == ("promised", "host-b")


async def test_the_page_of_hooks_has_each_field_of_the_state_file(
    endpoint: str, tmp_path: Path, secret: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs/hooks.md").read_text()
    table = page.split("## The state file, for sidecars")[1]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    documented = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    async with a_member(endpoint, tmp_path, secret) as (host, _, _), living(host):
        await host.until_role("Primary")
        assert sorted(documented) == sorted(host.daemon.describe())


async def test_without_failsafe_there_is_no_trace_of_it(endpoint: str, tmp_path: Path) -> None:
    state_file = StateFile(tmp_path / "state.json")
    state_file.acquire()
    settings = settings_for(endpoint)

    async def make_client() -> RestClient:
        return RestClient(settings.endpoint)

    daemon = Daemon(settings, "host-a", make_client, state_file)
    host = Host(daemon, state_file.path, [])
    async with living(host):
        await host.until_role("Primary")
        assert "failsafe" not in daemon.describe()
        assert daemon.snapshot().failsafe is None
    daemon.close()
    state_file.close()


async def test_a_changed_secret_is_put_into_force_without_losing_the_role(
    endpoint: str, tmp_path: Path, secret: Path
) -> None:
    async with a_member(endpoint, tmp_path, secret) as (host, peer, asker), living(host):
        await host.until_role("Primary")
        epoch = host.daemon.describe()["epoch"]
        await answer_of(asker, peer)
        put(secret, OTHER)
        end_at = asyncio.get_running_loop().time() + LIMIT_S
        while True:
            try:
                await answer_of(asker, peer)
            except AskError as error:
                assert "not made with the secret of this group" in str(error)  # noqa: PT017 - polled for
                break
            assert asyncio.get_running_loop().time() < end_at
        assert host.daemon.describe()["epoch"] == epoch


@pytest.mark.parametrize("content", ["short\n", ""])
async def test_a_secret_that_cannot_be_used_is_an_error_of_the_start(
    endpoint: str, tmp_path: Path, secret: Path, content: str
) -> None:
    async with a_member(endpoint, tmp_path, secret) as (host, _, _):
        put(secret, content)
        with pytest.raises(ConfigError, match="must be the secret in one line of at least 16"):
            await host.daemon.run(host.stop)


async def test_an_address_in_use_is_an_error_of_the_start(
    endpoint: str, tmp_path: Path, secret: Path
) -> None:
    async with a_member(endpoint, tmp_path, secret) as (host, peer, _):
        address = peer.url.rpartition("/")[2].partition(":")
        taken = socket.create_server((address[0], int(address[2])))
        with taken, pytest.raises(ConfigError) as caught:
            await host.daemon.run(host.stop)
        assert caught.value.exit_code is ExitCode.LISTEN


async def test_an_error_in_a_vote_is_a_no_and_stops_the_agent(
    endpoint: str, tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_session: Session, _asked: Asked, _now: float) -> tuple[Vote, tuple[Effect, ...]]:
        raise RuntimeError("a fault of ours")

    async with a_member(endpoint, tmp_path, secret) as (host, peer, asker), living(host) as task:
        await host.until_role("Primary")
        monkeypatch.setattr(Session, "vote", fails)
        vote = await answer_of(asker, peer)
        assert (vote.yes, vote.why) == (False, "the agent has failed")
        assert await asyncio.wait_for(task, LIMIT_S) == ExitCode.TASK_FAILED


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:99999", "http://[::1", f"http://{'z' * 64}:5480"]
)
async def test_a_stranger_with_a_url_that_cannot_be_used_does_not_stop_the_primary(
    endpoint: str, tmp_path: Path, secret: Path, url: str
) -> None:
    async with a_member(endpoint, tmp_path, secret) as (host, _, _), living(host) as task:
        await host.until_role("Primary")
        session = {"Id": "stranger", "Name": "s", "Instance": "i", "FailsafeUrl": url}
        async with httpx2.AsyncClient(trust_env=False) as http:
            sessions = await http.post(f"{endpoint}/groups/g/clientsessions", json=session)
            assert sessions.status_code == 201

        def is_asked() -> bool:
            members = host.daemon.describe()["failsafe"]["members"]
            return any("cannot be asked" in member["why"] for member in members)

        await host.until(is_asked, "the stranger to be asked")
        assert host.daemon.describe()["role"] == "Primary"
        host.stop.set()
        assert await asyncio.wait_for(task, LIMIT_S) == ExitCode.OK, "no task has failed"


async def test_what_members_answer_does_not_arm_the_guard_again(
    endpoint: str, tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = create_autospec(Guardian, instance=True, ready=True)
    monkeypatch.setattr(guard_control, "Guardian", lambda *_, **__: guard)
    async with a_member(endpoint, tmp_path, secret, guard=True) as (host, _, _), living(host):
        await host.until_role("Primary")
        assert "failsafe" in host.daemon.describe()
        arming = guard.arm.call_args.args[0]
        assert "failsafe" not in json.loads(arming.state[1])


async def test_the_reason_of_an_answer_is_cut_to_its_limit(
    endpoint: str, tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(*_: Any, **__: Any) -> Answer:
        return Answer(group="g", sender="b", to="host-a", nonce="", yes=False, why="w" * 3000)

    monkeypatch.setattr(Asker, "ask", ask)
    async with a_member(endpoint, tmp_path, secret) as (host, peer, _):
        events: list[Event] = []
        await failsafe_of(host, events.append).ask(Ask(Member("b", peer.url), 7, 1))
        assert events == [Answered(1, yes=False, why="w" * LONGEST_WHY)]


@pytest.mark.parametrize(
    ("coordinator", "listen", "url", "warned"),
    [
        ("http://c.example:8080/api/v1/clientfailover", "127.0.0.1:5480", None, True),
        ("http://c.example:8080/api/v1/clientfailover", "192.0.2.1:5480", None, False),
        (
            "http://c.example:8080/api/v1/clientfailover",
            "0.0.0.0:5480",
            "http://localhost:5480",
            True,
        ),
        (
            "http://c.example:8080/api/v1/clientfailover",
            "0.0.0.0:5480",
            "http://169.254.1.2:5480",
            True,
        ),
        ("http://c.example:8080/api/v1/clientfailover", "[::]:5480", "http://[fe80::1]:5480", True),
        (
            "http://c.example:8080/api/v1/clientfailover",
            "0.0.0.0:5480",
            "http://host-a.example:5480",
            False,
        ),
        ("http://localhost:8080/api/v1/clientfailover", "127.0.0.1:5480", None, False),
        ("http://127.0.0.1:8080/api/v1/clientfailover", "169.254.1.2:5480", None, False),
    ],
)
def test_a_url_that_another_host_may_have_too_is_warned_of(
    secret: Path, coordinator: str, listen: str, url: str | None, *, warned: bool
) -> None:
    more = {} if url is None else {"failsafe_url": url}
    settings = settings_for(
        coordinator, failsafe_listen=listen, failsafe_secret_file=str(secret), **more
    )
    assert (warn_of_shared_url(settings) is not None) is warned


async def test_a_url_that_another_host_may_have_is_logged_at_the_start(
    tmp_path: Path, secret: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_member("http://192.0.2.1:8080/api/v1/clientfailover", tmp_path, secret) as (
        host,
        _,
        _,
    ):
        failsafe = failsafe_of(host, lambda _: None)
        await failsafe.start()
        await failsafe.stop()
        lines = [record.getMessage() for record in caplog.records]
        assert lines.count("failsafe URL may not be unique") == 1


async def test_a_question_ends_in_one_event_whatever_becomes_of_it(
    endpoint: str, tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_member(endpoint, tmp_path, secret) as (host, peer, _):
        events: list[Event] = []
        failsafe = failsafe_of(host, events.append)
        await failsafe.start()
        unreachable = Member("host-c", f"http://127.0.0.1:{free_port()}")
        await failsafe.ask(Ask(unreachable, 7, 1))
        await failsafe.ask(Ask(Member("host-a", peer.url), 7, 2))
        monkeypatch.setattr(daemon_failsafe, "MAX_QUESTIONS", 0)
        crowded = failsafe_of(host, events.append)
        await crowded.ask(Ask(unreachable, 7, 3, rehearsal=True))
        await failsafe.stop()
        assert [(event.nonce, event.yes) for event in events if isinstance(event, Answered)] == [
            (1, False),
            (2, False),  # this member itself: its own question is none of another member
            (3, False),
        ]
        assert failsafe.snapshot().asked == {Outcome.YES: 0, Outcome.NO: 0, Outcome.ERROR: 2}
        assert crowded.snapshot().asked == dict.fromkeys(Outcome, 0), "a rehearsal does not count"
