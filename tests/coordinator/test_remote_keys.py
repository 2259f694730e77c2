"""The keys of an identity provider: fetched, rotated, kept during an outage, and bounded."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from joserfc.jwk import ECKey, KeySet

from agent.coordinator.auth import Authenticator, TokenRules, remote_keys
from agent.coordinator.auth.remote_keys import MOST_BYTES, STALE_S, UNKNOWN_KEY_INTERVAL_S
from agent.errors import Unauthenticated, Unavailable
from tests.mosquitto import Authority

from .test_auth import KEY, NOW, bearer

OTHER = ECKey.generate_key("P-256", {"kid": "k2"})


class Provider:
    """An identity provider's JWKS on a real socket, and a coordinator's authenticator."""

    def __init__(self) -> None:
        self.answer = b""
        self.url = ""
        self.served = 0
        self.now = 1000.0
        self.outcomes: list[str] = []

    def publish(self, *keys: ECKey, status: int = 200) -> None:
        body = json.dumps(KeySet(list(keys)).as_dict(private=False)).encode()
        self.send(body, status)

    def send(self, body: bytes, status: int = 200) -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.answer = head.encode() + body

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.served += 1
        writer.write(self.answer)
        writer.close()

    def password_checked(self, outcome: str) -> None:
        raise AssertionError(outcome)

    def token_keys_fetched(self, outcome: str) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    made = Provider()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks"
    yield made
    server.close()


def authenticator(provider: Provider) -> Authenticator:
    rules = TokenRules("https://id", "failover", None)
    made = Authenticator(
        tokens=rules, keys_url=provider.url, now=lambda: NOW, clock=lambda: provider.now
    )
    made.meter(provider)
    return made


async def until(provider: Provider, outcomes: int) -> None:
    async with asyncio.timeout(10):
        while len(provider.outcomes) < outcomes:  # noqa: ASYNC110 - a count, not an event
            await asyncio.sleep(0.001)


async def test_a_token_is_checked_with_fetched_keys(provider: Provider) -> None:
    provider.publish(KEY)
    known = authenticator(provider)
    async with known.running():
        await until(provider, 1)
        assert (await known.caller(bearer())).name == "agent-1"
    assert provider.outcomes == ["fetched"]


async def test_a_rotated_key_is_fetched_at_once_and_not_too_often(provider: Provider) -> None:
    provider.publish(KEY)
    known = authenticator(provider)
    async with known.running():
        await until(provider, 1)
        provider.publish(KEY, OTHER)
        with pytest.raises(Unauthenticated):  # fetched just now
            await known.caller(bearer(OTHER, kid="k2"))
        assert provider.served == 1
        provider.now += UNKNOWN_KEY_INTERVAL_S
        header = bearer(OTHER, kid="k2", sub="agent-2")
        callers = await asyncio.gather(*(known.caller(header) for _ in range(20)))
        assert {caller.name for caller in callers} == {"agent-2"}
        for number in range(20):
            with pytest.raises(Unauthenticated):
                await known.caller(bearer(kid=f"unknown {number}"))
        assert provider.served == 2


async def test_a_withdrawn_key_is_refused_after_the_next_fetch(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_keys, "REFRESH_S", 0.01)
    provider.publish(KEY)
    known = authenticator(provider)
    async with known.running():
        await until(provider, 1)
        await known.caller(bearer())
        provider.publish(OTHER)
        await until(provider, len(provider.outcomes) + 2)
        with pytest.raises(Unauthenticated):
            await known.caller(bearer())


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 500), (b"no keys", 200), (b'{"keys": []}', 200), (b"x" * (MOST_BYTES + 1), 200)],
)
async def test_an_outage_leaves_the_keys_in_force_for_a_bounded_time(
    provider: Provider, monkeypatch: pytest.MonkeyPatch, body: bytes, status: int
) -> None:
    monkeypatch.setattr(remote_keys, "REFRESH_S", 0.01)
    monkeypatch.setattr(remote_keys, "RETRY_S", 0.01)
    provider.publish(KEY)
    known = authenticator(provider)
    async with known.running():
        await until(provider, 1)
        provider.send(body, status)
        await until(provider, len(provider.outcomes) + 3)
        assert provider.outcomes[-1] == "failed"
        assert (await known.caller(bearer())).name == "agent-1"
        provider.now += STALE_S + 1
        with pytest.raises(Unavailable, match="keys of the identity provider"):
            await known.caller(bearer(sub="agent-2"))
        provider.publish(KEY)
        await until(provider, len(provider.outcomes) + 2)
        assert (await known.caller(bearer(sub="agent-2"))).name == "agent-2"


async def test_without_keys_yet_the_caller_may_try_again(provider: Provider) -> None:
    """The coordinator starts without its identity provider."""
    provider.send(b"", 503)
    known = authenticator(provider)
    async with known.running():
        await until(provider, 1)
        with pytest.raises(Unavailable):
            await known.caller(bearer())


async def test_a_provider_that_does_not_answer_is_given_up(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_keys, "FETCH_TIMEOUT_S", 0.05)
    provider.send(b"")
    provider.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n"
    known = authenticator(provider)
    async with known.running():
        await until(provider, 1)
    assert provider.outcomes[0] == "failed"


async def test_what_a_hostile_provider_says_is_one_short_line(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    provider.answer = b"HTTP/1.1 200 OK\r\n" + b"\xff" * 60_000 + b"\r\n\r\n"
    known = authenticator(provider)
    async with known.running():
        await until(provider, 1)
    (fields,) = (record.__dict__["fields"] for record in caplog.records if "token" in record.msg)
    assert "illegal header" in fields["reason"]
    assert len(fields["reason"]) <= 500


async def test_redirects_are_not_followed(provider: Provider) -> None:
    provider.answer = (
        b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"
    )
    known = authenticator(provider)
    async with known.running():
        await until(provider, 1)
    assert provider.outcomes[0] == "failed"
    assert provider.served == 1


@pytest.mark.parametrize("trusted", [True, False])
async def test_keys_over_https_need_a_certificate_that_the_system_trusts(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, trusted: bool
) -> None:
    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("provider"))
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0, ssl=context)
    provider.url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks"
    provider.publish(KEY)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    known = authenticator(provider)
    async with known.running():
        await until(provider, 1)
        assert provider.outcomes == ["fetched" if trusted else "failed"]
        if trusted:
            assert (await known.caller(bearer())).name == "agent-1"
    server.close()
