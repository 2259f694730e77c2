"""Build the client from the settings: endpoints, credentials, certificates, proxy."""

import ssl
from pathlib import Path

import httpx2

from agent.drivers.rest.client import RestClient
from agent.drivers.rest.connections import Proxy
from agent.drivers.rest.credentials import ClientCredentials
from agent.drivers.rest.endpoints import ServerAccess
from agent.ops.clock import Clock
from agent.ops.tls import load_authorities, load_pair
from agent.schema.secret_files import read_secret
from agent.schema.settings import AgentSettings


def client_for(settings: AgentSettings, access: ServerAccess | None = None) -> RestClient:
    """Build a client for the endpoints of the settings, with their credentials and CA. Close it at the end.

    Args:
        settings: name the endpoints.
        access: what ``load_server_access`` has loaded from the settings, or None to load it now.

    Raises:
        ConfigError: a file that the settings name does not have the right content.
    """
    access = access or load_server_access(settings)
    return RestClient(settings.endpoint, auth=access.auth, verify=access.tls, proxy=access.proxy)


def access_files(settings: AgentSettings) -> tuple[Path, ...]:
    """The files that ``load_server_access`` reads."""
    found = (
        settings.ca_file,
        settings.client_certificate,
        settings.client_key,
        settings.password_file,
        settings.client_secret_file,
        settings.proxy_password_file,
    )
    return tuple(file for file in found if file is not None)


def load_server_access(settings: AgentSettings) -> ServerAccess:
    """Read the files that the settings name. Blocks for as long as the disk does.

    Raises:
        ConfigError: one of them does not have the right content.
    """
    context = _tls_context(settings)
    proxy = _proxy(settings)
    auth: httpx2.Auth | None = None
    if settings.username is not None and settings.password_file is not None:
        auth = httpx2.BasicAuth(settings.username, read_secret(settings.password_file))
    elif settings.client_id is not None and settings.client_secret_file is not None:
        auth = ClientCredentials(
            settings.client_id,
            read_secret(settings.client_secret_file),
            clock=Clock().boottime,
            token_url=settings.token_endpoint,
            verify=context or True,
            proxy=proxy,
        )
    return ServerAccess(auth, context, proxy)


def _tls_context(settings: AgentSettings) -> ssl.SSLContext | None:
    """The TLS context that the settings describe; None if every URL is plain HTTP.

    Loading this host's certificate authorities takes 1.5 MiB, and 20 ms of the start.
    """
    urls = (*settings.endpoint, settings.proxy or "", settings.token_endpoint or "")
    encrypted = any(url.lower().startswith("https:") for url in urls)
    certificate, key = settings.client_certificate, settings.client_key
    # The token endpoint of a client id may be discovered.
    if not (encrypted or settings.ca_file or certificate or settings.client_id):
        return None
    context = httpx2.create_ssl_context(trust_env=False)
    if settings.ca_file is not None:
        load_authorities(context, "ca_file", settings.ca_file)
    if certificate is not None and key is not None:
        load_pair(context, "client_certificate and client_key", certificate, key)
    return context


def _proxy(settings: AgentSettings) -> Proxy | None:
    if settings.proxy is None:
        return None
    if settings.proxy_username is None or settings.proxy_password_file is None:
        return Proxy(settings.proxy)
    password = read_secret(settings.proxy_password_file)
    return Proxy(settings.proxy, (settings.proxy_username.encode(), password.encode()))
