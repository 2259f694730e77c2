"""Credentials that are replaced while requests run, and the way through a proxy."""

import asyncio
import base64
import contextlib
import errno
import json
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agent.drivers.rest import ClientCredentials, RestClient
from agent.drivers.rest.client import status_path
from agent.drivers.rest.configured import access_files, client_for, load_server_access
from agent.drivers.rest.connections import Proxy as ProxySetting
from agent.drivers.rest.endpoints import ServerAccess
from agent.errors import ConfigError, ExitCode, ServerError
from agent.model import Role
from agent.schema.settings import AgentSettings
from tests.bad_server import BASE, PATIENCE_S, Raw, answer, make_certificate, served, until
from tests.connect_proxy import Proxy, proxying
from tests.mosquitto import Authority

BEAT = {"Role": 1, "Epoch": 7, "LeaseDuration": "00:00:02", "Revision": 3}
STATUS = status_path("g")


def basic(password: str) -> httpx2.Auth:
    return httpx2.BasicAuth("u", password)


def sent(password: str) -> bytes:
    return base64.b64encode(f"u:{password}".encode())


async def beat(client: RestClient, timeout_s: float = PATIENCE_S) -> Any:
    return await client.heartbeat(
        "g", "s", score=100, last_data=None, instance="i", seen_epoch=None, timeout_s=timeout_s
    )


@contextlib.asynccontextmanager
async def closing(client: RestClient) -> AsyncIterator[RestClient]:
    try:
        yield client
    finally:
        await client.aclose()


class Guarded:
    """What a server answers: only to the right password."""

    def __init__(self, raw: Raw, password: str) -> None:
        self.raw = raw
        self.password = password

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await self.raw.request(reader)
            right = sent(self.password) in request
            writer.write(answer(json.dumps(BEAT).encode(), "200 OK" if right else "401 No"))
            await writer.drain()


def server_tls(authority: Authority, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue(name))
    return context


# --- replaced credentials


async def test_new_credentials_are_used_once_the_endpoint_takes_them() -> None:
    async with served() as raw:
        site = Guarded(raw, "one")
        raw.talk = site.talk
        async with closing(RestClient([raw.endpoint()], auth=basic("one"))) as client:
            await beat(client)
            site.password = "two"
            await client.replace_access(ServerAccess(basic("two")), STATUS, timeout_s=PATIENCE_S)
            assert (await beat(client)).role is Role.PRIMARY
    assert sent("two") in raw.seen[-1]
    assert raw.seen[-2].startswith(f"GET {BASE}/groups/g/status ".encode())


async def test_credentials_that_the_endpoint_refuses_are_not_used() -> None:
    async with served() as raw:
        raw.talk = Guarded(raw, "one").talk
        async with closing(RestClient([raw.endpoint()], auth=basic("one"))) as client:
            with pytest.raises(ServerError, match="401") as caught:
                await client.replace_access(
                    ServerAccess(basic("two")), STATUS, timeout_s=PATIENCE_S
                )
            assert caught.value.exit_code is ExitCode.NOT_AUTHORISED
            assert (await beat(client)).role is Role.PRIMARY
    assert sent("one") in raw.seen[-1]


@pytest.mark.parametrize("status", ["403 Forbidden", "404 Gone", "500 Oops", "503 Later"])
async def test_a_fault_that_is_not_of_the_credentials_does_not_keep_the_former(status: str) -> None:
    async with served() as raw:
        raw.talk = raw.says(answer(b"{}", status))
        async with closing(RestClient([raw.endpoint()], auth=basic("one"))) as client:
            await client.replace_access(ServerAccess(basic("two")), STATUS, timeout_s=PATIENCE_S)
            raw.talk = raw.answers(BEAT)
            await beat(client)
    assert sent("two") in raw.seen[-1]


async def test_without_an_answer_or_a_token_the_former_are_kept() -> None:
    """They may work again in a moment, or have a token that is still good."""
    async with served() as raw, served() as identity:
        raw.talk = raw.says(then="wait")
        identity.talk = identity.says(then="wait")
        token = ClientCredentials(
            "me", "s", clock=lambda: 0.0, token_url=f"http://127.0.0.1:{identity.port}/token"
        )
        async with closing(RestClient([raw.endpoint()], auth=basic("one"))) as client:
            for other in (basic("two"), token):
                with pytest.raises(ServerError, match="gave no answer"):
                    await client.replace_access(ServerAccess(other), STATUS, timeout_s=0.05)
            raw.talk = raw.answers(BEAT)
            await beat(client)
    assert sent("one") in raw.seen[-1]


async def test_the_answer_to_another_request_proves_no_credentials() -> None:
    other = json.dumps(BEAT).encode()
    head = f"HTTP/1.1 200 OK\r\nFailover-Request: 1\r\nContent-Length: {len(other)}\r\n\r\n"
    async with served() as raw:
        raw.talk = raw.says(head.encode() + other)
        async with closing(RestClient([raw.endpoint()], auth=basic("one"))) as client:
            with pytest.raises(ServerError, match="answers another request"):
                await client.replace_access(
                    ServerAccess(basic("two")), STATUS, timeout_s=PATIENCE_S
                )
            raw.talk = raw.answers(BEAT)
            await beat(client)
    assert sent("one") in raw.seen[-1]


async def test_a_ca_that_does_not_trust_the_endpoint_is_not_used(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("right", "wrong")]
    for folder in folders:
        folder.mkdir()
    right, wrong = map(Authority, folders)
    async with served(tls=server_tls(right, "server")) as raw:
        raw.talk = raw.answers(BEAT)
        trust = ssl.create_default_context(cafile=right.file)
        async with closing(RestClient([raw.endpoint("https")], verify=trust)) as client:
            other = ServerAccess(tls=ssl.create_default_context(cafile=wrong.file))
            with pytest.raises(ServerError, match="certificate is not trusted"):
                await client.replace_access(other, STATUS, timeout_s=PATIENCE_S)
            assert (await beat(client)).role is Role.PRIMARY


async def test_requests_under_way_are_finished_and_then_their_connections_closed() -> None:
    async with served() as raw:
        go_on = asyncio.Event()
        ended = 0

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal ended
            try:
                while True:
                    request = await raw.request(reader)
                    if b"after=1" in request:
                        await go_on.wait()
                    writer.write(answer(json.dumps(BEAT | {"Revision": 2}).encode()))
                    await writer.drain()
            finally:
                ended += 1

        raw.talk = talk
        async with closing(RestClient([raw.endpoint()], auth=basic("one"))) as client:
            await beat(client)
            reading = asyncio.create_task(
                client.status("g", after=1, wait_s=PATIENCE_S, timeout_s=PATIENCE_S)
            )
            await until(lambda: any(b"after=1" in request for request in raw.seen))
            await client.replace_access(ServerAccess(basic("two")), STATUS, timeout_s=PATIENCE_S)
            await beat(client)
            assert not reading.done()
            before = ended
            go_on.set()
            assert (await reading).revision == 2
            await until(lambda: ended >= before + 2)  # the read's, and that of the first heartbeat
            await beat(client)


async def test_closing_leaves_no_former_connections() -> None:
    async with served() as raw:
        ended = asyncio.Event()

        async def wait_for_the_end(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
            await raw.request(reader)
            assert await reader.read() == b""
            ended.set()

        raw.talk = wait_for_the_end
        client = RestClient([raw.endpoint()], auth=basic("one"))
        reading = asyncio.create_task(
            client.status("g", after=1, wait_s=PATIENCE_S, timeout_s=PATIENCE_S)
        )
        await until(lambda: len(raw.seen) == 1)
        raw.talk = raw.answers(BEAT)
        await client.replace_access(ServerAccess(basic("two")), STATUS, timeout_s=PATIENCE_S)
        assert not ended.is_set()
        await client.aclose()
        await client.aclose()
        await until(ended.is_set)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


# --- what is loaded


def secret(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.touch(0o600)
    path.write_text(text)
    return path


async def test_a_client_certificate_is_shown_to_a_server_that_asks_for_one(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    asking = server_tls(authority, "server")
    asking.load_verify_locations(authority.file)
    asking.verify_mode = ssl.CERT_REQUIRED
    certificate, key = authority.issue("host-a")
    async with served(tls=asking) as raw:
        raw.talk = raw.answers(BEAT)
        settings = AgentSettings(
            endpoint=(raw.endpoint("https"),),
            ca_file=authority.file,
            client_certificate=certificate,
            client_key=key,
        )
        assert set(access_files(settings)) == {authority.file, certificate, key}
        async with closing(client_for(settings)) as client:
            assert (await beat(client)).role is Role.PRIMARY


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("name", ["ca_file", "client_certificate", "client_key"])
def test_a_half_written_file_is_refused(tmp_path: Path, name: str, share: float) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("host-a")
    files = {"ca_file": authority.file, "client_certificate": certificate, "client_key": key}
    text = files[name].read_bytes()
    files[name].write_bytes(text[: int(len(text) * share)])
    settings = AgentSettings(**files)  # type: ignore[arg-type] # three paths
    with pytest.raises(ConfigError, match=name):
        load_server_access(settings)


def test_two_certificates_of_which_one_is_half_written_are_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    text = authority.file.read_bytes()
    authority.file.write_bytes(text + text[: len(text) // 2])
    with pytest.raises(ConfigError, match="ca_file"):
        load_server_access(AgentSettings(ca_file=authority.file))


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, other = authority.issue("one"), authority.issue("other")
    settings = AgentSettings(client_certificate=one[0], client_key=other[1])
    with pytest.raises(ConfigError, match="client_certificate and client_key"):
        load_server_access(settings)


@pytest.mark.parametrize(
    ("given", "trusting"),
    [
        ({"endpoint": ("http://one", "http://two")}, False),
        ({"endpoint": ("http://one", "HTTPS://two")}, True),
        ({"endpoint": ("http://one",), "proxy": "https://proxy"}, True),
        ({"endpoint": ("http://one",), "token_endpoint": "https://identity/token"}, True),
        ({"endpoint": ("http://one",), "client_id": "its token endpoint is discovered"}, True),
    ],
)
def test_the_authorities_of_the_host_are_loaded_only_for_https(
    given: dict[str, Any], *, trusting: bool
) -> None:
    context = load_server_access(AgentSettings(**given)).tls
    if not trusting:
        assert context is None
        return
    assert isinstance(context, ssl.SSLContext)
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.get_ca_certs() == httpx2.create_ssl_context(trust_env=False).get_ca_certs()


async def test_without_a_context_an_unknown_authority_is_trusted_no_more(tmp_path: Path) -> None:
    async with served(tls=server_tls(Authority(tmp_path), "server")) as raw:
        client = RestClient((raw.endpoint("https"),), verify=None)
        async with closing(client):
            with pytest.raises(ServerError, match="certificate is not trusted"):
                await beat(client)


# --- a proxy

NAME = "coordinator.only-the-proxy-knows-it.invalid"


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("proxy_scheme", ["http", "https"])
async def test_all_requests_go_through_the_proxy_which_resolves_names(
    tmp_path: Path, scheme: str, proxy_scheme: str
) -> None:
    certificate = make_certificate(tmp_path)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    host = "127.0.0.1" if scheme == "https" else NAME  # its certificate has no name
    async with (
        served(tls=server if scheme == "https" else None) as raw,
        proxying(
            Proxy({NAME: "127.0.0.1"}, "edge:secret"), server if proxy_scheme == "https" else None
        ) as proxy,
    ):
        raw.talk = raw.answers(BEAT)
        settings = AgentSettings(
            endpoint=(f"{scheme}://{host}:{raw.port}{BASE}",),
            ca_file=certificate,
            proxy=f"{proxy_scheme}://127.0.0.1:{proxy.port}",
            proxy_username="edge",
            proxy_password_file=secret(tmp_path, "proxy", "secret"),
        )
        async with closing(client_for(settings)) as client:
            for _ in range(2):
                assert (await beat(client)).role is Role.PRIMARY
        target = f"{host}:{raw.port}"
        wanted = (
            f"CONNECT {target} " if scheme == "https" else f"POST http://{target}{BASE}/groups/"
        )
        assert proxy.asked[0].startswith(wanted)
        assert len(proxy.asked) == 1  # the connection is kept
        seen = raw.seen if scheme == "https" else raw.seen[:1]  # it looks at the first one only
        assert b"proxy-auth" not in b"".join(seen).lower()


async def test_a_name_is_resolved_by_the_proxy_through_its_tunnel_too(tmp_path: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(make_certificate(tmp_path))
    async with served(tls=tls) as raw, proxying(Proxy({NAME: "127.0.0.1"})) as proxy:
        raw.talk = raw.answers(BEAT)
        given = ProxySetting(f"http://127.0.0.1:{proxy.port}")
        endpoint = f"https://{NAME}:{raw.port}{BASE}"
        async with closing(RestClient([endpoint], verify=False, proxy=given)) as client:
            assert (await beat(client)).role is Role.PRIMARY


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_wants_another_password_is_not_authorised(scheme: str) -> None:
    async with proxying(Proxy(login="edge:secret")) as proxy:
        given = ProxySetting(f"http://127.0.0.1:{proxy.port}", (b"edge", b"a wrong one"))
        client = RestClient([f"{scheme}://{NAME}{BASE}"], proxy=given)
        async with closing(client):
            with pytest.raises(ServerError, match=r"407.*proxy_password_file") as caught:
                await beat(client)
    assert caught.value.exit_code is ExitCode.NOT_AUTHORISED
    assert "wrong one" not in f"{caught.value} {given}"


async def test_a_proxy_that_refuses_or_is_down_is_unreachable_and_named() -> None:
    async with proxying(Proxy()) as proxy:
        proxy.refuse = "403 Not There"
        given = ProxySetting(f"http://127.0.0.1:{proxy.port}")
        async with closing(RestClient([f"https://{NAME}{BASE}"], proxy=given)) as client:
            with pytest.raises(ServerError, match=r"through the proxy \(403 Not There\)") as caught:
                await beat(client)
            assert caught.value.exit_code is ExitCode.UNREACHABLE
    async with closing(RestClient([f"https://{NAME}{BASE}"], proxy=given)) as client:
        down = rf"127.0.0.1:{proxy.port} does not answer: {os.strerror(errno.ECONNREFUSED)}"
        with pytest.raises(ServerError, match=down) as caught:
            await beat(client)
        assert caught.value.exit_code is ExitCode.UNREACHABLE


async def test_the_environment_names_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served() as raw, proxying(Proxy()) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        raw.talk = raw.answers(BEAT)
        async with closing(client_for(AgentSettings(endpoint=(raw.endpoint(),)))) as client:
            await beat(client)
        assert proxy.asked == []
