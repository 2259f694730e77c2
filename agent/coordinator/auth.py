"""Authentication and authorisation of callers.

Knows credentials and access lists, and nothing of groups, nor of HTTP but the Authorization header.
Two schemes, either or both configured; without any, everything is allowed:

- Basic, from a users file with one user a line (``#`` begins a comment)::

      name:scrypt$15$8$1$<salt>$<hash>[:role,role...]

  with the cost as log2(n), r and p of scrypt (RFC 7914), salt and 32-byte hash in Base64.
  ``hash_password`` makes the part after the name. A name holds no colon (RFC 7617).
- Bearer, a JWT that one of the keys in a JWKS file has signed: issuer, audience, exp and nbf are
  checked. Keys are read at the start and at a reload.

Rights: Denied beats Allowed. A group's own list counts, else its namespace's, else (none was ever
set) every caller who is known may do everything.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet
from pydantic import TypeAdapter

from agent.errors import ConfigError, Unauthenticated, Unavailable
from agent.model import AccessList, Right

LOG2_N, BLOCK, PARALLEL = 15, 8, 1
"""32 MiB and some 60 ms a guess: what OWASP asks for at least is n 2**15 with p 3 or 2**17 with p 1; a
service that verifies hundreds of agents after a restart stays usable with this."""

MOST_LOG2_N = 20
"""1 GiB for one check; a line that asks for more is a mistake."""

SALT_BYTES, HASH_BYTES = 16, 32

VERIFIERS = 2
"""Checks of a password at the same time, 32 MiB each, in threads."""

MOST_WAITING = 200
"""Different credentials that wait for a check (10 s of work). Further callers get 503."""

KNOWN_FOR_S = 300.0
WRONG_FOR_S = 10.0
"""How long a check is remembered: a good one saves the hash for each heartbeat, a bad one stops a
misconfigured agent from burning the processor."""

MOST_CACHED_CHECKS = 4096
"""Remembered checks: more than the agents of one coordinator have credentials."""

LEEWAY_S = 60
"""How far the identity provider's clock may be from ours."""

ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA", "Ed25519"),
)
"""Signatures with a public key only: with "none" or HMAC the JWKS file itself would forge tokens."""

USER, CLIENT, ROLE = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller.

    Attributes:
        name: for the log.
        trustees: (type, object id) of each trustee that this caller matches.
        tenant: the tenant that the identity is of, or None if it is of any.
    """

    name: str
    trustees: frozenset[tuple[int, str]]
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class Password:
    """The entry of one user in the users file."""

    log2_n: int
    block: int
    parallel: int
    salt: bytes
    hash: bytes
    roles: tuple[str, ...] = ()

    def fits(self, password: bytes) -> bool:
        """Whether it is this password. Slow on purpose: never on the event loop."""
        made = _scrypt(password, self.salt, self.log2_n, self.block, self.parallel)
        return hmac.compare_digest(made, self.hash)


def hash_password(password: str, roles: tuple[str, ...] = ()) -> str:
    """What stands after ``name:`` in a line of the users file. Takes some 60 ms."""
    salt = os.urandom(SALT_BYTES)
    made = _scrypt(password.encode(), salt, LOG2_N, BLOCK, PARALLEL)
    cost = f"scrypt${LOG2_N}${BLOCK}${PARALLEL}"
    line = f"{cost}${base64.b64encode(salt).decode()}${base64.b64encode(made).decode()}"
    return f"{line}:{','.join(roles)}" if roles else line


def _scrypt(password: bytes, salt: bytes, log2_n: int, block: int, parallel: int) -> bytes:
    memory = 128 * block * (2**log2_n + parallel) + 2**20
    return hashlib.scrypt(
        password, salt=salt, n=2**log2_n, r=block, p=parallel, maxmem=memory, dklen=HASH_BYTES
    )


def read_users(path: Path) -> dict[str, Password]:
    """The users of a file.

    Raises:
        ConfigError: it cannot be read, or a line is not one of a users file.
    """
    users: dict[str, Password] = {}
    for number, line in enumerate(_read(path, "users_file").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, rest = line.strip().partition(":")
        try:
            users[name] = _password(name, rest)
        except (ValueError, binascii.Error):
            raise ConfigError(
                f"users_file {path}, line {number} is not NAME:scrypt$LOG2N$R$P$SALT$HASH[:ROLES]"
            ) from None
    if not users:
        raise ConfigError(f"users_file {path} has no user: nobody could call; add a line")
    return users


def _password(name: str, rest: str) -> Password:
    stored, _, roles = rest.partition(":")
    scheme, log2_n, block, parallel, salt, made = stored.split("$")
    password = Password(
        int(log2_n),
        int(block),
        int(parallel),
        base64.b64decode(salt, validate=True),
        base64.b64decode(made, validate=True),
        tuple(role.strip() for role in roles.split(",") if role.strip()),
    )
    if (
        not name
        or scheme != "scrypt"
        or not 1 <= password.log2_n <= MOST_LOG2_N
        or not 1 <= password.block <= 32  # noqa: PLR2004 - RFC 7914 speaks of 8
        or not 1 <= password.parallel <= 16  # noqa: PLR2004 - and of 1
        or len(password.hash) != HASH_BYTES
    ):
        raise ValueError(rest)
    return password


def _read(path: Path, setting: str) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting} {path} cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class TokenRules:
    """Which bearer tokens are taken. Make one by ``read_token_rules``."""

    issuer: str
    audience: str
    keys: KeySet


def read_token_rules(issuer: str, audience: str, path: Path) -> TokenRules:
    """Rules with the public keys of a JWKS file.

    Raises:
        ConfigError: it cannot be read, is not a JWKS, or has no key.
    """
    text = _read(path, "token_keys_file")
    try:
        keys = KeySet.import_key_set(TypeAdapter(Any).validate_json(text))
    except (JoseError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"token_keys_file {path} is not a JSON Web Key Set (RFC 7517): {error}"
        ) from None
    if not keys.keys:
        raise ConfigError(f"token_keys_file {path} has no key: no token could be checked")
    return TokenRules(issuer, audience, keys)


class Authenticator:
    """Identifies the caller of a request.

    Args:
        users: by name, or None for no Basic.
        tokens: or None for no Bearer.
        now: seconds since 1970, for the tokens' times and for how long a check is remembered.
    """

    def __init__(
        self,
        users: Mapping[str, Password] | None = None,
        tokens: TokenRules | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._users = users
        self._tokens = tokens
        self._now = now
        self._secret = os.urandom(32)
        self._checks: dict[bytes, tuple[float, Caller | None, Password | None]] = {}
        self._checking: dict[bytes, asyncio.Task[Caller | None]] = {}
        self._verifiers = asyncio.Semaphore(VERIFIERS)
        # An unknown user takes as long to refuse as a wrong password.
        self._dummy_password = Password(
            LOG2_N, BLOCK, PARALLEL, b"\0" * SALT_BYTES, b"\0" * HASH_BYTES
        )

    @property
    def schemes(self) -> tuple[str, ...]:
        """The configured ways: of ``Basic`` and ``Bearer``. Without any, everything is allowed."""
        ways = (("Basic", self._users), ("Bearer", self._tokens))
        return tuple(name for name, way in ways if way is not None)

    def replace(self, users: Mapping[str, Password] | None, tokens: TokenRules | None) -> None:
        """Use these users and token rules from now on; the configured schemes stay the same.

        Good passwords that are still right stay known: to check those of 10,000 agents again would take
        minutes.
        """
        self._users = users
        self._tokens = tokens
        self._checks = {
            digest: (until, caller, password)
            for digest, (until, caller, password) in self._checks.items()
            if caller is not None
            and password is not None
            and self._has_password(caller.name, password)
        }

    def _has_password(self, name: str, password: Password | None) -> bool:
        return (self._users or {}).get(name) == password

    async def caller(self, authorization: bytes | None) -> Caller:
        """The caller with this Authorization header.

        Raises:
            Unauthenticated: it is missing, of another kind, or wrong.
            Unavailable: too many credentials are being checked.
        """
        scheme, _, credentials = (authorization or b"").partition(b" ")
        kind = scheme.decode("latin-1").capitalize()
        if kind not in self.schemes:
            raise _unauthenticated(
                f"The call has no Authorization header of {' or '.join(self.schemes)}."
            )
        digest = hmac.digest(self._secret, authorization or b"", "sha256")
        until, caller, _ = self._checks.get(digest, (0.0, None, None))
        if until <= self._now():
            caller = await self._check(kind, credentials.strip(), digest)
        if caller is None:
            raise _unauthenticated(
                f"The {kind} credentials are wrong, expired or not for this service."
            )
        return caller

    async def _check(self, kind: str, credentials: bytes, digest: bytes) -> Caller | None:
        """Check once for all concurrent requests with these credentials, and cache the outcome."""
        if kind == "Bearer":
            caller, until = self._by_token(credentials)
            self._cache_check(digest, until, caller)
            return caller
        task = self._checking.get(digest)
        if task is None:
            if len(self._checking) >= MOST_WAITING:
                raise Unavailable("Too many passwords are being checked.", "Try again later.")
            task = asyncio.get_running_loop().create_task(self._by_password(credentials, digest))
            self._checking[digest] = task
            task.add_done_callback(lambda _: self._checking.pop(digest))
        return await asyncio.shield(task)

    async def _by_password(self, credentials: bytes, digest: bytes) -> Caller | None:
        try:
            name, colon, password = base64.b64decode(credentials, validate=True).partition(b":")
            user = name.decode()
        except (binascii.Error, UnicodeDecodeError):
            return None
        async with self._verifiers:
            known = (self._users or {}).get(user)
            fits = await asyncio.to_thread((known or self._dummy_password).fits, password)
        caller = None
        if known is not None and colon and fits:
            roles = {(ROLE, role) for role in known.roles}
            caller = Caller(user, frozenset({(USER, user), *roles}))
        if self._has_password(user, known):  # the users may have been replaced meanwhile
            until = self._now() + (KNOWN_FOR_S if caller else WRONG_FOR_S)
            self._cache_check(digest, until, caller, known)
        return caller

    def _by_token(self, credentials: bytes) -> tuple[Caller | None, float]:
        assert self._tokens is not None  # noqa: S101 - Bearer is among the schemes
        now = self._now()
        rules = jwt.JWTClaimsRegistry(
            now=int(now),
            leeway=LEEWAY_S,
            iss={"essential": True, "value": self._tokens.issuer},
            aud={"essential": True, "value": self._tokens.audience},
            exp={"essential": True},
        )
        try:
            claims = jwt.decode(credentials, self._tokens.keys, algorithms=ALGORITHMS).claims
            rules.validate(claims)
        except (JoseError, ValueError, TypeError):
            return None, now + WRONG_FOR_S
        return _caller_of(claims), min(now + KNOWN_FOR_S, claims["exp"] + LEEWAY_S)

    def _cache_check(
        self,
        digest: bytes,
        until: float,
        caller: Caller | None,
        password: Password | None = None,
    ) -> None:
        self._checks.pop(digest, None)
        if len(self._checks) >= MOST_CACHED_CHECKS:
            self._checks.pop(next(iter(self._checks)))
        self._checks[digest] = (until, caller, password)


def _caller_of(claims: Mapping[str, Any]) -> Caller | None:
    """The client is azp, client_id or sub; a sub beside it is the user; roles may be one or many."""
    subject = claims.get("sub")
    client = claims.get("azp") or claims.get("client_id") or subject
    roles = claims.get("roles") or claims.get("role") or []
    roles = roles if isinstance(roles, list) else [roles]
    trustees = {(CLIENT, client), (ROLE, None), *((ROLE, role) for role in roles)}
    if subject != client:
        trustees.add((USER, subject))
    known = frozenset((kind, name) for kind, name in trustees if isinstance(name, str) and name)
    if not any(kind != ROLE for kind, _ in known):
        return None
    tenant = claims.get("tid")
    return Caller(str(client), known, tenant if isinstance(tenant, str) else None)


def _unauthenticated(reason: str) -> Unauthenticated:
    return Unauthenticated(reason, "Send credentials that this coordinator knows.")


def allowed(acl: AccessList | None, caller: Caller, tenant: str, right: Right) -> bool:
    """Whether a list grants ``caller`` a right in ``tenant``. Without a list (None) every right is granted."""
    if acl is None:
        return True
    given = False
    for entry in acl.entries:
        who = entry.trustee
        if (who.kind, who.object_id) not in caller.trustees or not entry.rights & right:
            continue
        if who.tenant_id not in {None, caller.tenant or tenant}:
            continue
        if entry.denied:
            return False
        given = True
    return given
