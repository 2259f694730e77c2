"""Client certificates on real connections: who they identify, and who gets no connection."""

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvloop

from agent.coordinator.access import Access, load
from agent.coordinator.auth import hash_password
from agent.coordinator.auth.certificates import certificate_of
from agent.coordinator.server import serving
from agent.errors import ConfigError
from agent.schema.addresses import Address
from agent.schema.coordinator_settings import CoordinatorSettings
from tests.mosquitto import Authority

GROUPS = "/api/v1/clientfailover/groups"


class Site:
    """The files of a coordinator with TLS, and two authorities of client certificates."""

    def __init__(self, folder: Path) -> None:
        self.old, self.new = (self.authority(folder / name) for name in ("old", "new"))
        self.ca = folder / "clients.pem"
        self.ca.write_bytes(self.old.file.read_bytes())
        certificate, key = self.old.issue("coordinator")
        self.settings = CoordinatorSettings(
            listen=Address("127.0.0.1", 0),
            store="memory",
            tls_certificate=certificate,
            tls_key=key,
            tls_client_ca_file=self.ca,
        )

    def authority(self, folder: Path) -> Authority:
        folder.mkdir()
        return Authority(folder)

    @asynccontextmanager
    async def client(
        self, url: str, issuer: Authority | None = None, name: str = "host-a"
    ) -> AsyncIterator[httpx2.AsyncClient]:
        context = ssl.create_default_context(cafile=self.old.file)
        if issuer is not None:
            context.load_cert_chain(*issuer.issue(name))
        async with httpx2.AsyncClient(verify=context, trust_env=False, base_url=url) as client:
            yield client


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_verified_certificate_identifies_its_client(site: Site) -> None:
    """On the server's own event loop."""

    async def check() -> None:
        async with serving(site.settings) as url:
            async with site.client(url, site.old) as known:
                for _ in range(2):
                    assert (await known.get(GROUPS)).status_code == 200
                group = {"Id": "g", "FailoverTimeout": "00:00:10"}
                await known.post(GROUPS, json=group)
                await known.post(f"{GROUPS}/g/clientsessions", json={"Id": "a"})
                heartbeat = f"{GROUPS}/g/clientsessions/a/heartbeat"
                beat = {"FailoverScore": 1}
                assert (await known.post(heartbeat, json=beat)).status_code == 200
                async with site.client(url, site.old, "host-b") as other:
                    answer = await other.post(heartbeat, json=beat)
                    assert answer.status_code == 403
                    assert '"client:host-b"' in answer.json()["Reason"]
            async with site.client(url) as unknown:
                answer = await unknown.get(GROUPS)
                assert answer.status_code == 401
                assert "no client certificate" in answer.json()["Reason"]
                assert (await unknown.get("/healthz")).status_code == 200
            async with site.client(url, site.new) as stranger:
                with pytest.raises(httpx2.TransportError):
                    await stranger.get("/healthz")

    uvloop.run(check())


async def test_required_certificates_are_needed_for_a_connection(site: Site) -> None:
    settings = replace(site.settings, tls_client_certificates="required")
    async with serving(settings) as url:
        async with site.client(url) as unknown:
            with pytest.raises(httpx2.TransportError):
                await unknown.get("/healthz")
        async with site.client(url, site.old) as known:
            assert (await known.get(GROUPS)).status_code == 200


async def test_an_authorization_header_takes_precedence(site: Site, tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(f"ann:{hash_password('s')}\n")
    settings = replace(site.settings, users_file=users)
    async with serving(settings) as url, site.client(url, site.old) as known:
        assert (await known.get(GROUPS)).status_code == 200
        assert (await known.get(GROUPS, auth=("ann", "s"))).status_code == 200
        assert (await known.get(GROUPS, auth=("ann", "wrong"))).status_code == 401


async def test_other_authorities_count_for_new_connections_and_open_ones_stay(site: Site) -> None:
    access = Access(site.settings)
    async with serving(site.settings, access) as url, site.client(url, site.old) as kept:
        assert (await kept.get(GROUPS)).status_code == 200
        async with site.client(url, site.new) as refused:
            with pytest.raises(httpx2.TransportError):
                await refused.get(GROUPS)
        site.ca.write_bytes(site.new.file.read_bytes())
        access.apply(site.settings, load(site.settings))
        async with site.client(url, site.new) as known:
            assert (await known.get(GROUPS)).status_code == 200
        async with site.client(url, site.old) as refused:
            with pytest.raises(httpx2.TransportError):
                await refused.get(GROUPS)
        assert (await kept.get(GROUPS)).status_code == 200


@pytest.mark.parametrize("text", ["", "nothing", "-----BEGIN CERTIFICATE-----\nMIIB\n"])
def test_a_file_without_authorities_is_refused(site: Site, text: str) -> None:
    site.ca.write_text(text)
    with pytest.raises(ConfigError, match=r"tls_client_ca_file .* has no certificates"):
        Access(site.settings)


@pytest.mark.parametrize(
    ("certificate", "name"),
    [
        ({"subject": ((("commonName", "host-a"),),)}, "host-a"),
        (
            {
                "subject": ((("commonName", "cn"),),),
                "subjectAltName": (
                    ("IP Address", "::1"),
                    ("DNS", "a.example"),
                    ("DNS", "b.example"),
                ),
            },
            "a.example",
        ),
        ({"subjectAltName": (("DNS", "a.example"), ("URI", "spiffe://site/a"))}, "spiffe://site/a"),
        ({"subject": ((("organizationName", "o"),),)}, None),
        ({"subject": ((("commonName", "x" * 257),),)}, None),
        ({"subject": ((("commonName", ""),),)}, None),
    ],
)
def test_a_certificate_names_a_client(certificate: Mapping[str, Any], name: str | None) -> None:
    class Tls:
        def getpeercert(self) -> Mapping[str, Any]:
            return {"notAfter": "Jan  1 00:00:00 2030 GMT", **certificate}

    found = certificate_of(Tls())  # type: ignore[arg-type]
    assert found is not None
    assert (found.name, found.until) == (name, 1893456000.0)
    caller = found.caller(1893455999.0)
    assert (caller.name if caller else None) == name
    assert found.caller(1893456000.0) is None


def test_without_tls_there_is_no_certificate() -> None:
    assert certificate_of(None) is None
