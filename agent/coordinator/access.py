"""Load the files of authentication and TLS, and reload them at SIGHUP and when they change, without closing connections.

Owns loading the certificate, its key, the authorities of client certificates, the users file and the
token keys, and putting either all of them into force or none. Knows nothing of sockets and signals.
"""

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from agent.coordinator.auth import Authenticator, Password, TokenRules, read_key_set, read_users
from agent.coordinator.auth.callers import ROLE, USER, Subject, parse_subject
from agent.errors import ConfigError
from agent.files import signatures
from agent.ops.logs import Log
from agent.ops.tls import use_pair
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.fields import reloadable
from agent.schema.read import validate

RELOADABLE = reloadable(CoordinatorSettings)
"""Settings that SIGHUP may change. Changes of other settings are refused by name, and so is turning TLS or a
kind of authentication on or off."""

FILES = ("tls_certificate", "tls_key", "tls_client_ca_file", "users_file", "token_keys_file")
"""Settings that name a file which this module reads."""

log = Log(__name__)


@dataclass(frozen=True, slots=True)
class Files:
    """The contents of the files that the settings name, checked. ``load`` makes it."""

    tls: tuple[bytes, bytes] | None
    client_ca: str | None
    users: Mapping[str, Password] | None
    tokens: TokenRules | None


def load(settings: CoordinatorSettings) -> Files:
    """Read all files, and check that they can be used. Blocks for as long as the disk does.

    Raises:
        ConfigError: a file cannot be read, or does not hold what its setting needs.
    """
    tokens = None
    if settings.takes_tokens:
        assert settings.token_issuer is not None  # noqa: S101 - the settings come together
        assert settings.token_audience is not None  # noqa: S101 - the settings come together
        path = settings.token_keys_file
        keys = read_key_set(path) if path is not None else None
        tokens = TokenRules(
            settings.token_issuer, settings.token_audience, keys, settings.token_tenant
        )
    users = read_users(settings.users_file) if settings.users_file is not None else None
    return Files(_load_tls(settings), _load_client_ca(settings), users, tokens)


def _load_tls(settings: CoordinatorSettings) -> tuple[bytes, bytes] | None:
    if settings.tls_certificate is None:
        return None
    assert settings.tls_key is not None  # noqa: S101 - the settings come together
    try:
        pair = settings.tls_certificate.read_bytes(), settings.tls_key.read_bytes()
        use_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), *pair)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"tls_certificate {settings.tls_certificate} and tls_key {settings.tls_key} are not a"
            f" certificate chain and its private key in PEM: {error}"
        ) from None
    return pair


def _load_client_ca(settings: CoordinatorSettings) -> str | None:
    path = settings.tls_client_ca_file
    if path is None:
        return None
    try:
        text = path.read_bytes().decode("ascii")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=text)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tls_client_ca_file {path} has no certificates of authorities in PEM: {error}"
        ) from None
    return text


class ServerTls:
    """The TLS of the server. Listen with ``context``; ``use`` changes the files for new connections.

    Authorities cannot be removed from a context, so each version of the files has a context of its own, and each
    new connection is moved to the newest one.
    """

    def __init__(self, settings: CoordinatorSettings, files: Files) -> None:
        self._required = settings.tls_client_certificates == "required"
        self._newest = self.context = self._make(files)
        self.context.sni_callback = self._move

    def use(self, files: Files) -> None:
        """Use these files for new connections."""
        self._newest = self._make(files)

    def _move(self, connection: ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
        connection.context = self._newest

    def _make(self, files: Files) -> ssl.SSLContext:
        assert files.tls is not None  # noqa: S101 - TLS is not switched off while it runs
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION  # which OpenSSL 1.1.1 grants without limit
        use_pair(context, *files.tls)
        if files.client_ca is not None:
            context.load_verify_locations(cadata=files.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED if self._required else ssl.CERT_OPTIONAL
            # A resumed TLS session would not be verified again with the current authorities.
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        return context


class Access:
    """The TLS and the authenticator of a running coordinator.

    Args:
        settings: in force from now on.

    Attributes:
        seen: the signatures of the files, taken before the files were read at the start.
        on_reload: receives whether a reload has succeeded.

    Raises:
        ConfigError: as ``load`` does.
    """

    def __init__(self, settings: CoordinatorSettings) -> None:
        self.settings = settings
        self.seen = signatures(self.paths)
        self.on_reload: Callable[[bool], None] = lambda _: None
        files = load(settings)
        self._tls = ServerTls(settings, files) if files.tls is not None else None
        self.auth = Authenticator(
            files.users,
            files.tokens,
            keys_url=settings.token_keys_url,
            certificates=files.client_ca is not None,
            administrators=_administrators(settings),
        )
        _warn(settings, files)

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The context to listen with; None: plain HTTP."""
        return self._tls.context if self._tls is not None else None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that are in force."""
        named = (getattr(self.settings, name) for name in FILES)
        return tuple(path for path in named if path is not None)

    def check_again(self) -> CoordinatorSettings:
        """The settings in force, after a check that their files are still readable and secret.

        Raises:
            ConfigError: a file is not, so the next start would fail.
        """
        given = (
            (setting.name, getattr(self.settings, setting.name))
            for setting in fields(self.settings)
        )
        values = {name: str(value) if isinstance(value, Path) else value for name, value in given}
        return validate(CoordinatorSettings, values)

    def merge_reloadable(
        self, wanted: CoordinatorSettings
    ) -> tuple[CoordinatorSettings, list[str]]:
        """The settings with the reloadable changes of ``wanted``, and the names of those that need a restart."""
        kept = {}
        for key in (setting.name for setting in fields(wanted)):
            old, new = getattr(self.settings, key), getattr(wanted, key)
            switched = (old is None) != (new is None) and key != "token_tenant"
            if old != new and (switched or key not in RELOADABLE):
                kept[key] = old
        return replace(wanted, **kept), sorted(kept)

    def apply(self, settings: CoordinatorSettings, files: Files) -> list[str]:
        """Put settings from ``merge_reloadable`` and their files into force; return the changed settings' names.

        Connections that are open stay as they are; new ones get the new certificate, and each request
        is authenticated by the new users.
        """
        if self._tls is not None and files.tls is not None:
            self._tls.use(files)
        before, self.settings = self.settings, settings
        self.auth.replace(files.users, files.tokens, _administrators(settings))
        _warn(settings, files)
        keys = [setting.name for setting in fields(settings)]
        return sorted(key for key in keys if getattr(settings, key) != getattr(before, key))


def _administrators(settings: CoordinatorSettings) -> frozenset[Subject]:
    return frozenset(map(parse_subject, settings.administrator))


def _warn(settings: CoordinatorSettings, files: Files) -> None:
    """Log settings that are allowed but may be a mistake."""
    if not settings.authenticates:
        return
    if not settings.administrator:
        log.info("no administrator is set: a first access-control list cannot be made")
    if files.tokens is not None and settings.token_tenant is None:
        log.warning(
            "tokens of every tenant may use the tenant 'default'",
            resolution="set token_tenant, if the identity provider has more than one",
        )
    if files.tokens is None and files.client_ca is None:
        users = files.users or {}
        known = {Subject(USER, name) for name in users}
        known |= {Subject(ROLE, role) for user in users.values() for role in user.roles}
        nobody = sorted(one for one in settings.administrator if parse_subject(one) not in known)
        if nobody:
            log.warning(
                "administrator does not exist",
                administrator=nobody,
                resolution="name a user or a role of users_file",
            )
