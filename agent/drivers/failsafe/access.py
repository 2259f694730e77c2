"""The group's secret and the certificates of failsafe, loaded from the files that the settings name."""

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from agent.ops.tls import client_context, server_context
from agent.schema.addresses import is_link_local, is_loopback
from agent.schema.secret_files import read_keys
from agent.schema.settings import AgentSettings


@dataclass(frozen=True, slots=True)
class FailsafeAccess:
    """The keys and TLS contexts that prove that a message comes from a member of the group.

    Attributes:
        keys: all valid keys; two while the secret is being changed.
        listener_tls: of the listener; None for plain HTTP.
        asker_tls: verifies the certificates of the other members.
    """

    keys: tuple[bytes, ...] = field(repr=False)
    listener_tls: ssl.SSLContext | None
    asker_tls: ssl.SSLContext


def warn_of_shared_url(settings: AgentSettings) -> str | None:
    """Why members on several hosts may have this member's URL; None if they cannot.

    The same URL would reach another process from each host, so two promises would count as one (R22).
    """
    host = urlsplit(settings.member_url or "").hostname or ""
    elsewhere = [url for url in settings.endpoint if not is_loopback(urlsplit(url).hostname or "")]
    if not elsewhere or not (is_loopback(host) or is_link_local(host)):
        return None
    kind = "loopback" if is_loopback(host) else "link-local"
    return (
        f"{host} is a {kind} address, which members on other hosts cannot reach or may have, too; with"
        f" a coordinator at {elsewhere[0]}, set failsafe_listen or failsafe_url to an address of this"
        " host on the LAN"
    )


def failsafe_files(settings: AgentSettings) -> tuple[Path, ...]:
    """The files that ``load_failsafe_access`` reads."""
    found = (
        settings.failsafe_secret_file,
        settings.failsafe_ca_file,
        settings.failsafe_certificate,
        settings.failsafe_key,
    )
    return tuple(file for file in found if file is not None)


def load_failsafe_access(settings: AgentSettings) -> FailsafeAccess:
    """Read the files. Blocks for as long as the disk does.

    Raises:
        ConfigError: one of them does not have the right content.
    """
    assert settings.failsafe_secret_file is not None  # noqa: S101 - set together with failsafe_listen
    keys = read_keys(settings.failsafe_secret_file)
    certificate, key = settings.failsafe_certificate, settings.failsafe_key
    listener_tls = None
    asker_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if certificate is not None and key is not None:
        what = "failsafe_certificate and failsafe_key"
        listener_tls = server_context(what, certificate, key)
        asker_tls = client_context("failsafe_ca_file", settings.failsafe_ca_file)
    return FailsafeAccess(keys, listener_tls, asker_tls)
