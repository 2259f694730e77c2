"""Authentication and authorisation of callers.

Knows credentials and access lists, and nothing of groups, nor of HTTP but the Authorization header. Any of
three schemes may be configured; without one, everything is allowed:

- Basic, by a users file (passwords.py, password_checks.py);
- Bearer, by a JWT (tokens.py, remote_keys.py);
- a client certificate (certificates.py). An Authorization header takes precedence over it.

rights.py has what an authenticated caller may do.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from agent.coordinator.auth.callers import Caller, Subject
from agent.coordinator.auth.certificates import ClientCertificate
from agent.coordinator.auth.password_checks import PasswordChecks
from agent.coordinator.auth.passwords import Password, hash_password, read_users
from agent.coordinator.auth.rights import Identities, Rights, allowed
from agent.coordinator.auth.tokens import TokenChecks, TokenRules, read_key_set
from agent.errors import Unauthenticated

if TYPE_CHECKING:
    from agent.coordinator.auth import remote_keys

__all__ = [
    "Authenticator",
    "Caller",
    "ClientCertificate",
    "Password",
    "Rights",
    "Subject",
    "TokenRules",
    "allowed",
    "hash_password",
    "read_key_set",
    "read_users",
]

CERTIFICATE = "Certificate"
"""The name of the scheme "client certificate", which needs no Authorization header."""


class AuthMeter(Protocol):
    """Counts the outcomes of authentication."""

    def password_checked(self, outcome: str) -> None: ...
    def token_keys_fetched(self, outcome: str) -> None: ...


class Authenticator:
    """Identifies the caller of a request.

    Args:
        users: by name, or None for no Basic.
        tokens: or None for no Bearer.
        keys_url: where the keys for ``tokens`` are fetched, if the rules have none.
        certificates: whether client certificates are verified, and so identify their callers.
        administrators: who may always manage access.
        now: seconds since 1970, for the times in tokens and certificates.
        clock: monotonic seconds, for how long passwords and wrong tokens are remembered.
    """

    def __init__(
        self,
        users: Mapping[str, Password] | None = None,
        tokens: TokenRules | None = None,
        *,
        keys_url: str | None = None,
        certificates: bool = False,
        administrators: Iterable[Subject] = (),
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._certificates = certificates
        self._passwords = PasswordChecks(users, clock) if users is not None else None
        self._keys: remote_keys.RemoteKeys | None = None
        if keys_url is not None:
            from agent.coordinator.auth.remote_keys import RemoteKeys  # noqa: PLC0415 - an HTTP client, for a URL only

            self._keys = RemoteKeys(keys_url, clock, self._forget_tokens)
        self._tokens = TokenChecks(tokens, now, clock, self._keys) if tokens is not None else None
        self._identities = Identities()
        self.replace(users, tokens, administrators)

    @property
    def schemes(self) -> tuple[str, ...]:
        """The configured schemes: Basic, Bearer, Certificate. Without any, everything is allowed."""
        ways = (
            ("Basic", self._passwords is not None),
            ("Bearer", self._tokens is not None),
            (CERTIFICATE, self._certificates),
        )
        return tuple(name for name, configured in ways if configured)

    def meter(self, meter: AuthMeter) -> None:
        """Count checks of passwords and fetches of keys in this meter from now on."""
        if self._passwords is not None:
            self._passwords.count = meter.password_checked
        if self._keys is not None:
            self._keys.count = meter.token_keys_fetched

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep fetched keys up to date while the block runs."""
        if self._keys is None:
            yield
            return
        async with self._keys.kept_fresh():
            yield

    def _forget_tokens(self) -> None:
        if self._tokens is not None:
            self._tokens.forget()

    def replace(
        self,
        users: Mapping[str, Password] | None,
        tokens: TokenRules | None,
        administrators: Iterable[Subject] = (),
    ) -> None:
        """Use these identities from now on; the configured schemes stay the same.

        Passwords that were found good, and still are, are not checked again.
        """
        if self._passwords is not None and users is not None:
            self._passwords.replace(users)
        if self._tokens is not None and tokens is not None:
            self._tokens.replace(tokens)
        self._identities = Identities(
            administrators=frozenset(administrators),
            users=users,
            others=self._tokens is not None or self._certificates,
            default_tenant=tokens.default_tenant if tokens is not None else None,
        )

    def rights(self, caller: Caller | None, tenant: str) -> Rights:
        """The rights of a caller in a tenant; all rights if the caller is None."""
        return Rights(caller, tenant, self._identities)

    async def caller(
        self,
        authorization: bytes | None,
        host: str = "",
        certificate: ClientCertificate | None = None,
    ) -> Caller:
        """The caller with this Authorization header, or with this client certificate.

        Args:
            authorization: takes precedence over the certificate.
            host: the address of the caller, by which failed checks of passwords are counted.
            certificate: the verified one of the connection.

        Raises:
            Unauthenticated: there are no credentials, or they are of another kind, or wrong.
            TooManyAttempts: too many passwords from that address were wrong, or are being checked.
            Unavailable: too many credentials are being checked, or there are no keys for tokens.
        """
        if authorization is None and certificate is not None and self._certificates:
            return _known(certificate.caller(self._now()), "client certificate")
        scheme, _, given = (authorization or b"").partition(b" ")
        kind, credentials = scheme.lower(), given.strip()
        if kind == b"bearer" and self._tokens is not None:
            return _known(await self._tokens.caller(credentials), "Bearer credentials")
        if kind == b"basic" and self._passwords is not None:
            found = await self._passwords.caller(credentials, host)
            return _known(found, "Basic credentials")
        headers = [name for name in self.schemes if name != CERTIFICATE]
        wanted = [f"no Authorization header of {' or '.join(headers)}"] if headers else []
        wanted += ["no client certificate"] if self._certificates else []
        raise _unauthenticated(f"The call has {' and '.join(wanted)}.")


def _known(caller: Caller | None, credentials: str) -> Caller:
    if caller is None:
        raise _unauthenticated(f"The {credentials} are wrong, expired or not for this service.")
    return caller


def _unauthenticated(reason: str) -> Unauthenticated:
    return Unauthenticated(reason, "Send credentials that this coordinator knows.")
