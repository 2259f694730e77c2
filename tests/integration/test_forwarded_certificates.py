"""Client certificates with several coordinators over a real etcd: the one that is asked vouches to the leader."""

import base64
import http.client
import json
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.etcd import an_etcd
from tests.mosquitto import Authority

from . import stage as plain
from .stage import Coordinator, Said, Stage, free_port, until

GROUPS = "/api/v1/clientfailover/groups"


class Site(NamedTuple):
    leader: Coordinator
    follower: Coordinator
    authority: Authority
    stranger: Authority
    peer_key: Callable[..., str]
    """Read the key of the coordinators in etcd, or replace it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture
def site(stage: Stage, folder: Path) -> Iterator[Site]:
    authorities = []
    for name in ("own", "strange"):
        place = stage.directory / name
        place.mkdir()
        authorities.append(Authority(place))
    own, strange = authorities
    certificate, key = own.issue("coordinator")
    with an_etcd(folder) as etcd:
        coordinators: list[Coordinator] = []
        for _ in range(2):
            port = free_port()
            one = stage.serve(
                f"--etcd-endpoint={etcd.urls[0]}",
                f"--etcd-prefix=/{stage.directory.name}",
                "--shards=1",
                f"--advertise=https://127.0.0.1:{port}",
                f"--peer-ca-file={own.file}",
                f"--tls-certificate={certificate}",
                f"--tls-key={key}",
                f"--tls-client-ca-file={own.file}",
                "--administrator=client:admin",
                port=port,
                store="etcd",
            )
            one.until_said("session with etcd begun")
            if not coordinators:
                one.until_said("leadership acquired")
            coordinators.append(one)
        leader, follower = coordinators
        name = base64.b64encode(f"/{stage.directory.name}/peer-key".encode()).decode()

        def peer_key(*keys: str) -> str:
            if keys:
                value = base64.b64encode("\n".join(keys).encode()).decode()
                plain.ask("POST", f"{etcd.urls[0]}/v3/kv/put", {"key": name, "value": value})
            found = plain.ask("POST", f"{etcd.urls[0]}/v3/kv/range", {"key": name}).body
            return base64.b64decode(found["kvs"][0]["value"]).decode()

        yield Site(leader, follower, own, strange, peer_key)


def ask(
    site: Site,
    coordinator: Coordinator,
    method: str,
    path: str,
    body: object = None,
    *,
    name: str | None = None,
    issuer: Authority | None = None,
    headers: dict[str, str] | None = None,
) -> Said:
    """One request, by the client of a name in a certificate of the site's own authority or another one."""
    context = ssl.create_default_context(cafile=site.authority.file)
    if name is not None:
        context.load_cert_chain(*(issuer or site.authority).issue(name))
    port = int(coordinator.name.rpartition("-")[2])
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
    with closing(connection):
        given = {"Content-Type": "application/json"} | (headers or {})
        connection.request(method, path, None if body is None else json.dumps(body), given)
        answer = connection.getresponse()
        text = answer.read()
        found = {name.lower(): value for name, value in answer.getheaders()}
        shown: Any = json.loads(text) if text and "json" in found["content-type"] else text.decode()
        return Said(answer.status, found, shown)


def forwarded(site: Site) -> int:
    page = ask(site, site.follower, "GET", "/metrics").body
    found = re.search(r"^failover_coordinator_forwarded_requests_total (\d+)", page, re.MULTILINE)
    assert found is not None
    return int(found[1])


def test_a_client_is_the_same_one_through_every_coordinator(site: Site) -> None:
    group = {"Id": "g", "FailoverTimeout": "00:00:30"}
    for name, status in (("host-a", 201), ("host-b", 200), (None, 401)):
        assert ask(site, site.follower, "POST", GROUPS, group, name=name).status == status
    sessions = f"{GROUPS}/g/clientsessions"
    joined = ask(site, site.follower, "POST", sessions, {"Id": "a"}, name="host-a")
    assert joined.status == 201
    beat = {"FailoverScore": 1}
    for coordinator in (site.follower, site.leader):
        for name, status in (("host-a", 200), ("host-b", 403), (None, 401)):
            answer = ask(site, coordinator, "POST", f"{sessions}/a/heartbeat", beat, name=name)
            assert answer.status in {status, 429}, answer
            if status != 200:
                assert answer.status == status
        read = ask(
            site, coordinator, "GET", f"{GROUPS}/g/status?after=0&wait=00:00:01", name="host-b"
        )
        assert read.status == 200
        assert ask(site, coordinator, "HEAD", f"{GROUPS}/g/status", name="host-b").status == 200
        for name, status in (("host-b", 403), ("admin", 204)):
            path = f"{GROUPS}/g/accesscontrol"
            assert ask(site, coordinator, "DELETE", path, name=name).status == status
    until(lambda: forwarded(site) >= 8, "requests to be forwarded")


def test_the_key_of_the_coordinators_is_replaced_while_they_run(site: Site) -> None:
    """No request through a follower is refused in any step. At the end a signature by the former key is refused."""
    group = {"Id": "g", "FailoverTimeout": "00:00:30"}
    assert ask(site, site.follower, "POST", GROUPS, group, name="host-a").status == 201
    old, new = site.peer_key(), "0b" * 32
    for number, keys in enumerate(((old, new), (new, old), (new,)), start=1):
        assert site.peer_key(*keys) == "\n".join(keys)
        while True:
            read = ask(site, site.follower, "GET", f"{GROUPS}/g/status", name="host-a")
            assert read.status == 200, read
            both = (site.leader, site.follower)
            if all(len(one.lines("peer keys read again")) == number for one in both):
                break
    assert ask(site, site.follower, "GET", f"{GROUPS}/g/status", name="host-a").status == 200
    site.peer_key("typing error")
    until(lambda: site.leader.lines("peer keys not changed"), "the error to be logged")
    assert ask(site, site.follower, "GET", f"{GROUPS}/g/status", name="host-a").status == 200


def test_who_is_no_coordinator_cannot_vouch(site: Site) -> None:
    group = {"Id": "g", "FailoverTimeout": "00:00:30"}
    assert ask(site, site.leader, "POST", GROUPS, group, name="host-a").status == 201
    forged = {
        "Failover-Forwarded": "0123456789abcdef-1",
        "Failover-Client": "1 9999999999 admin " + "0" * 64 + " " + "0" * 64,
    }
    for coordinator in (site.leader, site.follower):
        for name in ("host-a", None):
            for headers in (forged, {"Failover-Client": forged["Failover-Client"]}):
                path = f"{GROUPS}/g/accesscontrol"
                answer = ask(site, coordinator, "DELETE", path, name=name, headers=headers)
                assert answer.status == 401, answer
        # That of a namespace is not forwarded, so nobody vouches there: the header is nothing.
        path = "/api/v1/tenants/default/namespaces/default/accesscontrol/clientfailover/groups"
        for name, status in (("host-a", 403), (None, 401)):
            answer = ask(site, coordinator, "DELETE", path, name=name, headers=forged)
            assert answer.status == status
        with pytest.raises((ssl.SSLError, ConnectionError)):
            ask(site, coordinator, "GET", GROUPS, name="admin", issuer=site.stranger)
