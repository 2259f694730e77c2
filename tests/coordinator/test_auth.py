import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jws, jwt
from joserfc.jwk import ECKey, KeySet, OctKey

from agent.coordinator.auth import (
    Authenticator,
    Caller,
    Password,
    Subject,
    TokenRules,
    allowed,
    hash_password,
    passwords,
    read_key_set,
    read_users,
    tokens,
)
from agent.errors import ConfigError, Unauthenticated
from agent.model import AccessEntry, AccessList, Right, Trustee

NOW = 1_800_000_000.0
KEY = ECKey.generate_key("P-256", {"kid": "k1"})


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "LOG2_N", 4)


def basic(user: str, password: str) -> bytes:
    return b"Basic " + base64.b64encode(f"{user}:{password}".encode())


def users(tmp_path: Path, *lines: str) -> dict[str, Password]:
    path = tmp_path / "users"
    path.write_text("\n".join(lines))
    return read_users(path)


def bearer(key: Any = KEY, alg: str = "ES256", kid: str = "k1", **changes: Any) -> bytes:
    claims = {"iss": "https://id", "aud": "failover", "exp": NOW + 600, "sub": "agent-1"} | changes
    present = {name: value for name, value in claims.items() if value is not None}
    token = jwt.encode({"alg": alg, "kid": kid}, present, key, algorithms=[alg])
    return b"Bearer " + token.encode()


VALID = {"iss": "https://id", "aud": "failover", "exp": NOW + 600, "sub": "agent-1"}


def raw_bearer(claims: dict[str, Any]) -> bytes:
    """A token that is signed by our key, whatever its claims are."""
    payload = json.dumps(claims).encode()
    token = jws.serialize_compact({"alg": "ES256", "kid": "k1"}, payload, KEY, algorithms=["ES256"])
    return b"Bearer " + token.encode()


def parts_of(values: list[Any]) -> bytes:
    """JSON values as the parts of a token."""
    texts = [json.dumps(value).encode() for value in values]
    return b".".join(base64.urlsafe_b64encode(text).rstrip(b"=") for text in texts)


def with_tokens(now: float = NOW) -> Authenticator:
    rules = TokenRules("https://id", "failover", KeySet([KEY]))
    return Authenticator(tokens=rules, now=lambda: now)


async def test_a_user_of_the_file_is_known_with_roles(tmp_path: Path) -> None:
    line = f"ann:{hash_password('s3:cret', ('operators', 'viewers'))}"
    known = Authenticator(users(tmp_path, "# people", "", line))
    caller = await known.caller(basic("ann", "s3:cret"))
    assert caller.trustees == {(1, "ann"), (3, "operators"), (3, "viewers")}


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"Basic",
        b"Basic !!!",
        basic("ann", "wrong"),
        basic("bob", "secret"),
        b"Basic " + base64.b64encode(b"ann"),
        b"Basic " + base64.b64encode(b"\xff:x"),
        b"Bearer abc",
        b"Digest abc",
    ],
)
async def test_other_credentials_are_refused(tmp_path: Path, header: bytes | None) -> None:
    known = Authenticator(users(tmp_path, f"ann:{hash_password('secret')}"))
    with pytest.raises(Unauthenticated):
        await known.caller(header)


@pytest.mark.parametrize(
    "line",
    [
        "ann",
        "ann:secret",
        "ann:scrypt$15$8$1$AAAA",
        "ann:scrypt$99$8$1$AAAA$AAAA",
        "ann:scrypt$15$8$1$AAAA$AAAA",
        f":{'scrypt$15$8$1$AAAA$' + base64.b64encode(bytes(32)).decode()}",
        f"ann:{'bcrypt$15$8$1$AAAA$' + base64.b64encode(bytes(32)).decode()}",
    ],
)
def test_a_wrong_line_of_the_users_file_is_an_error_with_its_number(
    tmp_path: Path, line: str
) -> None:
    with pytest.raises(ConfigError, match="line 2"):
        users(tmp_path, "# users", line)


def test_a_users_file_without_users_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no user"):
        users(tmp_path, "# nobody")


async def test_a_token_makes_a_client_a_user_and_roles() -> None:
    header = bearer(azp="client-7", sub="user-1", roles=["r1", "r2"], tid="t")
    caller = await with_tokens().caller(header)
    assert caller.trustees == {(2, "client-7"), (1, "user-1"), (3, "r1"), (3, "r2")}
    assert caller.tenant == "t"


async def test_a_subject_alone_is_the_client() -> None:
    caller = await with_tokens().caller(bearer(role="r"))
    assert caller.trustees == {(2, "agent-1"), (3, "r")}


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://other"},
        {"iss": None},
        {"aud": "other"},
        {"aud": None},
        {"exp": NOW - tokens.LEEWAY_S - 1},
        {"exp": None},
        {"nbf": NOW + tokens.LEEWAY_S + 10},
        {"sub": None},
        {"key": ECKey.generate_key("P-256", {"kid": "k1"})},
        {"key": OctKey.import_key(b"x" * 32), "alg": "HS256"},
    ],
)
async def test_a_token_that_is_not_for_here_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Unauthenticated):
        await with_tokens().caller(bearer(**changes))


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["https://id", "failover", 1e308, -1, 10**400, NOW, float("nan"), "x" * 300]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)
CLAIMS = (
    "iss",
    "aud",
    "exp",
    "nbf",
    "iat",
    "sub",
    "azp",
    "client_id",
    "roles",
    "role",
    "tid",
    "jti",
)


@given(st.dictionaries(st.sampled_from(CLAIMS), ANYTHING, min_size=1, max_size=4))
def test_claims_of_any_type_identify_a_caller_or_are_refused(changes: dict[str, Any]) -> None:
    """A claim of another type is 401, never an error of ours; who is known has well-formed names."""
    header = raw_bearer(
        {"iss": "https://id", "aud": "failover", "exp": NOW + 600, "sub": "a"} | changes
    )
    try:
        caller = asyncio.run(with_tokens().caller(header))
    except Unauthenticated:
        return
    assert all(name and type(name) is str for _, name in caller.trustees)
    assert caller.tenant is None or isinstance(changes["tid"], str)
    assert isinstance(changes.get("roles"), list | str | None)
    assert isinstance(changes.get("role"), list | str | None)


@pytest.mark.parametrize("claim", ["sub", "azp", "client_id", "roles", "role", "tid", "exp", "nbf"])
@pytest.mark.parametrize("value", [{"a": 1}, [{}], [1], True, "x" * 300])
async def test_a_claim_of_a_wrong_type_is_refused(claim: str, value: object) -> None:
    with pytest.raises(Unauthenticated):
        await with_tokens().caller(raw_bearer(VALID | {claim: value}))


@given(st.binary(max_size=60) | st.lists(ANYTHING, min_size=1, max_size=3).map(parts_of))
def test_a_token_of_any_bytes_is_refused(token: bytes) -> None:
    with pytest.raises(Unauthenticated):
        asyncio.run(with_tokens().caller(b"Bearer " + token))


async def test_a_flood_of_wrong_tokens_evicts_no_good_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "MOST_BAD", 3)
    known = with_tokens()
    good = bearer()
    await known.caller(good)
    for number in range(10):
        with pytest.raises(Unauthenticated):
            await known.caller(b"Bearer " + str(number).encode())
    monkeypatch.setattr(jwt, "decode", None)
    assert (await known.caller(good)).name == "agent-1"


async def test_a_token_of_no_algorithm_is_refused() -> None:
    parts = [json.dumps({"alg": "none"}), json.dumps({"iss": "https://id", "aud": "failover"})]
    coded = [base64.urlsafe_b64encode(part.encode()).rstrip(b"=") for part in parts]
    with pytest.raises(Unauthenticated):
        await with_tokens().caller(b"Bearer " + b".".join([*coded, b""]))


async def test_clocks_may_differ_by_the_leeway() -> None:
    await with_tokens().caller(bearer(exp=NOW - tokens.LEEWAY_S + 5, nbf=NOW - 5))
    await with_tokens().caller(bearer(nbf=NOW + tokens.LEEWAY_S - 5))


async def test_a_remembered_token_is_forgotten_when_it_expires() -> None:
    now = [NOW]
    rules = TokenRules("https://id", "failover", KeySet([KEY]))
    known = Authenticator(tokens=rules, now=lambda: now[0])
    header = bearer(exp=NOW + 10)
    await known.caller(header)
    now[0] += 10 + tokens.LEEWAY_S + 1
    with pytest.raises(Unauthenticated):
        await known.caller(header)


async def test_a_refused_token_is_checked_again_after_the_clock_was_corrected() -> None:
    """It was remembered by the time of day: for as long as the clock had been ahead, it stayed refused."""
    now, clock = [NOW + 86_400], [0.0]
    rules = TokenRules("https://id", "failover", KeySet([KEY]))
    known = Authenticator(tokens=rules, now=lambda: now[0], clock=lambda: clock[0])
    header = bearer()
    with pytest.raises(Unauthenticated):
        await known.caller(header)
    now[0], clock[0] = NOW, tokens.WRONG_FOR_S + 1
    assert (await known.caller(header)).name == "agent-1"


def test_keys_are_read_from_a_jwks_file(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(KeySet([KEY]).as_dict(private=False)))
    assert len(read_key_set(path).keys) == 1


@pytest.mark.parametrize(
    "text", ["", "a secret", "[]", "{}", '{"keys": []}', '{"keys": [{"kty": "x"}]}']
)
def test_another_file_is_not_a_jwks(tmp_path: Path, text: str) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="token_keys_file") as refused:
        read_key_set(path)
    assert "\n" not in str(refused.value), "each line of an error is a fault of its own"
    assert "secret" not in str(refused.value), "another file may have been named by mistake"


ANN = Caller("ann", frozenset({Subject(1, "ann"), Subject(3, "ops")}))


def entry(
    kind: int, name: str, rights: int, *, denied: bool = False, tenant: str | None = None
) -> AccessEntry:
    return AccessEntry(Trustee(kind, name, tenant), denied=denied, rights=rights)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], False),
        ([entry(1, "ann", 1)], True),
        ([entry(1, "ann", 2)], False),
        ([entry(3, "ops", 31)], True),
        ([entry(2, "ann", 31)], False),
        ([entry(1, "ann", 31), entry(3, "ops", 1, denied=True)], False),
        ([entry(1, "ann", 31), entry(3, "ops", 2, denied=True)], True),
        ([entry(1, "ann", 1, tenant="t")], True),
        ([entry(1, "ann", 1, tenant="other")], False),
    ],
)
def test_rights_are_given_by_the_list_and_denied_beats_allowed(
    entries: list[AccessEntry], *, expected: bool
) -> None:
    assert allowed(AccessList(tuple(entries)), ANN, "t", Right.READ) is expected


def test_no_list_gives_every_right() -> None:
    assert allowed(None, ANN, "t", Right.MANAGE)
