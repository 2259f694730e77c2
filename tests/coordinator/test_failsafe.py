"""Failsafe over the API of the coordinator: what is reported, kept, lifted and written to the log."""

import logging
from collections.abc import AsyncIterator

import httpx2
import pytest

from agent.coordinator.api import Api
from agent.coordinator.auth import Authenticator, Password, Subject

from .conftest import Stage

BEAT = {"FailoverScore": 100}


async def make(http: httpx2.AsyncClient, *sessions: str) -> None:
    await http.post("groups", json={"Id": "g", "FailoverTimeout": "00:00:02"})
    for session in sessions:
        await http.post("groups/g/clientsessions", json={"Id": session})


async def beat(http: httpx2.AsyncClient, session: str, **more: object) -> dict[str, object]:
    body = {"Instance": f"{session}1", "FailsafeUrl": f"http://{session}:9", **BEAT, **more}
    answer = await http.post(f"groups/g/clientsessions/{session}/heartbeat", json=body)
    assert answer.status_code == 200, answer.text
    result: dict[str, object] = answer.json()
    return result


async def status(http: httpx2.AsyncClient) -> dict[str, object]:
    result: dict[str, object] = (await http.get("groups/g/status")).json()
    return result


def member(session: str) -> dict[str, str]:
    return {"Id": session, "Url": f"http://{session}:9"}


async def lapse(stage: Stage, http: httpx2.AsyncClient) -> None:
    """Lose the primary a of a group whose members a and b are both asked."""
    await make(http, "a", "b")
    for _ in range(2):
        await beat(http, "a")
    await beat(http, "b")
    stage.clock.elapsed += 1
    await beat(http, "a", Epoch=1, Holds=1)
    stage.clock.elapsed += 1
    await beat(http, "a", Epoch=1, Holds=1, FailsafeRevision=1)
    await stage.run_for(2.5)


async def lift(
    http: httpx2.AsyncClient, epoch: int = 1, auth: tuple[str, str] | None = None, **more: object
) -> httpx2.Response:
    body = {"Epoch": epoch, "Reason": "a was scrapped", "NobodyIsActive": True, **more}
    return await http.post(
        "groups/g/failsafe/lift", json=body, auth=auth or httpx2.USE_CLIENT_DEFAULT
    )


async def test_a_primary_is_sent_its_members_and_the_status_follows(
    stage: Stage, http: httpx2.AsyncClient
) -> None:
    await make(http, "a", "b")
    await beat(http, "a")
    answer = await beat(http, "a")
    off = 'client session "b" reported no FailsafeUrl'
    assert (answer["Cleared"], answer["Failsafe"]) == (0, {"Revision": 0, "Off": off})
    assert (await status(http))["Failsafe"] == {"State": "Off", "Why": off}
    await beat(http, "b")
    stage.clock.elapsed += 1
    answer = await beat(http, "a", Epoch=1, Holds=1)
    assert answer["Failsafe"] == {"Revision": 1, "Members": [member("a"), member("b")]}
    stage.clock.elapsed += 1
    await beat(http, "a", Epoch=1, Holds=1, FailsafeRevision=1)
    assert (await status(http))["Failsafe"] == {
        "State": "Ready",
        "Revision": 1,
        "Members": [member("a"), member("b")],
    }


async def test_a_registration_with_a_url_makes_a_member(http: httpx2.AsyncClient) -> None:
    await make(http, "a")
    body = {"Id": "b", "Instance": "b1", "FailsafeUrl": "http://b:9"}
    for code in (201, 200):
        assert (await http.post("groups/g/clientsessions", json=body)).status_code == code
    for _ in range(2):
        answer = await beat(http, "a")
    assert answer["Failsafe"] == {"Revision": 1, "Members": [member("a"), member("b")]}
    bad = await http.post("groups/g/clientsessions", json={**body, "FailsafeUrl": "b:9"})
    assert (bad.status_code, "FailsafeUrl is " in bad.text) == (400, True)


async def test_without_failsafe_the_answers_have_no_property_of_it(
    http: httpx2.AsyncClient,
) -> None:
    await make(http, "a")
    for _ in range(2):
        answer = await beat(http, "a", FailsafeUrl=None)
    assert not {"Cleared", "Failsafe"} & {*answer, *await status(http)}


async def test_a_tenure_lapses_is_kept_through_a_restart_and_resumed(
    stage: Stage, http: httpx2.AsyncClient
) -> None:
    await lapse(stage, http)
    seen = await status(http)
    failsafe = seen["Failsafe"]
    assert isinstance(failsafe, dict)
    lapsed = failsafe.pop("Lapsed")
    assert (lapsed["SessionId"], lapsed["Epoch"]) == ("a", 1)
    assert (seen.get("Primary"), seen["Cleared"]) == (None, 0)
    assert failsafe == {
        "State": "Restricted",
        "Why": 'client session "a" may still be primary by failsafe in epoch 1',
        "Revision": 1,
        "Members": [member("a"), member("b")],
        "Choosable": [member("a"), member("b")],
    }
    app = Api(await stage.restart(), stage.clock)
    base = "http://coordinator/api/v1/clientfailover/"
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url=base) as again:
        answer = await beat(again, "a", Epoch=1, Holds=1, FailsafeRevision=1)
        assert (answer["Role"], answer["Epoch"]) == (1, 1)
        (entry,) = (await again.get("groups/g/history")).json()
        assert (entry["WhyStarted"], entry.get("Until")) == ("chosen, resumed", None)


async def test_a_refused_tenure_is_kept_in_the_history(
    stage: Stage, http: httpx2.AsyncClient
) -> None:
    await lapse(stage, http)
    await beat(http, "b", Epoch=1)
    assert (await beat(http, "b", Epoch=1))["Role"] == 1
    body = {"Epoch": 2, "Instance": "b1", "Held": False, "Reason": "bound by a promise to a"}
    release = await http.post("groups/g/clientsessions/b/release", json=body)
    assert release.status_code == 204
    newest = (await http.get("groups/g/history")).json()[0]
    assert (newest["Epoch"], newest["WhyEnded"]) == (2, "bound by a promise to a")
    assert (await status(http))["Cleared"] == 0


async def test_a_restricted_group_is_lifted_and_then_deleted(
    stage: Stage, http: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    await make(http, "a", "b")
    assert (await lift(http, 0)).status_code == 204, "nothing to do"
    await lapse(stage, http)
    for wrong in (7, 0):
        answer = await lift(http, wrong)
        assert (answer.status_code, answer.json()["Error"]) == (409, "Conflict")
    for more in ({"NobodyIsActive": False}, {"NobodyIsActive": None}, {"Reason": ""}):
        answer = await lift(http, **more)
        assert answer.status_code == 400
    assert (
        "must be the value true: the caller"
        in (await lift(http, NobodyIsActive=False)).json()["Reason"]
    )
    assert (await http.delete("groups/g")).status_code == 409
    with caplog.at_level(logging.WARNING):
        assert (await lift(http)).status_code == 204
        assert (await lift(http)).status_code == 204
    assert [record.message for record in caplog.records].count("failsafe declared") == 1
    newest = (await http.get("groups/g/history")).json()[0]
    assert (newest["Epoch"], newest["SessionId"]) == (2, "")
    assert newest["WhyStarted"] == "lifted by an operator: a was scrapped"
    assert (await http.delete("groups/g")).status_code == 204
    assert (await lift(http)).status_code == 404


async def test_a_group_that_somebody_holds_is_not_lifted(http: httpx2.AsyncClient) -> None:
    await make(http, "a")
    for _ in range(2):
        await beat(http, "a")
    answer = await lift(http)
    assert (answer.status_code, answer.json()["Reason"][:30]) == (
        409,
        'Client session "a" is primary ',
    )


async def test_the_log_has_urls_sets_and_what_they_restrict(
    stage: Stage, http: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        await lapse(stage, http)
        await beat(http, "a", Epoch=1, Holds=1, FailsafeRevision=1)
    seen = [(record.message, record.__dict__.get("fields", {})) for record in caplog.records]
    about = [(message, fields) for message, fields in seen if "failsafe" in message]
    assert [message for message, _ in about] == [
        "failsafe URL changed",
        "failsafe URL changed",
        "failsafe set offered",
        "failsafe set in use",
        "failsafe restricts the choice",
    ]
    assert about[0][1]["after"] == "http://a:9"
    assert about[2][1]["members"] == ["a", "b"]
    assert about[4][1]["choosable"] == ["a", "b"]
    reasons = [fields["reason"] for message, fields in seen if message == "role changed"]
    assert reasons[-1] == "chosen, resumed"


# -- rights -----------------------------------------------------------------------------------------


@pytest.fixture
async def secured(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of ann, the administrator; bob has his name as password, too."""
    monkeypatch.setattr(Password, "fits", lambda self, given: given == self.salt)
    users = {name: Password(4, 8, 1, name.encode(), b"") for name in ("ann", "bob")}
    auth = Authenticator(users, administrators={Subject(1, "ann")})
    app = Api(stage.coordinator, stage.clock, auth)
    transport = httpx2.ASGITransport(app=app)
    base = "http://coordinator/api/v1/clientfailover/"
    async with httpx2.AsyncClient(
        transport=transport, base_url=base, auth=("ann", "ann")
    ) as client:
        yield client


async def test_only_somebody_who_manages_access_may_lift_and_the_history_names_him(
    stage: Stage, secured: httpx2.AsyncClient
) -> None:
    await lapse(stage, secured)
    entries = [
        {"Trustee": {"Type": 1, "ObjectId": name}, "AccessType": 0, "AccessRights": rights}
        for name, rights in (("ann", 31), ("bob", 7))
    ]
    acl = {"RoleTrusteeAccessControlEntries": entries}
    assert (await secured.put("groups/g/accesscontrol", json=acl)).status_code == 204
    assert (await lift(secured, auth=("bob", "bob"))).status_code == 403
    assert (await lift(secured)).status_code == 204
    newest = (await secured.get("groups/g/history")).json()[0]
    assert newest["WhyStarted"] == "lifted by user:ann: a was scrapped"
