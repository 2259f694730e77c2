"""Tenants, access-control lists and the owners of sessions, through the API of a whole coordinator.

Every refusal changes nothing: ``Site.refused`` compares the store's content before and after.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from joserfc.jwk import KeySet

from agent.coordinator import api
from agent.coordinator.api import Api
from agent.coordinator.auth import Authenticator, ClientCertificate, Password, Subject, TokenRules
from agent.coordinator.connection import CERTIFICATE
from agent.schema import access

from .conftest import Stage
from .test_auth import KEY, NOW, bearer

HOST = "http://coordinator"
ON_PREMISES = f"{HOST}/api/v1/clientfailover"
NAMESPACES = ("default", "default"), ("mine", "n"), ("other", "n")
LISTS = f"{HOST}/api/v1/tenants/default/namespaces/default/accesscontrol/clientfailover/groups"
G = "groups/g"
GROUP = {"Id": "g", "FailoverTimeout": "00:00:02"}
SESSION = f"{G}/clientsessions/a"
BEAT = {"FailoverScore": 100}


def entries(*given: tuple[str, int], kind: int = 1, denied: int = 0, **more: str) -> dict[str, Any]:
    """An access-control list: names and rights."""
    return {
        "RoleTrusteeAccessControlEntries": [
            {
                "Trustee": {"Type": kind, "ObjectId": name} | more,
                "AccessType": denied,
                "AccessRights": rights,
            }
            for name, rights in given
        ]
    }


def joined(*lists: dict[str, Any]) -> dict[str, Any]:
    key = "RoleTrusteeAccessControlEntries"
    return {key: [entry for one in lists for entry in one[key]]}


class Site:
    """A coordinator with users who have their names as passwords; ops are ann and bob."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.users = {
            name: Password(4, 8, 1, name.encode(), b"", roles)
            for name, roles in (("root", ()), ("ann", ("ops",)), ("bob", ("ops",)), ("eve", ()))
        }

    @asynccontextmanager
    async def client(self, **auth: Any) -> AsyncIterator[httpx2.AsyncClient]:
        """A client of it as root, which is the administrator unless ``auth`` has it otherwise."""
        settings = {"users": self.users, "administrators": {Subject(1, "root")}} | auth
        app = Api(self.stage.coordinator, self.stage.clock, Authenticator(**settings))
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=app),
            base_url=f"{ON_PREMISES}/",
            auth=("root", "root") if settings["users"] else None,
        ) as client:
            yield client

    async def content(self) -> list[Any]:
        """All that is stored."""
        store = self.stage.store
        stored = sorted((await store.load()).items())
        history = [await store.history(key) for key, _ in stored]
        return [stored, history, [await store.access(*of) for of in NAMESPACES]]

    async def refused(self, request: Any, status: int = 403) -> dict[str, Any]:
        """The ErrorResponse of a request that is refused, and has changed nothing."""
        before = await self.content()
        answer = await request
        assert answer.status_code == status, answer.text
        assert await self.content() == before
        body: dict[str, Any] = answer.json()
        assert body["Reason"]
        assert body["Resolution"]
        return body


@pytest.fixture
def site(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(Password, "fits", lambda self, given: given == self.salt)
    return Site(stage)


@pytest.fixture
async def root(site: Site) -> AsyncIterator[httpx2.AsyncClient]:
    async with site.client() as client:
        yield client


ANN, BOB, EVE = ("ann", "ann"), ("bob", "bob"), ("eve", "eve")


async def done(request: Any, *statuses: int) -> httpx2.Response:
    answer: httpx2.Response = await request
    assert answer.status_code in (statuses or (200, 201, 204)), answer.text
    return answer


# -- tenants --------------------------------------------------------------------------------------


def of_tenant(tenant: str) -> str:
    return f"{HOST}/api/v1/tenants/{tenant}/namespaces/n/clientfailover"


def token(**claims: Any) -> dict[str, str]:
    return {"authorization": bearer(**claims).decode()}


@pytest.fixture
def rules() -> TokenRules:
    return TokenRules("https://id", "failover", KeySet([KEY]))


async def test_a_token_of_another_tenant_is_refused_on_each_call(
    site: Site, rules: TokenRules
) -> None:
    async with site.client(users=None, tokens=rules, now=lambda: NOW) as client:
        mine, other = of_tenant("mine"), of_tenant("other")
        known = token(tid="mine")
        await done(client.post(f"{mine}/groups", json=GROUP, headers=known))
        await done(client.get(f"{mine}/groups/g", headers=token()))
        for method, path, body in (
            ("GET", "", None),
            ("GET", "/groups", None),
            ("POST", "/groups", GROUP),
            ("DELETE", "/groups/g", None),
            ("POST", "/groups/g/clientsessions", {"Id": "a"}),
        ):
            answer = await site.refused(
                client.request(method, other + path, json=body, headers=known)
            )
            assert '"agent-1" is of the tenant "mine"' in answer["Reason"]
        lists = f"{HOST}/api/v1/tenants/other/namespaces/n/accesscontrol/clientfailover/groups"
        await site.refused(client.put(lists, json=entries(("x", 31)), headers=known))


async def test_a_setting_names_the_tenant_of_the_on_premises_paths(
    site: Site, rules: TokenRules
) -> None:
    """They name none. A site whose identity provider puts a tid in every token works without it."""
    async with site.client(users=None, tokens=rules, now=lambda: NOW) as client:
        await done(client.get("groups", headers=token(tid="any")))
    rules = TokenRules(rules.issuer, rules.audience, rules.keys, "mine")
    async with site.client(users=None, tokens=rules, now=lambda: NOW) as client:
        await done(client.get("groups", headers=token(tid="mine")))
        await done(client.get("groups", headers=token()))
        answer = await site.refused(client.get("groups", headers=token(tid="other")))
        assert "token_tenant" in answer["Resolution"]
        cloud = f"{HOST}/api/v1/tenants/default/namespaces/default/clientfailover/groups"
        await site.refused(client.get(cloud, headers=token(tid="other")))


# -- groups that the caller may not read ----------------------------------------------------------


async def test_creating_a_group_that_exists_shows_nothing_that_may_not_be_read(
    site: Site, root: httpx2.AsyncClient
) -> None:
    """Neither its configuration, nor whether a guess of it is right."""
    body = GROUP | {"Name": "Pumps", "AdditionalData": {"secret": 1}}
    await done(root.post("groups", json=body))
    await done(root.put(f"{G}/accesscontrol", json=entries(("root", 31), ("bob", 1))))
    answers = [
        await site.refused(root.post("groups", json=guess, auth=EVE))
        for guess in (GROUP, body, GROUP | {"FailoverTimeout": "00:00:03"}, GROUP | {"Name": "x"})
    ]
    texts = [{k: v for k, v in one.items() if k != "OperationId"} for one in answers]
    assert all(text == texts[0] for text in texts)
    assert "secret" not in str(texts)
    assert (await done(root.post("groups", json=GROUP, auth=BOB), 200)).json() == body
    await site.refused(root.post("groups", json=body | {"Name": "x"}, auth=BOB), 409)
    await done(root.post("groups", json=GROUP | {"Id": "h"}, auth=EVE), 201)


# -- lists ----------------------------------------------------------------------------------------


async def test_only_an_administrator_makes_the_first_list(
    site: Site, root: httpx2.AsyncClient
) -> None:
    """Whoever is known could otherwise shut all others out."""
    await done(root.post("groups", json=GROUP))
    mine = entries(("eve", 31))
    for path in (LISTS, f"{G}/accesscontrol"):
        answer = await site.refused(root.put(path, json=mine, auth=EVE))
        assert "administrator" in answer["Resolution"]
        await site.refused(root.delete(path, auth=EVE))
    for path in (LISTS, f"{G}/accesscontrol"):
        await done(root.put(path, json=entries(("ann", 31)), auth=("root", "root")))
        await done(root.put(path, json=entries(("ann", 31), ("bob", 1)), auth=ANN))
        await site.refused(root.put(path, json=mine, auth=BOB))


async def test_without_an_administrator_lists_that_exist_decide(site: Site) -> None:
    """A deployment of before goes on; only a first list needs the setting."""
    async with site.client() as client:
        await done(client.put(LISTS, json=entries(("ann", 31), ("bob", 7))))
    async with site.client(administrators=()) as client:
        await done(client.put(LISTS, json=entries(("ann", 31), ("eve", 7)), auth=ANN))
        await done(client.post("groups", json=GROUP, auth=EVE))
        await done(client.put(f"{G}/accesscontrol", json=entries(("ann", 31)), auth=ANN))
        await done(client.delete(f"{G}/accesscontrol", auth=ANN))
        await site.refused(client.delete(LISTS, auth=ANN))


async def test_an_administrator_manages_access_whatever_a_list_grants(
    site: Site, root: httpx2.AsyncClient
) -> None:
    await done(root.post("groups", json=GROUP))
    own = joined(entries(("ann", 31)), entries(("root", 31), denied=1))
    for path in (LISTS, f"{G}/accesscontrol"):
        await done(root.put(path, json=own))
        assert (await done(root.get(path))).json() == own
    await site.refused(root.get(G))
    await done(root.delete(f"{G}/accesscontrol"))
    await done(root.delete(LISTS))
    await done(root.get(G))


@pytest.mark.parametrize(
    "acl",
    [
        entries(("nobody", 31)),
        entries(("opps", 31), kind=3),
        entries(("ann", 31), kind=2),
        entries(("ann", 31), TenantId="other"),
        joined(entries(("ann", 31)), entries(("ops", 8), kind=3, denied=1)),
        joined(entries(("ops", 31), kind=3), entries(("ann", 8), ("bob", 8), denied=1)),
    ],
)
async def test_a_list_keeps_a_manager_who_exists(
    site: Site, root: httpx2.AsyncClient, acl: dict[str, Any]
) -> None:
    await done(root.post("groups", json=GROUP))
    for path in (LISTS, f"{G}/accesscontrol"):
        answer = await site.refused(root.put(path, json=acl), 400)
        assert "no existing identity" in answer["Reason"]


@pytest.mark.parametrize(
    "acl",
    [
        entries(("ann", 8)),
        entries(("ann", 31), TenantId="default"),
        joined(entries(("ops", 31), kind=3), entries(("ann", 8), denied=1)),
    ],
)
async def test_a_list_whose_manager_exists_is_taken(
    root: httpx2.AsyncClient, acl: dict[str, Any]
) -> None:
    await done(root.put(LISTS, json=acl))


async def test_managers_by_token_are_in_no_file_and_so_any_is_taken(
    site: Site, rules: TokenRules
) -> None:
    async with site.client(tokens=rules, now=lambda: NOW) as client:
        await done(client.put(LISTS, json=entries(("4711", 31), kind=2, TenantId="tid")))
        await done(client.get(LISTS, headers=token(sub="4711", tid="tid")))


async def test_a_list_is_bounded_in_entries_and_size(site: Site) -> None:
    others = access.MAX_ENTRIES - 1
    auth = Authenticator(site.users, administrators={Subject(1, "root")})
    app = Api(site.stage.coordinator, site.stage.clock, auth, max_body_bytes=10_000_000)
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, auth=("root", "root")) as client:
        many = entries(("ann", 31), *((f"u{n}", 1) for n in range(others + 1)))
        long = entries(("ann", 31), *((f"{n:0256}", 1) for n in range(others)))
        for acl in (many, long):
            await site.refused(client.put(LISTS, json=acl), 400)
        within = entries(("ann", 31), *((f"u{n}", 1) for n in range(others)))
        await done(client.put(LISTS, json=within))


async def test_a_deleted_group_list_gives_way_to_the_namespaces(
    site: Site, root: httpx2.AsyncClient
) -> None:
    await done(root.post("groups", json=GROUP))
    await done(root.put(LISTS, json=entries(("root", 31), ("ann", 31), ("eve", 1))))
    await done(root.put(f"{G}/accesscontrol", json=entries(("root", 31), ("bob", 31))))
    await site.refused(root.get(G, auth=EVE))
    await site.refused(root.delete(f"{G}/accesscontrol", auth=ANN))
    await done(root.delete(f"{G}/accesscontrol", auth=BOB), 204)
    await done(root.delete(f"{G}/accesscontrol", auth=ANN), 204)
    await done(root.get(G, auth=EVE))
    await site.refused(root.delete("groups/none/accesscontrol"), 404)


async def test_a_deleted_list_stays_deleted_after_a_restart(
    site: Site, root: httpx2.AsyncClient
) -> None:
    await done(root.put(LISTS, json=entries(("root", 31))))
    await site.refused(root.get("groups", auth=EVE))
    await done(root.delete(LISTS), 204)
    await site.stage.restart()
    async with site.client() as client:
        await done(client.get("groups", auth=EVE))


class SlowBody:
    """A body that stops in the middle until it may go on."""

    def __init__(self, body: Any) -> None:
        self._content = httpx2.Request("PUT", LISTS, json=body).content
        self.sent = asyncio.Event()
        self.go_on = asyncio.Event()

    async def parts(self) -> AsyncIterator[bytes]:
        yield self._content[:5]
        self.sent.set()
        await self.go_on.wait()
        yield self._content[5:]


async def test_rights_that_end_while_a_list_comes_in_do_not_count(
    site: Site, root: httpx2.AsyncClient
) -> None:
    await done(root.put(LISTS, json=entries(("ann", 31), ("bob", 31))))
    body = SlowBody(entries(("bob", 31)))
    going = asyncio.create_task(root.put(LISTS, content=body.parts(), auth=BOB))
    await asyncio.wait_for(body.sent.wait(), 5)
    await done(root.put(LISTS, json=entries(("ann", 31)), auth=ANN))
    body.go_on.set()
    await site.refused(going)


@pytest.mark.parametrize("end", ["user", "right"])
async def test_a_request_that_is_held_open_does_not_outlive_credentials_and_rights(
    site: Site, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(api, "ADMITTED_FOR_S", 0.0)
    administrators = {Subject(1, "root")}
    auth = Authenticator(site.users, administrators=administrators)
    app = Api(site.stage.coordinator, site.stage.clock, auth)
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url=f"{ON_PREMISES}/") as client:
        body = SlowBody(GROUP)
        going = asyncio.create_task(client.post("groups", content=body.parts(), auth=EVE))
        await asyncio.wait_for(body.sent.wait(), 5)
        if end == "user":
            users = {name: one for name, one in site.users.items() if name != "eve"}
            auth.replace(users, None, administrators)
        else:
            await done(client.put(LISTS, json=entries(("ann", 31)), auth=("root", "root")))
        body.go_on.set()
        await site.refused(going, 401 if end == "user" else 403)


async def test_without_authentication_everything_is_allowed(site: Site) -> None:
    async with site.client(users=None, administrators=()) as client:
        await done(client.post("groups", json=GROUP))
        for path in (LISTS, f"{G}/accesscontrol"):
            await done(client.put(path, json=entries(("anybody", 31))))
            await done(client.delete(path), 204)
        await done(client.post(f"{G}/clientsessions", json={"Id": "a"}))
        await done(client.post(f"{SESSION}/heartbeat", json=BEAT))
        await done(client.delete(SESSION))


# -- owners ---------------------------------------------------------------------------------------


async def acts(client: httpx2.AsyncClient, who: tuple[str, str]) -> list[Any]:
    """What only the owner of a session may do, as coroutines."""
    session = f"{G}/clientsessions"
    return [
        client.post(session, json={"Id": "a"}, auth=who),
        client.post(f"{SESSION}/heartbeat", json=BEAT, auth=who),
        client.post(f"{SESSION}/release", json={"Epoch": 1}, auth=who),
        client.delete(SESSION, auth=who),
    ]


async def owner(site: Site) -> str | None:
    ((_, stored),) = (await site.stage.store.load()).items()
    return stored.record.sessions["a"].owner


async def test_a_session_belongs_to_the_identity_that_made_it(
    site: Site, root: httpx2.AsyncClient
) -> None:
    """Others with Read, Write and Delete may not act for it; it goes on as if nothing had been."""
    await done(root.post("groups", json=GROUP))
    await done(root.put(LISTS, json=entries(("root", 31), ("ann", 7), ("eve", 7))))
    await done(root.post(f"{G}/clientsessions", json={"Id": "a"}, auth=ANN), 201)
    for _ in range(2):
        answer = await done(root.post(f"{SESSION}/heartbeat", json=BEAT, auth=ANN))
    assert answer.json()["Role"] == 1
    for act in await acts(root, EVE):
        body = await site.refused(act)
        assert "belongs to another identity" in body["Reason"]
    assert (await root.get(f"{G}/status")).json()["Primary"] == "a"
    assert await owner(site) == "user:ann"
    await site.stage.run_for(1)
    for act in await acts(root, ANN):
        await done(act)


async def test_a_manager_may_act_for_the_sessions_of_others(
    site: Site, root: httpx2.AsyncClient
) -> None:
    await done(root.post("groups", json=GROUP))
    await done(root.put(LISTS, json=entries(("bob", 15), ("ann", 7))))
    await done(root.post(f"{G}/clientsessions", json={"Id": "a"}, auth=ANN))
    for act in await acts(root, BOB):
        await done(act)


async def test_without_a_list_only_an_administrator_is_a_manager(
    site: Site, root: httpx2.AsyncClient
) -> None:
    await done(root.post("groups", json=GROUP, auth=ANN))
    await done(root.post(f"{G}/clientsessions", json={"Id": "a"}, auth=ANN))
    for act in await acts(root, BOB):
        await site.refused(act)
    for act in await acts(root, ("root", "root")):
        await done(act)


async def test_a_session_without_an_owner_is_adopted_by_a_heartbeat(
    site: Site, root: httpx2.AsyncClient
) -> None:
    """It was made without authentication, or before there were owners."""
    async with site.client(users=None, administrators=()) as open_client:
        await done(open_client.post("groups", json=GROUP))
        await done(open_client.post(f"{G}/clientsessions", json={"Id": "a"}))
    assert await owner(site) is None
    await done(root.post(f"{G}/clientsessions", json={"Id": "a"}, auth=EVE), 200)
    assert await owner(site) is None
    await done(root.post(f"{SESSION}/heartbeat", json=BEAT, auth=ANN))
    assert await owner(site) == "user:ann"
    for act in await acts(root, EVE):
        await site.refused(act)
    await site.stage.restart()
    async with site.client() as again:
        await site.refused(again.post(f"{SESSION}/heartbeat", json=BEAT, auth=EVE))
        await done(again.post(f"{SESSION}/heartbeat", json=BEAT, auth=ANN))


async def test_the_session_of_a_primary_is_adopted_by_its_process_only(
    site: Site, root: httpx2.AsyncClient
) -> None:
    """Others know the session and the epoch from the status, and not the instance."""
    mine = BEAT | {"Instance": "a1"}
    async with site.client(users=None, administrators=()) as open_client:
        await done(open_client.post("groups", json=GROUP))
        await done(open_client.post(f"{G}/clientsessions", json={"Id": "a"}))
        for _ in range(2):
            answer = await done(open_client.post(f"{SESSION}/heartbeat", json=mine))
    assert answer.json()["Role"] == 1
    stranger = await done(root.post(f"{SESSION}/heartbeat", json=BEAT, auth=EVE))
    assert stranger.json()["Role"] == 0
    assert await owner(site) is None
    await site.stage.run_for(1)
    await done(root.post(f"{SESSION}/heartbeat", json=mine, auth=ANN))
    assert await owner(site) == "user:ann"


async def test_the_client_of_a_certificate_owns_its_session(site: Site) -> None:
    auth = Authenticator(site.users, certificates=True, now=lambda: NOW)
    app = Api(site.stage.coordinator, site.stage.clock, auth)

    def client(name: str | None, until: float = NOW + 1) -> httpx2.AsyncClient:
        async def with_certificate(scope: Any, receive: Any, send: Any) -> None:
            scope[CERTIFICATE] = ClientCertificate(name, until)
            await app(scope, receive, send)

        transport = httpx2.ASGITransport(app=with_certificate)
        return httpx2.AsyncClient(transport=transport, base_url=f"{ON_PREMISES}/")

    a, b = client("host-a"), client("host-b")
    await done(a.post("groups", json=GROUP))
    await done(a.post(f"{G}/clientsessions", json={"Id": "a"}))
    assert await owner(site) == "client:host-a"
    await site.refused(b.post(f"{SESSION}/heartbeat", json=BEAT))
    await site.refused(a.post(f"{SESSION}/heartbeat", json=BEAT, auth=ANN))
    await site.refused(a.post(f"{SESSION}/heartbeat", json=BEAT, auth=("ann", "wrong")), 401)
    await done(a.post(f"{SESSION}/heartbeat", json=BEAT))
    for unusable in (client(None), client("host-a", NOW)):
        await site.refused(unusable.get("groups"), 401)
