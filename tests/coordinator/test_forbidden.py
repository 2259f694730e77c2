"""What docs/security.md forbids, act by act: each is refused with its status, and changes nothing.

One coordinator with access control, as in production. The acts are a table: who does what, and the
status of the refusal. After each of them the whole state, as an administrator reads it, is as before.
"""

import base64
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet

from .conftest import Process

KEY, OTHER_KEY = (ECKey.generate_key("P-256", {"kid": "k1"}) for _ in range(2))
ISSUER, AUDIENCE, TENANT = "https://identity.example", "failover", "plant-1"
READ, WRITE, DELETE, MANAGE = 1, 2, 4, 8
ALL = 31
USER, CLIENT, ROLE = 1, 2, 3
ALLOWED, DENIED = 0, 1

NAMESPACE = "/api/v1/tenants/default/namespaces/default"
BASE = "/api/v1/clientfailover"
GROUP = f"{BASE}/groups/line-7"
HIDDEN = f"{BASE}/groups/hidden"
OTHER_TENANT = "/api/v1/tenants/plant-2/namespaces/default/clientfailover"
A, B = f"{GROUP}/clientsessions/a", f"{GROUP}/clientsessions/b"
NAMESPACE_LIST = f"{NAMESPACE}/accesscontrol/clientfailover/groups"

BEAT = {"FailoverScore": 100}


def token(key: Any = KEY, **changes: Any) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": int(time.time()) + 3600}
    claims |= {"tid": TENANT} | changes
    present = {name: value for name, value in claims.items() if value is not None}
    return "Bearer " + jwt.encode({"alg": "ES256", "kid": "k1"}, present, key, algorithms=["ES256"])


def unsigned(**claims: Any) -> str:
    parts = [{"alg": "none"}, {"iss": ISSUER, "aud": AUDIENCE, "exp": 9_999_999_999, **claims}]
    texts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts
    ]
    return f"Bearer {'.'.join(texts)}."


CALLERS: Mapping[str, str | None] = {
    "nobody": None,
    "admin": token(sub="ann", azp="console", roles=["admins"]),
    "reader": token(sub="reader"),
    "agent a": token(sub="agent-a"),
    "agent b": token(sub="agent-b"),
    "stranger": token(sub="stranger"),
    "denied": token(sub="denied"),
    "a user of another tenant": token(sub="agent-a", tid="plant-2"),
    "an expired token": token(sub="agent-a", exp=int(time.time()) - 3600),
    "a token without an end": token(sub="agent-a", exp=None),
    "a token of tomorrow": token(sub="agent-a", nbf=int(time.time()) + 86_400),
    "a token for another service": token(sub="agent-a", aud="other"),
    "a token of another issuer": token(sub="agent-a", iss="https://evil.example"),
    "a token signed by another": token(OTHER_KEY, sub="agent-a"),
    "an unsigned token": unsigned(sub="agent-a"),
    "a token for nobody": token(sub=["agent-a"]),
    "a token of wrong types": token(sub=7, exp="soon"),
    "no token at all": "Bearer x.y.z",
    "a password": "Basic " + base64.b64encode(b"agent-a:agent-a").decode(),
}


@dataclass(frozen=True)
class Act:
    """One forbidden act."""

    caller: str
    method: str
    path: str
    status: int
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        what = f"{self.caller}: {self.method} {self.path.removeprefix('/api/v1/')}"
        return what[:80] + "".join(f" {name}" for name in self.headers)


def entry(kind: int, name: str, rights: int, access: int = ALLOWED) -> dict[str, Any]:
    trustee = {"Type": kind, "ObjectId": name}
    return {"Trustee": trustee, "AccessType": access, "AccessRights": rights}


def entries(*given: dict[str, Any]) -> dict[str, Any]:
    return {"RoleTrusteeAccessControlEntries": list(given)}


ADMINS = entry(ROLE, "admins", ALL)
NAMESPACE_ENTRIES = entries(
    ADMINS,
    entry(CLIENT, "reader", READ),
    entry(CLIENT, "agent-a", READ | WRITE | DELETE),
    entry(CLIENT, "agent-b", READ | WRITE | DELETE),
    entry(CLIENT, "denied", ALL),
    entry(CLIENT, "denied", ALL, DENIED),
)

CALLS: tuple[tuple[str, str, Any], ...] = (
    ("GET", BASE, None),
    ("GET", f"{BASE}/groups", None),
    ("POST", f"{BASE}/groups", {"Id": "new", "FailoverTimeout": "00:01:00"}),
    ("GET", GROUP, None),
    ("DELETE", HIDDEN, None),
    ("GET", f"{GROUP}/status", None),
    ("GET", f"{GROUP}/history", None),
    ("GET", f"{GROUP}/clientsessions", None),
    ("POST", f"{GROUP}/clientsessions", {"Id": "new"}),
    ("GET", A, None),
    ("DELETE", A, None),
    ("POST", f"{A}/heartbeat", BEAT),
    ("POST", f"{A}/release", {"Epoch": 1}),
    ("POST", f"{A}/roleoverride", {"Value": 1}),
    ("GET", f"{GROUP}/accesscontrol", None),
    ("PUT", f"{GROUP}/accesscontrol", entries(ADMINS)),
    ("DELETE", f"{HIDDEN}/accesscontrol", None),
    ("GET", NAMESPACE_LIST, None),
    ("PUT", NAMESPACE_LIST, entries(ADMINS)),
    ("DELETE", NAMESPACE_LIST, None),
)
"""Every call that needs a right, with a body that is right."""

READS = {("GET", path) for method, path, _ in CALLS if method == "GET"}


def deep(levels: int) -> str:
    return '{"Id":"c","FailoverScore":1,"AdditionalData":{"x":' + "[" * levels + "]" * levels + "}}"


ACTS: tuple[Act, ...] = (
    *(Act("nobody", method, path, 401, body) for method, path, body in CALLS),
    *(
        Act(caller, "POST", f"{A}/heartbeat", 401, BEAT)
        for caller in CALLERS
        if caller.startswith(("a token", "an ", "no token", "a password"))
    ),
    # another tenant's token
    *(
        Act("a user of another tenant", method, path, 403, body)
        for method, path, body in (
            ("GET", f"{NAMESPACE}/clientfailover/groups/line-7/status", None),
            ("POST", f"{NAMESPACE}/clientfailover/groups/line-7/clientsessions/a/heartbeat", BEAT),
            ("PUT", NAMESPACE_LIST, entries(ADMINS)),
        )
    ),
    Act(
        "agent a",
        "POST",
        f"{OTHER_TENANT}/groups",
        403,
        {"Id": "new", "FailoverTimeout": "01:00:00"},
    ),
    Act("agent a", "GET", f"{OTHER_TENANT}/groups", 403),
    # one who may only read, one who may nothing, one who is denied
    *(
        Act("reader", method, path, 403, body)
        for method, path, body in CALLS
        if (method, path) not in READS
    ),
    *(
        Act(caller, method, path, 403, body)
        for caller in ("stranger", "denied")
        for method, path, body in (
            ("GET", GROUP, None),
            ("POST", f"{BASE}/groups", {"Id": "line-7", "FailoverTimeout": "01:00:00"}),
            ("POST", f"{A}/heartbeat", BEAT),
        )
    ),
    # a member against another member
    Act("agent b", "POST", f"{A}/heartbeat", 403, BEAT),
    Act("agent b", "POST", f"{A}/heartbeat", 403, {**BEAT, "Instance": "of-a"}),
    Act("agent b", "POST", f"{A}/release", 403, {"Epoch": 1, "Instance": "of-a"}),
    Act("agent b", "DELETE", A, 403),
    # a member against its group's operators
    Act("agent a", "DELETE", NAMESPACE_LIST, 403),
    Act("agent a", "PUT", NAMESPACE_LIST, 403, entries(entry(CLIENT, "agent-a", ALL))),
    Act("agent a", "PUT", f"{GROUP}/accesscontrol", 403, entries(entry(CLIENT, "agent-a", ALL))),
    # what is there is not told to those who may not read it
    Act("agent a", "GET", HIDDEN, 403),
    Act("agent a", "POST", f"{BASE}/groups", 403, {"Id": "hidden", "FailoverTimeout": "01:00:00"}),
    Act("agent a", "POST", f"{BASE}/groups", 403, {"Id": "hidden", "FailoverTimeout": "00:00:07"}),
    # an administrator's own mistakes
    Act("admin", "PUT", NAMESPACE_LIST, 400, entries(entry(CLIENT, "agent-a", READ))),
    Act("admin", "PUT", NAMESPACE_LIST, 400, entries(entry(CLIENT, "agent-a", ALL, DENIED))),
    Act(
        "admin",
        "PUT",
        NAMESPACE_LIST,
        413,
        entries(ADMINS, *(entry(CLIENT, f"c{n}", 1) for n in range(1000))),
    ),
    Act("admin", "DELETE", GROUP, 409),
    Act("admin", "POST", f"{BASE}/groups", 409, {"Id": "line-7", "FailoverTimeout": "00:00:07"}),
    Act("admin", "POST", f"{BASE}/groups", 400, {"Id": "new"}),
    Act("admin", "POST", f"{BASE}/groups", 400, {"Id": "a/b", "FailoverTimeout": "01:00:00"}),
    # bodies
    Act("agent a", "POST", f"{A}/heartbeat", 400, {"FailoverScore": 1e300}),
    Act("agent a", "POST", f"{A}/heartbeat", 400, {**BEAT, "Epoch": 9_007_199_254_740_991}),
    Act("agent a", "POST", f"{A}/heartbeat", 400, "{"),
    Act("agent a", "POST", f"{GROUP}/clientsessions", 400, deep(199)),
    Act("agent a", "POST", f"{A}/heartbeat", 400, deep(20_000)),
    Act("agent a", "POST", f"{A}/heartbeat", 413, "x" * 70_000),
    Act(
        "agent a",
        "POST",
        f"{A}/heartbeat",
        415,
        "FailoverScore=100",
        {"Content-Type": "text/plain"},
    ),
    Act("agent a", "POST", f"{A}/release", 400, {"Epoch": -1}),
    Act("agent a", "POST", f"{A}/release", 400, {"Epoch": 1, "HoldOffPeriod": "400.00:00:00"}),
    # paths and methods
    Act("admin", "GET", f"{BASE}/groups/..%2F..%2Fetc", 400),
    Act("admin", "GET", "/api/v2/clientfailover", 404),
    Act("admin", "PUT", GROUP, 405, {"Id": "line-7"}),
    Act("admin", "TRACE", GROUP, 405),
    # web pages
    Act("admin", "DELETE", HIDDEN, 403, None, {"Origin": "https://evil.example"}),
    Act("admin", "GET", GROUP, 403, None, {"Sec-Fetch-Site": "cross-site"}),
    Act("admin", "GET", GROUP, 403, None, {"Host": "evil.example"}),
)


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A client of a coordinator with an administrator, tokens, two lists, two groups and two members."""
    directory = tmp_path_factory.mktemp("coordinator")
    keys = directory / "keys.json"
    keys.write_text(json.dumps(KeySet([KEY]).as_dict(private=False)))
    process = Process(
        f"--data-dir={directory / 'data'}",
        f"--token-issuer={ISSUER}",
        f"--token-audience={AUDIENCE}",
        f"--token-keys-file={keys}",
        f"--token-tenant={TENANT}",
        "--administrator=role:admins",
    )
    try:
        with httpx2.Client(base_url=process.url) as http:
            for caller, method, path, body in (
                ("admin", "PUT", NAMESPACE_LIST, NAMESPACE_ENTRIES),
                (
                    "agent a",
                    "POST",
                    f"{BASE}/groups",
                    {"Id": "line-7", "FailoverTimeout": "01:00:00"},
                ),
                (
                    "admin",
                    "POST",
                    f"{BASE}/groups",
                    {"Id": "hidden", "FailoverTimeout": "01:00:00"},
                ),
                ("admin", "PUT", f"{HIDDEN}/accesscontrol", entries(ADMINS)),
                ("agent a", "POST", f"{GROUP}/clientsessions", {"Id": "a"}),
                ("agent b", "POST", f"{GROUP}/clientsessions", {"Id": "b"}),
                ("agent a", "POST", f"{A}/heartbeat", {**BEAT, "Instance": "of-a"}),
                ("agent a", "POST", f"{A}/heartbeat", {**BEAT, "Instance": "of-a"}),
                ("agent b", "POST", f"{B}/heartbeat", {**BEAT, "Instance": "of-b"}),
            ):
                answer = http.request(
                    method, path, json=body, headers={"Authorization": CALLERS[caller] or ""}
                )
                assert answer.is_success, (caller, method, path, answer.text)
            assert state(http)[2]["Primary"] == "a"
            yield http
    finally:
        process.process.terminate()
        assert process.end()[0] == 0


def state(http: httpx2.Client) -> list[Any]:
    """All that an administrator can read."""
    headers = {"Authorization": CALLERS["admin"] or ""}
    paths = [f"{BASE}/groups", NAMESPACE_LIST]
    for group in (GROUP, HIDDEN):
        paths += [
            f"{group}{part}"
            for part in ("/status", "/clientsessions", "/history", "/accesscontrol")
        ]
    answers = [http.get(path, headers=headers) for path in paths]
    assert all(answer.is_success for answer in answers), answers
    return [answer.json() for answer in answers]


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.name)
def test_a_forbidden_act_is_refused_and_changes_nothing(http: httpx2.Client, act: Act) -> None:
    headers = {"Content-Type": "application/json", **act.headers}
    if (credentials := CALLERS[act.caller]) is not None:
        headers["Authorization"] = credentials
    content = act.body if isinstance(act.body, str) else json.dumps(act.body)
    before = state(http)
    answer = http.request(
        act.method, act.path, content=None if act.body is None else content, headers=headers
    )
    assert answer.status_code == act.status, answer.text
    error = answer.json()
    assert {"OperationId", "Error", "Reason", "Resolution"} <= error.keys()
    assert error["OperationId"] == answer.headers["operation-id"]
    assert state(http) == before


def test_the_acts_are_at_least_sixty() -> None:
    assert len({act.name + str(act.body)[:40] for act in ACTS}) >= 60
