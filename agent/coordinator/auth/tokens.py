"""Bearer tokens: JWTs that one of the keys in a JWKS has signed.

Signature, issuer, audience, ``exp``, ``nbf`` and ``iat`` are checked, and the type of every claim that is used.
The client is ``azp``, ``client_id`` or ``sub``; a ``sub`` in addition to it is the user; ``roles`` (or ``role``)
are roles, ``tid`` is the tenant. A token that fails a check identifies nobody.
"""

import hmac
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet
from msgspec import Meta

from agent.coordinator.auth.callers import CLIENT, MOST_NAME, ROLE, USER, Caller, Subject
from agent.coordinator.auth.limits import Remembered
from agent.coordinator.auth.passwords import read_text
from agent.errors import ConfigError

KNOWN_FOR_S = 300.0
WRONG_FOR_S = 10.0
"""How long a check is remembered: a good one saves verifying a signature for each heartbeat, a bad one keeps a
misconfigured agent from using up the processor."""

MOST_GOOD = 16_384
MOST_BAD = 4096
"""How many checks are remembered. Good and bad ones are kept apart, so bad ones do not displace good ones."""

LEEWAY_S = 60
"""How far the identity provider's clock may differ from ours."""

MOST_ROLES = 1000
"""The most roles of one token, since each is looked up in each access-control list."""

ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA", "Ed25519"),
)
"""Only signatures with a public key: with "none" or HMAC, anybody who can read the JWKS could forge tokens."""

UNREADABLE = (
    JoseError,
    msgspec.DecodeError,
    *(ValueError, TypeError, KeyError, AttributeError),
    *(ArithmeticError, IndexError, RecursionError),
)
"""The exceptions of the library and its parsers for a malformed token or key set."""

TimeSource = Callable[[], float]
_Name = Annotated[str, Meta(max_length=MOST_NAME)]


class _Claims(msgspec.Struct):
    """The claims that are used, with the types that they must have. Null means absent."""

    exp: float
    nbf: float | None = None
    iat: float | None = None
    sub: _Name | None = None
    azp: _Name | None = None
    client_id: _Name | None = None
    roles: Annotated[list[_Name], Meta(max_length=MOST_ROLES)] | _Name | None = None
    role: Annotated[list[_Name], Meta(max_length=MOST_ROLES)] | _Name | None = None
    tid: _Name | None = None


@dataclass(frozen=True, slots=True)
class TokenRules:
    """The rules for accepting bearer tokens.

    Attributes:
        keys: from a file; None: from RemoteKeys.
        default_tenant: the ``tid`` that may use the tenant ``default``; None: every one.
    """

    issuer: str
    audience: str
    keys: KeySet | None
    default_tenant: str | None = None


def parse_key_set(text: str | bytes, where: str) -> KeySet:
    """The public keys of a JWKS.

    Raises:
        ConfigError: it is not a JWKS, or has no key. ``where`` is the beginning of the message.
    """
    try:
        keys = KeySet.import_key_set(msgspec.json.decode(text))
    except UNREADABLE as error:
        raise ConfigError(f"{where} is not a JSON Web Key Set (RFC 7517): {error}") from None
    if not keys.keys:
        raise ConfigError(f"{where} has no key: no token could be checked")
    return keys


def read_key_set(path: Path) -> KeySet:
    """The public keys of a JWKS file.

    Raises:
        ConfigError: it cannot be read, is not a JWKS, or has no key.
    """
    return parse_key_set(read_text(path, "token_keys_file"), f"token_keys_file {path}")


class KeySource(Protocol):
    """The source of keys that are not from a file."""

    def keys(self) -> KeySet:
        """The keys in force. Raises Unavailable."""
        ...

    async def refresh(self) -> bool:
        """Fetch the keys again because of an unknown one; return whether that was tried."""
        ...


class TokenChecks:
    """Checks and remembers tokens.

    Args:
        rules: in force until ``replace``.
        now: seconds since 1970, for the times in tokens.
        clock: monotonic seconds, for how long wrong ones are remembered.
        source: has the keys if the rules have none.
    """

    def __init__(
        self, rules: TokenRules, now: TimeSource, clock: TimeSource, source: KeySource | None = None
    ) -> None:
        self.rules = rules
        self._source = source
        self._now, self._clock = now, clock
        self._key = os.urandom(32)
        self._good: Remembered[Caller] = Remembered(MOST_GOOD)
        self._bad: Remembered[bool] = Remembered(MOST_BAD)

    def replace(self, rules: TokenRules) -> None:
        """Use these rules from now on, and forget checks that were made by the old ones."""
        self.rules = rules
        self.forget()

    def forget(self) -> None:
        """Forget every check, because the keys have changed."""
        self._good.clear()
        self._bad.clear()

    async def caller(self, token: bytes) -> Caller | None:
        """The caller with this token, or None if it is wrong, expired or not for this service.

        Raises:
            Unavailable: there are no keys to check it with.
        """
        now = self._now()
        digest = hmac.digest(self._key, token, "sha256")
        known = self._good.get(digest, now)
        if known is not None or self._bad.get(digest, self._clock()):
            return known
        try:
            try:
                caller, until = self._check(token, now)
            except InvalidKeyIdError:
                if self._source is None or not await self._source.refresh():
                    raise
                caller, until = self._check(token, now)
        except UNREADABLE:
            self._bad.put(digest, True, self._clock() + WRONG_FOR_S)
            return None
        self._good.put(digest, caller, until)
        return caller

    def _check(self, token: bytes, now: float) -> tuple[Caller, float]:
        rules = jwt.JWTClaimsRegistry(
            now=int(now),
            leeway=LEEWAY_S,
            iss={"essential": True, "value": self.rules.issuer},
            aud={"essential": True, "value": self.rules.audience},
            exp={"essential": True},
        )
        keys = self.rules.keys
        if keys is None:
            assert self._source is not None  # noqa: S101 - the rules come with one of the two
            keys = self._source.keys()
        decoded = jwt.decode(token, keys, algorithms=ALGORITHMS).claims
        given = {name: value for name, value in decoded.items() if value is not None}
        claims = msgspec.convert(given, _Claims)
        rules.validate(given)
        until = min(now + KNOWN_FOR_S, claims.exp + LEEWAY_S)
        if not until > now:  # also of NaN, which Python reads in JSON
            raise ValueError("exp is not a time")
        return _caller_of(claims), until


def _caller_of(claims: _Claims) -> Caller:
    subject = claims.sub or None
    client = claims.azp or claims.client_id or subject
    if client is None:
        raise ValueError("the token names nobody")
    trustees = {Subject(CLIENT, client), *_roles(claims.roles or claims.role)}
    identity = f"client:{client}"
    if subject is not None and subject != client:
        trustees.add(Subject(USER, subject))
        identity = f"user:{subject}"
    return Caller(client, frozenset(trustees), claims.tid, identity)


def _roles(roles: list[str] | str | None) -> Iterator[Subject]:
    for role in [roles] if isinstance(roles, str) else roles or []:
        if role:
            yield Subject(ROLE, role)
