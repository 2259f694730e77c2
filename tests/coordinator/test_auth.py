import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, OctKey

from agent.coordinator import auth
from agent.coordinator.auth import (
    Authenticator,
    Caller,
    Password,
    TokenRules,
    allowed,
    hash_password,
    read_token_rules,
    read_users,
)
from agent.errors import ConfigError, Unauthenticated
from agent.model import AccessEntry, AccessList, Right, Trustee

NOW = 1_800_000_000.0
KEY = ECKey.generate_key("P-256", {"kid": "k1"})


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "LOG2_N", 4)


def basic(user: str, password: str) -> bytes:
    return b"Basic " + base64.b64encode(f"{user}:{password}".encode())


def users(tmp_path: Path, *lines: str) -> dict[str, Password]:
    path = tmp_path / "users"
    path.write_text("\n".join(lines))
    return read_users(path)


def bearer(key: Any = KEY, alg: str = "ES256", **changes: Any) -> bytes:
    claims = {"iss": "https://id", "aud": "failover", "exp": NOW + 600, "sub": "agent-1"} | changes
    present = {name: value for name, value in claims.items() if value is not None}
    token = jwt.encode({"alg": alg, "kid": "k1"}, present, key, algorithms=[alg])
    return b"Bearer " + token.encode()


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


async def test_a_password_is_hashed_once_however_often_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred agents at once, and each of their heartbeats, cost one hash until it is forgotten."""
    now = [NOW]
    known = Authenticator(users(tmp_path, f"ann:{hash_password('s')}"), now=lambda: now[0])
    hashed = []
    fits = Password.fits

    def counting(password: Password, given: bytes) -> bool:
        hashed.append(given)
        return fits(password, given)

    monkeypatch.setattr(Password, "fits", counting)
    await asyncio.gather(*(known.caller(basic("ann", "s")) for _ in range(100)))
    await known.caller(basic("ann", "s"))
    assert len(hashed) == 1
    now[0] += auth.KNOWN_FOR_S + 1
    await known.caller(basic("ann", "s"))
    assert len(hashed) == 2


async def test_what_is_remembered_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "MOST_CACHED_CHECKS", 3)
    known = Authenticator(users(tmp_path, f"ann:{hash_password('s')}"))
    for number in range(6):
        with pytest.raises(Unauthenticated):
            await known.caller(basic("ann", str(number)))
    assert len(known._checks) == 3


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
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
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
        {"exp": NOW - auth.LEEWAY_S - 1},
        {"exp": None},
        {"nbf": NOW + auth.LEEWAY_S + 10},
        {"sub": None},
        {"key": ECKey.generate_key("P-256", {"kid": "k1"})},
        {"key": OctKey.import_key(b"x" * 32), "alg": "HS256"},
    ],
)
async def test_a_token_that_is_not_for_here_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Unauthenticated):
        await with_tokens().caller(bearer(**changes))


async def test_a_token_of_no_algorithm_is_refused() -> None:
    parts = [json.dumps({"alg": "none"}), json.dumps({"iss": "https://id", "aud": "failover"})]
    coded = [base64.urlsafe_b64encode(part.encode()).rstrip(b"=") for part in parts]
    with pytest.raises(Unauthenticated):
        await with_tokens().caller(b"Bearer " + b".".join([*coded, b""]))


async def test_clocks_may_differ_by_the_leeway() -> None:
    await with_tokens().caller(bearer(exp=NOW - auth.LEEWAY_S + 5, nbf=NOW - 5))
    await with_tokens().caller(bearer(nbf=NOW + auth.LEEWAY_S - 5))


async def test_a_remembered_token_is_forgotten_when_it_expires() -> None:
    now = [NOW]
    rules = TokenRules("https://id", "failover", KeySet([KEY]))
    known = Authenticator(tokens=rules, now=lambda: now[0])
    header = bearer(exp=NOW + 10)
    await known.caller(header)
    now[0] += 10 + auth.LEEWAY_S + 1
    with pytest.raises(Unauthenticated):
        await known.caller(header)


def test_keys_are_read_from_a_jwks_file(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(KeySet([KEY]).as_dict(private=False)))
    assert len(read_token_rules("i", "a", path).keys.keys) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys": []}', '{"keys": [{"kty": "x"}]}'])
def test_another_file_is_not_a_jwks(tmp_path: Path, text: str) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="token_keys_file"):
        read_token_rules("i", "a", path)


ANN = Caller("ann", frozenset({(1, "ann"), (3, "ops")}))


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


async def test_replaced_users_count_at_once_and_unchanged_ones_are_not_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 22: users change at a reload; to check 10,000 agents again would cost them their roles."""
    ann, ben = (f"{name}:{hash_password('s')}" for name in ("ann", "ben"))
    known = Authenticator(users(tmp_path, ann, ben))
    for name in ("ann", "ben"):
        assert (await known.caller(basic(name, "s"))).name == name
    known.replace(users(tmp_path, ann), None)
    with pytest.raises(Unauthenticated):
        await known.caller(basic("ben", "s"))
    monkeypatch.setattr(auth, "_scrypt", None)
    assert (await known.caller(basic("ann", "s"))).name == "ann"
    monkeypatch.undo()
    known.replace(users(tmp_path, ann, f"cas:{hash_password('s')}"), None)
    assert (await known.caller(basic("cas", "s"))).name == "cas"
