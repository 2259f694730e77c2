"""A client that knows only version 1 of the API (docs/api.md, "What v1 clients do, and what they get")."""

import httpx2

from .conftest import Stage


class V1Client:
    """What AVEVA's published client does: no epochs, no release, no blocking reads."""

    def __init__(self, http: httpx2.AsyncClient, session: str) -> None:
        self.http = http
        self.session = session
        self.timeout = "00:01:00"
        self.role = 0
        self.refused = 0

    async def start(self) -> None:
        await self.register()
        await self.beat()

    async def register(self) -> None:
        body = {"Id": "collectors", "FailoverTimeout": self.timeout}
        answer = await self.http.post("groups/", json=body)
        if answer.status_code == 409:
            self.timeout = (await self.http.get("groups/collectors")).json()["FailoverTimeout"]
        else:
            assert answer.status_code in {200, 201}
        body = {"Id": self.session, "Name": f"Adapter {self.session}"}
        answer = await self.http.post("groups/collectors/clientsessions", json=body)
        assert answer.status_code in {200, 201}

    async def beat(self, last_data: str = "0001-01-01T00:00:00") -> None:
        """On PendingPrimary it keeps its role and beats again at once, up to 10 times."""
        path = f"groups/collectors/clientsessions/{self.session}/heartbeat"
        body = {"FailoverScore": 100.0, "LastDataProcessedTime": last_data, "Unknown": [1]}
        for _ in range(10):
            answer = await self.http.post(path, json=body)
            if answer.status_code == 404:
                await self.register()
                continue
            if answer.status_code == 429:
                self.refused += 1
                return
            assert answer.status_code == 200
            told = answer.json()
            assert told.get("LastDataProcessedTime", "") is not None
            if told["Role"] != 2:
                self.role = told["Role"]
                return

    async def stop(self) -> None:
        path = f"groups/collectors/clientsessions/{self.session}"
        assert (await self.http.delete(path)).status_code == 204


async def test_the_first_becomes_primary_by_confirming_at_once(http: httpx2.AsyncClient) -> None:
    first, second = V1Client(http, "one"), V1Client(http, "two")
    await first.start()
    await second.start()
    assert (first.role, second.role) == (1, 0)
    status = (await http.get("groups/collectors/status")).json()
    assert status["Primary"] == "one"
    assert "LastDataProcessedTime" not in status


async def test_it_adopts_the_servers_timeout(http: httpx2.AsyncClient) -> None:
    await http.post("groups", json={"Id": "collectors", "FailoverTimeout": "00:00:10"})
    client = V1Client(http, "one")
    await client.start()
    assert client.timeout == "00:00:10"
    assert client.role == 1


async def test_its_rhythm_is_never_refused(stage: Stage, http: httpx2.AsyncClient) -> None:
    """One at once, one after 1 s, then one each FailoverTimeout / 2; confirmations besides."""
    client = V1Client(http, "one")
    await client.start()
    for wait_s in (1, 29, 30, 30):
        await stage.run_for(wait_s)
        await client.beat()
    assert (client.role, client.refused) == (1, 0)


def two_of(http: httpx2.AsyncClient) -> tuple[V1Client, V1Client]:
    """Two clients of one group, whose timeout is 4 s."""
    first, second = V1Client(http, "one"), V1Client(http, "two")
    first.timeout = second.timeout = "00:00:04"
    return first, second


async def test_the_standby_takes_over_from_a_dead_one_with_its_progress(
    stage: Stage, http: httpx2.AsyncClient
) -> None:
    first, second = two_of(http)
    await first.start()
    await second.start()
    await stage.run_for(1)
    await first.beat("2026-01-31T12:00:00.1234567Z")
    for _ in range(4):
        await stage.run_for(2)
        await second.beat()
    assert second.role == 1
    await stage.run_for(2)
    await first.beat()
    assert first.role == 0
    status = (await http.get("groups/collectors/status")).json()
    assert status["Primary"] == "two"
    assert status["LastDataProcessedTime"] == "2026-01-31T12:00:00.123456Z"


async def test_a_clean_stop_hands_over_at_the_next_heartbeat(
    stage: Stage, http: httpx2.AsyncClient
) -> None:
    first, second = V1Client(http, "one"), V1Client(http, "two")
    await first.start()
    await second.start()
    await stage.run_for(2)
    await first.stop()
    await second.beat()
    assert second.role == 1


async def test_it_registers_again_when_it_is_not_known_any_more(
    stage: Stage, http: httpx2.AsyncClient
) -> None:
    client = V1Client(http, "one")
    await client.start()
    await http.delete("groups/collectors/clientsessions/one")
    await http.delete("groups/collectors")
    await stage.run_for(2)
    await client.beat()
    assert client.role == 1


async def test_a_registration_that_nobody_follows_gets_no_role(
    stage: Stage, http: httpx2.AsyncClient
) -> None:
    """As of a client without which the network has kept its request, and lost the end of its connection."""
    first, second = two_of(http)
    await first.start()
    await first.stop()
    await first.register()
    for _ in range(4):
        status = (await http.get("groups/collectors/status")).json()
        assert "Primary" not in status
        assert "PendingPrimary" not in status
        await stage.run_for(2)
    await second.start()
    assert second.role == 1
    assert (
        await http.delete("groups/collectors/clientsessions/one?inactive=true")
    ).status_code == 204


async def test_a_late_heartbeat_keeps_the_role_for_one_timeout_at_most(
    stage: Stage, http: httpx2.AsyncClient
) -> None:
    """And brings no deleted session back."""
    first, second = two_of(http)
    await first.start()
    await second.start()
    await stage.run_for(3)
    await second.beat()
    await first.beat()
    for _ in range(3):
        await stage.run_for(2)
        await second.beat()
    assert second.role == 1
    await first.stop()
    late = await http.post(
        "groups/collectors/clientsessions/one/heartbeat", json={"FailoverScore": 100.0}
    )
    assert late.status_code == 404
    assert len((await http.get("groups/collectors/clientsessions")).json()) == 1
