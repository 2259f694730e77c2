"""Who is served, and by which certificate: what SIGHUP reads again while connections stay open.

Owns loading the certificate, its key, the users file and the token keys, and taking all of them over at
once or none. Knows nothing of sockets and signals.
"""

import os
import ssl
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path

from agent.coordinator.auth import Authenticator, Password, TokenRules, read_token_rules, read_users
from agent.errors import ConfigError
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.fields import reloadable

RELOADABLE = reloadable(CoordinatorSettings)
"""Settings that SIGHUP changes. A change of another one is refused by name, and so is switching TLS or a
kind of authentication on or off."""


@dataclass(frozen=True, slots=True)
class Files:
    """The contents of the files that the settings name, checked. ``load`` makes it."""

    tls: tuple[bytes, bytes] | None
    users: Mapping[str, Password] | None
    tokens: TokenRules | None


def load(settings: CoordinatorSettings) -> Files:
    """Read all files, and check that they can be used. Blocks for as long as the disk does.

    Raises:
        ConfigError: a file cannot be read, or is not what its setting says.
    """
    tokens = None
    if settings.token_keys_file is not None:
        assert settings.token_issuer is not None  # noqa: S101 - the settings come together
        assert settings.token_audience is not None  # noqa: S101 - the settings come together
        tokens = read_token_rules(
            settings.token_issuer, settings.token_audience, settings.token_keys_file
        )
    users = read_users(settings.users_file) if settings.users_file is not None else None
    return Files(_load_tls(settings), users, tokens)


def _load_tls(settings: CoordinatorSettings) -> tuple[bytes, bytes] | None:
    if settings.tls_certificate is None:
        return None
    assert settings.tls_key is not None  # noqa: S101 - the settings come together
    try:
        pair = settings.tls_certificate.read_bytes(), settings.tls_key.read_bytes()
        _use_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), *pair)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"tls_certificate {settings.tls_certificate} and tls_key {settings.tls_key} are not a"
            f" certificate chain and its private key in PEM: {error}"
        ) from None
    return pair


def _use_pair(context: ssl.SSLContext, chain: bytes, key: bytes) -> None:
    """Load a pair from memory: what was checked is what is used, whatever happens to the files."""
    with ExitStack() as stack:
        certificate, private = (_in_memory(stack, content) for content in (chain, key))
        # The empty password is a refusal: without it, a terminal would be asked for one.
        context.load_cert_chain(certificate, private, password=lambda: b"")


def _in_memory(stack: ExitStack, content: bytes) -> Path:
    """A file in memory with this content, while the stack is open."""
    file = stack.enter_context(os.fdopen(os.memfd_create("pem"), "wb"))
    file.write(content)
    file.flush()
    return Path(f"/proc/self/fd/{file.fileno()}")


class Access:
    """The TLS context and the authenticator of a running coordinator.

    Args:
        settings: in force from now on.

    Raises:
        ConfigError: as ``load`` does.
    """

    def __init__(self, settings: CoordinatorSettings) -> None:
        files = load(settings)
        self.settings = settings
        self.tls: ssl.SSLContext | None = None
        if files.tls is not None:
            self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self.tls.minimum_version = ssl.TLSVersion.TLSv1_2
            _use_pair(self.tls, *files.tls)
        self.auth = Authenticator(files.users, files.tokens)

    def merged(self, wanted: CoordinatorSettings) -> tuple[CoordinatorSettings, list[str]]:
        """The settings with what SIGHUP may change of ``wanted``, and the names of what it may not."""
        kept = {}
        for key in (setting.name for setting in fields(wanted)):
            old, new = getattr(self.settings, key), getattr(wanted, key)
            switched = (old is None) != (new is None)
            if old != new and (switched or key not in RELOADABLE):
                kept[key] = old
        return replace(wanted, **kept), sorted(kept)

    def take_over(self, settings: CoordinatorSettings, files: Files) -> list[str]:
        """Put settings of ``merged`` and their files into force; the names of changed settings.

        Connections that are open stay as they are; new ones get the new certificate, and each request
        is authenticated by the new users.
        """
        before, self.settings = self.settings, settings
        if self.tls is not None and files.tls is not None:
            _use_pair(self.tls, *files.tls)
        self.auth.replace(files.users, files.tokens)
        keys = [setting.name for setting in fields(settings)]
        return sorted(key for key in keys if getattr(settings, key) != getattr(before, key))
