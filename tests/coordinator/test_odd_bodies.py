"""No body, whatever is in it, makes the coordinator fail: it is processed, or refused with a status below 500."""

import asyncio
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from agent.coordinator.api import Api
from tests.odd_json import ODD_JSON

from .conftest import Stage

SESSION = "groups/g/clientsessions/s"
CALLS = {
    "groups": ("POST", {"Id": '"g"', "FailoverTimeout": '"00:01:00"'}, ["Name", "Description"]),
    "groups/g/clientsessions": ("POST", {"Id": '"n"'}, ["Name"]),
    f"{SESSION}/heartbeat": (
        "POST",
        {"FailoverScore": "1"},
        ["LastDataProcessedTime", "Instance", "Epoch"],
    ),
    f"{SESSION}/roleoverride": ("POST", {"Value": "0"}, ["ExpirationPeriod"]),
    f"{SESSION}/release": (
        "POST",
        {"Epoch": "1"},
        ["Instance", "HoldOffPeriod", "Reason", "LastDataProcessedTime"],
    ),
    "groups/g/accesscontrol": ("PUT", {"RoleTrusteeAccessControlEntries": "[]"}, []),
}


@pytest.mark.parametrize("path", CALLS)
def test_no_body_makes_the_coordinator_fail(path: str) -> None:
    """The store is as it is: what is accepted is kept, and read again by a restart."""
    method, valid, known = CALLS[path]
    names = st.sampled_from([*valid, *known, "AdditionalData", "AdditionalData", "Other"])

    @settings(
        deadline=None,
        database=None,
        max_examples=40,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.tuples(names, ODD_JSON), max_size=3), st.sampled_from([b"", b"", b"\xff"]))
    def check(properties: list[tuple[str, str]], broken: bytes) -> None:
        given_properties = [*valid.items(), *properties]
        text = "{" + ",".join(f'"{name}":{value}' for name, value in given_properties) + "}"
        runner.run(send(text.encode() + broken))

    async def send(body: bytes) -> None:
        stage = Stage()
        await stage.coordinator.start()
        transport = httpx2.ASGITransport(app=Api(stage.coordinator, stage.clock))
        base = "http://coordinator/api/v1/clientfailover/"
        async with httpx2.AsyncClient(transport=transport, base_url=base) as http:
            if path != "groups":
                await http.post("groups", json={"Id": "g", "FailoverTimeout": "00:01:00"})
                await http.post("groups/g/clientsessions", json={"Id": "s"})
            answer = await http.request(method, path, content=body)
            assert answer.status_code < 500, answer.text
            before = await everything(http)
            await stage.restart()
            transport.app = Api(stage.coordinator, stage.clock)
            assert await everything(http) == before
        await stage.coordinator.stop()

    async def everything(http: httpx2.AsyncClient) -> list[Any]:
        found: list[Any] = []
        for one in ("groups", "groups/g/clientsessions", "groups/g/accesscontrol"):
            answer = await http.get(one)
            assert answer.status_code in {200, 404}
            if answer.status_code == 200:
                found.append(answer.json())
        for session in found[1] if len(found) > 1 else ():
            del session["Heartbeat"], session["HeartbeatPosted"]
        return found

    with asyncio.Runner() as runner:
        check()


async def test_the_additional_data_of_a_group_is_bounded(stage: Stage) -> None:
    """409, with what is there; sessions without it still join."""
    transport = httpx2.ASGITransport(app=Api(stage.coordinator, stage.clock))
    base = "http://coordinator/api/v1/clientfailover/"
    async with httpx2.AsyncClient(transport=transport, base_url=base) as http:
        await http.post("groups", json={"Id": "g", "FailoverTimeout": "00:01:00"})
        body = {"AdditionalData": {"x": "y" * 16_000}}
        for number in range(17):
            joining = body | {"Id": f"s{number}"}
            answer = await http.post("groups/g/clientsessions", json=joining)
            assert answer.status_code == (201 if number < 16 else 409)
        assert "would have 272136 bytes: it must be at most 262144" in answer.json()["Reason"]
        assert (await http.post("groups/g/clientsessions", json={"Id": "t"})).status_code == 201
        again = await http.post("groups/g/clientsessions", json=body | {"Id": "s5"})
        assert again.status_code == 200
