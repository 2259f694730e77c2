"""TLS and the password of an agent's probe, loaded from the files that its settings name."""

import base64
import hmac
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from agent.ops.tls import server_context
from agent.schema.secret_files import read_secret
from agent.schema.settings import AgentSettings

TLS_KEYS = ("probe_tls_certificate", "probe_tls_key")
KEYS = (*TLS_KEYS, "probe_username", "probe_password_file")
"""The settings that ``load_probe_access`` uses."""


@dataclass(frozen=True, slots=True)
class ProbeAccess:
    """TLS and password of a probe.

    Attributes:
        tls: of new connections; None for plain HTTP.
        token: user and password as Basic authentication sends them; None lets everybody in.
    """

    tls: ssl.SSLContext | None = None
    token: bytes | None = field(default=None, repr=False)

    def allows(self, authorization: bytes | None) -> bool:
        """Whether a request with this header Authorization (None: without one) may be answered."""
        if self.token is None:
            return True
        scheme, _, token = (authorization or b"").partition(b" ")
        return scheme.lower() == b"basic" and hmac.compare_digest(token.strip(), self.token)


def probe_files(settings: AgentSettings) -> tuple[Path, ...]:
    """The files that ``load_probe_access`` reads."""
    found = (
        settings.probe_tls_certificate,
        settings.probe_tls_key,
        settings.probe_password_file,
    )
    return tuple(file for file in found if file is not None)


def warn_of_exposure(settings: AgentSettings) -> str | None:
    """Why it is unsafe that other machines can reach the probe; None if they cannot, or if TLS protects it."""
    if settings.probe_listen is None or settings.probe_listen.loopback:
        return None
    if settings.probe_username is None and settings.probe_tls_certificate is None:
        return (
            "without TLS and a password anyone who reaches it can read the state and report times"
        )
    if settings.probe_tls_certificate is None:
        return "without TLS the password is sent unencrypted"
    return None


def load_probe_access(settings: AgentSettings) -> ProbeAccess:
    """Read the files. Blocks for as long as the disk does.

    Raises:
        ConfigError: one of them does not have the right content.
    """
    tls = token = None
    certificate, key = settings.probe_tls_certificate, settings.probe_tls_key
    if certificate is not None and key is not None:
        tls = server_context(" and ".join(TLS_KEYS), certificate, key)
    if settings.probe_username is not None and settings.probe_password_file is not None:
        pair = f"{settings.probe_username}:{read_secret(settings.probe_password_file)}"
        token = base64.b64encode(pair.encode())
    return ProbeAccess(tls, token)
