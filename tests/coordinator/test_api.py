import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx2
import pytest

from agent.coordinator import service
from agent.coordinator.api import Api
from agent.coordinator.auth import Authenticator, Password, Subject, hash_password
from agent.coordinator.route_table import ROUTES
from agent.coordinator.service import Coordinator
from agent.model import GroupKey

from .conftest import Stage

HOST = "http://coordinator"
CLOUD = f"{HOST}/api/v1/tenants/acme/namespaces/plant%201/clientfailover"
BEAT = {"FailoverScore": 100}


async def make(http: httpx2.AsyncClient, *sessions: str, lease: str = "00:00:02") -> None:
    answer = await http.post("groups", json={"Id": "g", "FailoverTimeout": lease})
    assert answer.status_code == 201
    for session in sessions:
        answer = await http.post("groups/g/clientsessions", json={"Id": session})
        assert answer.status_code == 201


async def beat(http: httpx2.AsyncClient, session: str, **more: object) -> httpx2.Response:
    return await http.post(f"groups/g/clientsessions/{session}/heartbeat", json=BEAT | more)


def is_error(answer: httpx2.Response, status: int) -> dict[str, object]:
    """An ErrorResponse: every refusal is one."""
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    body: dict[str, object] = answer.json()
    assert body["OperationId"] == answer.headers["operation-id"]
    assert str(uuid.UUID(str(body["OperationId"]))) == body["OperationId"]
    assert body["Error"]
    assert body["Reason"]
    assert body["Resolution"]
    assert "Traceback" not in answer.text
    return body


def test_every_route_is_listed_once() -> None:
    places = [(route.method, path) for route in ROUTES for path in route.paths]
    assert len(places) == len(set(places))


@pytest.mark.parametrize("path", ["", "groups/none/status", "nothing"])
async def test_an_answer_repeats_the_number_of_its_request(
    http: httpx2.AsyncClient, path: str
) -> None:
    """R3: so that whoever asked takes no answer to another request for its own."""
    answer = await http.get(path, headers={"Failover-Request": "12-ab"})
    assert answer.headers["failover-request"] == "12-ab"
    for odd in ("", "x" * 65, "1\t2"):
        answer = await http.get(path, headers={"Failover-Request": odd})
        assert "failover-request" not in answer.headers


# -- routing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        f"{HOST}/api/v1/clientfailover",
        f"{HOST}/api/v1/clientfailover/",
        f"{HOST}/API/V1/ClientFailover",
        CLOUD,
        CLOUD.replace("tenants", "TENANTS") + "/",
    ],
)
async def test_both_bases_answer_in_any_letter_case(http: httpx2.AsyncClient, path: str) -> None:
    answer = await http.get(path)
    assert answer.status_code == 200
    assert set(answer.json()) == {"Version"}


async def test_the_on_premises_groups_are_those_of_the_tenant_default_only(
    http: httpx2.AsyncClient,
) -> None:
    """On premises is the tenant and namespace ``default``; others have groups of their own."""
    await make(http)
    default = f"{HOST}/api/v1/tenants/default/namespaces/default/clientfailover/groups/g"
    assert (await http.get(default)).status_code == 200
    is_error(await http.get(f"{CLOUD}/groups/g"), 404)


async def test_ids_are_percent_decoded_and_keep_their_letter_case(http: httpx2.AsyncClient) -> None:
    body = {"Id": "Grüppe 1%", "FailoverTimeout": "00:00:02"}
    await http.post("GROUPS/", json=body)
    answer = await http.get("groups/Gr%C3%BCppe%201%25")
    assert answer.json()["Id"] == "Grüppe 1%"
    is_error(await http.get("groups/gr%C3%BCppe%201%25"), 404)


@pytest.mark.parametrize(
    "path", [f"{HOST}/nothing", "groups/g/nothing", f"{HOST}/api/v1/tenants/t/clientfailover"]
)
async def test_an_unknown_route_is_404(http: httpx2.AsyncClient, path: str) -> None:
    await make(http)
    is_error(await http.get(path), 404)


@pytest.mark.parametrize("segment", ["%FF", "a%00b", "a%2Fb", "x" * 257, "/status"])
async def test_what_cannot_be_an_id_is_400(http: httpx2.AsyncClient, segment: str) -> None:
    is_error(await http.get(f"groups/{segment}"), 400)


async def test_a_wrong_method_is_405_with_the_right_ones_in_allow(http: httpx2.AsyncClient) -> None:
    answer = await http.put("groups", json={})
    is_error(answer, 405)
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS, POST"


async def test_options_is_answered_with_the_methods_in_allow(http: httpx2.AsyncClient) -> None:
    answer = await http.options("groups/g/status")
    assert (answer.status_code, answer.headers["allow"]) == (204, "GET, HEAD, OPTIONS")


async def test_head_is_get_without_a_body(http: httpx2.AsyncClient) -> None:
    await make(http)
    got, head = await http.get("groups/g"), await http.head("groups/g")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == got.headers["content-length"]


# -- bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"<html>", "HTML"),
        (b"[]", "JSON object"),
        (b'{"Id":"g"}', "FailoverTimeout is missing"),
        (b'{"FailoverTimeout":"00:01:00"}', "Id is missing"),
        (b'{"Id":"g","FailoverTimeout":"soon"}', "time-span"),
        (b'{"Id":"g","FailoverTimeout":null}', "FailoverTimeout"),
        (b'{"Id":"g","FailoverTimeout":"00:00:00.1"}', "FailoverTimeout"),
        (b'{"Id":7,"FailoverTimeout":"00:01:00"}', "Id"),
        (b'{"Id":"a/b","FailoverTimeout":"00:01:00"}', "Id"),
        (b'{"Id":"\xff","FailoverTimeout":"00:01:00"}', "not JSON"),
    ],
)
async def test_a_wrong_body_is_400_with_what_is_wrong(
    http: httpx2.AsyncClient, body: bytes, says: str
) -> None:
    error = is_error(await http.post("groups", content=body), 400)
    assert says in str(error["Reason"])


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "application/json",
        "application/json; charset=utf-8",
        'Application/JSON;charset="UTF-8"',
        "application/vnd.api+json",
    ],
)
async def test_json_of_any_name_is_read(http: httpx2.AsyncClient, kind: str | None) -> None:
    headers = {"content-type": kind} if kind else {}
    body = b'{"Id":"g","FailoverTimeout":"00:01:00"}'
    assert (await http.post("groups", content=body, headers=headers)).status_code == 201


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/xml", "application/json;charset=utf-16"]
)
async def test_another_content_type_is_415(http: httpx2.AsyncClient, kind: str) -> None:
    is_error(await http.post("groups", content=b"{}", headers={"content-type": kind}), 415)


async def test_an_oversized_body_is_413_even_in_pieces(http: httpx2.AsyncClient) -> None:
    is_error(await http.post("groups", content=b" " * 2001), 413)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 100

    is_error(await http.post("groups", content=pieces()), 413)


# -- groups and sessions --------------------------------------------------------------------------


async def test_lists_have_pages_and_a_total(http: httpx2.AsyncClient) -> None:
    for name in ("a", "b", "c"):
        await http.post("groups", json={"Id": name, "FailoverTimeout": "00:01:00"})
    answer = await http.get("groups", params={"skip": 1, "count": 1})
    assert answer.headers["total-count"] == "3"
    assert [group["Id"] for group in answer.json()] == ["b"]


@pytest.mark.parametrize(
    "query", ["skip=-1", "skip=x", "count=1001", "count=", "count=1.5", "skip=1&skip=2", "skip=%FF"]
)
async def test_a_wrong_page_is_400(http: httpx2.AsyncClient, query: str) -> None:
    is_error(await http.get(f"groups?{query}"), 400)


async def test_a_timeout_with_one_digit_of_hours_is_read_and_written_with_two(
    http: httpx2.AsyncClient,
) -> None:
    body = {"Id": "g", "FailoverTimeout": "0:01:00"}
    assert (await http.post("groups", json=body)).json()["FailoverTimeout"] == "00:01:00"
    assert (await http.post("groups", json=body)).status_code == 200
    assert (await http.get("groups/g/status?after=9&wait=0:00:00.01")).status_code == 200


async def test_a_group_that_exists_is_200_or_409(http: httpx2.AsyncClient) -> None:
    """Equality of configurations ignores what is absent (docs/api.md, "Groups")."""
    body = {"Id": "g", "Name": "G", "FailoverTimeout": "00:00:02", "AdditionalData": {"a": 1}}
    assert (await http.post("groups", json=body)).status_code == 201
    again = await http.post("groups", json={"Id": "g", "FailoverTimeout": "PT2S"})
    assert (again.status_code, again.json()) == (200, body)
    is_error(await http.post("groups", json=body | {"Name": "H"}), 409)


async def test_a_session_that_exists_is_200_or_409(http: httpx2.AsyncClient) -> None:
    await make(http, "a")
    path = "groups/g/clientsessions"
    assert (await http.post(path, json={"Id": "a"})).status_code == 200
    is_error(await http.post(path, json={"Id": "a", "Name": "x"}), 409)
    is_error(await http.post("groups/h/clientsessions", json={"Id": "a"}), 404)


async def test_what_is_deleted_is_gone(http: httpx2.AsyncClient) -> None:
    await make(http, "a")
    await beat(http, "a")
    is_error(await http.delete("groups/g"), 409)
    assert (await http.delete("groups/g/clientsessions/a")).status_code == 204
    is_error(await http.delete("groups/g/clientsessions/a"), 404)
    is_error(await http.get("groups/g/clientsessions/a"), 404)
    answer = await http.delete("groups/g")
    assert (answer.status_code, answer.content) == (204, b"")
    is_error(await http.get("groups/g/status"), 404)


async def test_a_heartbeat_too_soon_is_429_with_the_time_to_wait(http: httpx2.AsyncClient) -> None:
    await make(http, "a", lease="00:00:40")
    await beat(http, "a")
    await beat(http, "a")
    answer = await beat(http, "a")
    is_error(answer, 429)
    assert answer.headers["retry-after"] == "1"
    assert 900 <= int(answer.headers["retry-after-ms"]) <= 1000


@pytest.mark.parametrize("score", [-1, 101, "100", None, "NaN", True])
async def test_a_score_is_a_number_from_0_to_100(http: httpx2.AsyncClient, score: object) -> None:
    await make(http, "a")
    is_error(await beat(http, "a", FailoverScore=score), 400)


async def test_an_override_moves_the_role_and_ends(stage: Stage, http: httpx2.AsyncClient) -> None:
    await make(http, "a", "b")
    await beat(http, "a")
    await beat(http, "a")
    path = "groups/g/clientsessions/b/roleoverride"
    answer = await http.post(path, json={"Value": "Primary", "ExpirationPeriod": "00:00:30"})
    assert answer.status_code == 200
    assert answer.json() == {"Value": 1, "RoleOverrideExpirationTime": "2026-01-31T12:17:10Z"}
    await beat(http, "b")
    for _ in range(6):
        await stage.run_for(0.5)
        last = await beat(http, "b")
    assert last.json()["Role"] == 1
    await stage.run_for(31)
    session = (await http.get("groups/g/clientsessions/b")).json()
    assert session["RoleOverride"] == 0
    assert "RoleOverrideExpirationTime" not in session
    is_error(await http.post(path.replace("/b/", "/c/"), json={"Value": 0}), 404)


async def test_after_a_release_the_other_member_is_primary_at_once(
    stage: Stage, http: httpx2.AsyncClient
) -> None:
    await make(http, "a", "b")
    await beat(http, "a")
    epoch = (await beat(http, "a")).json()["Epoch"]
    await beat(http, "b")
    path = "groups/g/clientsessions/a/release"
    body = {"Epoch": epoch, "HoldOffPeriod": "00:00:05", "Reason": "stopping"}
    assert (await http.post(path, json=body)).status_code == 204
    taken = (await beat(http, "b")).json()
    assert (taken["Role"], taken["Epoch"], taken["PreviousPrimary"]) == (1, epoch + 1, "a")
    history = await http.get("groups/g/history")
    assert history.headers["total-count"] == "2"
    assert history.json()[1]["WhyEnded"] == "stopping"


async def test_a_release_by_another_process_frees_nothing(http: httpx2.AsyncClient) -> None:
    """Fault 8: whoever may write can name the session and the epoch, but not the instance."""
    await make(http, "a", "b")
    await beat(http, "a", Instance="a1")
    epoch = (await beat(http, "a", Instance="a1")).json()["Epoch"]
    await beat(http, "b")
    path = "groups/g/clientsessions/a/release"
    for other in ({}, {"Instance": "b1"}):
        answer = await http.post(path, json={"Epoch": epoch, "HoldOffPeriod": "1.00:00:00"} | other)
        assert answer.status_code == 204
        assert (await http.get("groups/g/status")).json()["Primary"] == "a"
    assert (await http.post(path, json={"Epoch": epoch, "Instance": "a1"})).status_code == 204
    assert (await beat(http, "b")).json()["Role"] == 1


async def test_an_epoch_out_of_reach_is_400_and_the_group_goes_on(http: httpx2.AsyncClient) -> None:
    """Fault 15."""
    await make(http, "a", "b")
    await beat(http, "a")
    await beat(http, "a")
    body = is_error(await beat(http, "b", Epoch=2**53 - 1), 400)
    assert "Epoch is 9007199254740991: it must be at most 8589934593" in str(body["Reason"])
    status = (await http.get("groups/g/status")).json()
    assert (status["Primary"], status["Epoch"]) == ("a", 1)


async def test_a_deleted_group_with_an_unusable_epoch_is_usable_when_made_again(
    stage: Stage, http: httpx2.AsyncClient
) -> None:
    """Fault 15: the epoch that version 0.1.0 was taught is not handed on."""
    await make(http, "a")
    key = GroupKey("default", "default", "g")
    ((version, record),) = [(s.version, s.record) for s in (await stage.store.load()).values()]
    await stage.store.swap(key, version, replace(record, epoch=2**53 - 1))
    await stage.restart()
    app = Api(stage.coordinator, stage.clock)
    base = f"{HOST}/api/v1/clientfailover/"
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url=base) as again:
        body = is_error(await beat(again, "a"), 409)
        assert "Delete the group" in str(body["Resolution"])
        await stage.run_for(2.1)
        assert (await again.delete("groups/g")).status_code == 204
        await make(again, "a")
        await beat(again, "a")
        assert (await beat(again, "a")).json()["Epoch"] == 1


async def test_answers_carry_the_id_of_the_store(stage: Stage, http: httpx2.AsyncClient) -> None:
    """Fault 9: by it a client tells two coordinators apart that know nothing of each other."""
    await make(http, "a")
    joined = await http.post("groups/g/clientsessions", json={"Id": "a"})
    read = await http.get("groups/g/clientsessions/a")
    revision = (await http.get("groups/g/status")).json()["Revision"]
    waited = await http.get("groups/g/status", params={"after": revision, "wait": "00:00:00.01"})
    answers = [joined, read, await beat(http, "a"), await http.get("groups/g/status"), waited]
    assert {answer.json()["StoreId"] for answer in answers} == {stage.store.store_id}


async def test_a_reader_beyond_the_limit_is_503_with_retry_after(
    http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 16: answered at once with what it knows, it would ask at once, for ever."""
    monkeypatch.setattr(service, "MAX_READERS", 0)
    await make(http, "a")
    revision = (await http.get("groups/g/status")).json()["Revision"]
    answer = await http.get("groups/g/status", params={"after": revision, "wait": "00:01:00"})
    is_error(answer, 503)
    assert answer.headers["retry-after"] == "5"


async def test_a_blocking_status_read_returns_at_the_change(
    stage: Stage, http: httpx2.AsyncClient
) -> None:
    await make(http, "a")
    revision = (await http.get("groups/g/status")).json()["Revision"]
    query = {"after": revision, "wait": "00:01:00"}
    reading = asyncio.create_task(http.get("groups/g/status", params=query))
    await stage.settle()
    assert not reading.done()
    await beat(http, "a")
    status = (await asyncio.wait_for(reading, 5)).json()
    assert status["PendingPrimary"] == "a"
    assert status["Revision"] > revision


async def test_a_reader_that_has_gone_does_not_wait_any_more(stage: Stage) -> None:
    api = Api(stage.coordinator, stage.clock)
    gone = asyncio.Event()

    async def receive() -> dict[str, object]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(_message: object) -> None:
        pass

    async def ask(method: str, path: str, query: bytes = b"", body: object = None) -> None:
        scope: dict[str, object] = {"type": "http", "method": method, "path": path, "headers": []}
        scope |= {"raw_path": path.encode(), "query_string": query}
        messages: list[dict[str, object]] = []
        if body is not None:
            messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive_all() -> dict[str, object]:
            return messages.pop() if messages else await receive()

        await api(scope, receive_all, send)

    base = "/api/v1/clientfailover/groups"
    await ask("POST", base, body={"Id": "g", "FailoverTimeout": "00:00:02"})
    reading = asyncio.create_task(ask("GET", f"{base}/g/status", b"after=1&wait=00:05:00"))
    await stage.settle()
    assert stage.coordinator.blocked_readers == 1
    gone.set()
    await asyncio.wait_for(reading, 5)
    await stage.settle()
    assert stage.coordinator.blocked_readers == 0


@pytest.mark.parametrize("query", ["after=x", "after=1&wait=soon", "after=1&wait=-00:00:01"])
async def test_a_wrong_wait_is_400(http: httpx2.AsyncClient, query: str) -> None:
    await make(http)
    is_error(await http.get(f"groups/g/status?{query}"), 400)


async def test_answers_leave_out_properties_without_a_value(http: httpx2.AsyncClient) -> None:
    await make(http, "a")
    paths = ("groups", "groups/g", "groups/g/status", "groups/g/clientsessions")
    texts = [(await http.get(path)).text for path in paths]
    texts.append((await beat(http, "a")).text)
    assert not any("null" in text for text in texts)


async def test_roles_can_be_written_as_names(stage: Stage) -> None:
    app = Api(stage.coordinator, stage.clock, role_names=True)
    transport = httpx2.ASGITransport(app=app)
    base = "http://coordinator/api/v1/clientfailover/"
    async with httpx2.AsyncClient(transport=transport, base_url=base) as http:
        await make(http, "a")
        assert (await beat(http, "a")).json()["Role"] == "PendingPrimary"


# -- readiness_problem --------------------------------------------------------------------------------------


async def test_a_failing_store_is_503_and_not_ready(stage: Stage, http: httpx2.AsyncClient) -> None:
    await make(http, "a")
    assert (await http.get(f"{HOST}/readyz")).status_code == 200
    stage.disk_full()
    answer = await http.post("groups", json={"Id": "h", "FailoverTimeout": "00:00:02"})
    assert "the disk is full" in str(is_error(answer, 503)["Reason"])
    assert int(answer.headers["retry-after"]) >= 1
    is_error(await http.get(f"{HOST}/readyz"), 503)
    assert (await http.get(f"{HOST}/healthz")).status_code == 200
    is_error(await http.get("groups/h"), 404)


async def test_a_stopping_coordinator_is_503(stage: Stage, http: httpx2.AsyncClient) -> None:
    await make(http, "a")
    stage.coordinator.refuse_requests()
    is_error(await beat(http, "a"), 503)
    is_error(await http.get("groups/g/status"), 503)
    is_error(await http.get(f"{HOST}/readyz"), 503)
    assert (await http.get(f"{HOST}/healthz")).status_code == 200


async def test_a_fault_of_ours_is_500_without_a_traceback(
    stage: Stage,
    http: httpx2.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Coordinator, "list_groups", lambda *_: 1 / 0)
    error = is_error(await http.get("groups"), 500)
    assert "ZeroDivision" not in json.dumps(error)
    assert error["OperationId"] in [r.fields["operation_id"] for r in caplog.records]  # type: ignore[attr-defined]


# -- rights ---------------------------------------------------------------------------------------


def rights(*entries: tuple[str, int, int]) -> dict[str, object]:
    return {
        "RoleTrusteeAccessControlEntries": [
            {
                "Trustee": {"Type": 1, "ObjectId": name},
                "AccessType": kind,
                "AccessRights": number,
            }
            for name, kind, number in entries
        ]
    }


@pytest.fixture
async def secured(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the same coordinator behind Basic; ann, bob and eve have their names as passwords.

    ann is the administrator.
    """
    monkeypatch.setattr(Password, "fits", lambda self, given: given == self.salt)
    users = {name: Password(4, 8, 1, name.encode(), b"") for name in ("ann", "bob", "eve")}
    auth = Authenticator(users, administrators={Subject(1, "ann")})
    app = Api(stage.coordinator, stage.clock, auth)
    transport = httpx2.ASGITransport(app=app)
    base = "http://coordinator/api/v1/clientfailover/"
    async with httpx2.AsyncClient(
        transport=transport, base_url=base, auth=("ann", "ann")
    ) as client:
        yield client


async def test_an_unknown_caller_is_401_with_the_accepted_schemes(
    secured: httpx2.AsyncClient,
) -> None:
    answer = await secured.get("groups", auth=("ann", "wrong"))
    is_error(answer, 401)
    assert answer.headers["www-authenticate"] == 'Basic realm="failover-agent"'
    assert (await secured.get("groups")).status_code == 200


async def test_health_and_description_are_for_anybody(secured: httpx2.AsyncClient) -> None:
    for path in ("/", "/healthz", "/readyz", "/openapi.json"):
        assert (await secured.get(HOST + path, auth=("who", "ever"))).status_code == 200


async def test_without_lists_whoever_is_known_may_do_everything(
    secured: httpx2.AsyncClient,
) -> None:
    await make(secured, "a")
    assert (await secured.get("groups/g", auth=("eve", "eve"))).status_code == 200


async def test_each_call_needs_its_right(secured: httpx2.AsyncClient) -> None:
    await make(secured, "a")
    acl = rights(("ann", 0, 31), ("bob", 0, 1))
    assert (await secured.put("groups/g/accesscontrol", json=acl)).status_code == 204
    bob = ("bob", "bob")
    session = "groups/g/clientsessions/a"
    assert (await secured.get("groups/g/status", auth=bob)).status_code == 200
    is_error(await secured.post(f"{session}/heartbeat", json=BEAT, auth=bob), 403)
    is_error(await secured.post(f"{session}/roleoverride", json={"Value": 1}, auth=bob), 403)
    is_error(await secured.post(f"{session}/release", json={"Epoch": 1}, auth=bob), 403)
    is_error(await secured.delete(session, auth=bob), 403)
    is_error(await secured.put("groups/g/accesscontrol", json=acl, auth=bob), 403)
    is_error(await secured.get("groups/g/status", auth=("eve", "eve")), 403)
    assert (await secured.get("groups", auth=("eve", "eve"))).json() == []


async def test_a_groups_own_list_counts_before_its_namespaces(secured: httpx2.AsyncClient) -> None:
    await make(secured)
    namespace = (
        f"{HOST}/api/v1/tenants/default/namespaces/default/accesscontrol/clientfailover/groups"
    )
    acl = rights(("ann", 0, 31), ("bob", 0, 31), ("bob", 1, 2))
    assert (await secured.put(namespace, json=acl)).status_code == 204
    assert (await secured.get(namespace)).json() == acl
    assert (await secured.get("groups/g/accesscontrol")).json() == acl
    body = {"Id": "h", "FailoverTimeout": "00:00:02"}
    is_error(await secured.post("groups", json=body, auth=("bob", "bob")), 403)
    await secured.put("groups/g/accesscontrol", json=rights(("ann", 0, 31), ("eve", 0, 1)))
    assert (await secured.get("groups/g", auth=("eve", "eve"))).status_code == 200
    is_error(await secured.get("groups/g", auth=("bob", "bob")), 403)


async def test_somebody_keeps_the_right_to_manage(http: httpx2.AsyncClient) -> None:
    await make(http)
    for acl in (rights(), rights(("ann", 0, 7)), rights(("ann", 0, 31), ("ann", 1, 8))):
        is_error(await http.put("groups/g/accesscontrol", json=acl), 400)


def test_a_users_line_is_made_by_hash_password() -> None:
    assert hash_password("s", ("r",)).startswith("scrypt$15$8$1$")
