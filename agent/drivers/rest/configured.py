"""The client that the settings describe: endpoints, credentials, certificates."""

import httpx2

from agent.drivers.rest.client import RestClient
from agent.drivers.rest.credentials import ClientCredentials
from agent.errors import ConfigError
from agent.ops.clock import Clock
from agent.settings import AgentSettings, read_secret


def client_for(settings: AgentSettings) -> RestClient:
    """A client for the endpoints of the settings, with their credentials and CA. Close it.

    Raises:
        ConfigError: a file that the settings name has not in it what it should.
    """
    context = httpx2.create_ssl_context(trust_env=False)
    if settings.ca_file is not None:
        try:
            context.load_verify_locations(settings.ca_file)
        except OSError as error:  # an SSLError is one
            raise ConfigError(
                f"ca_file {settings.ca_file} must have certificates in PEM: {error}"
            ) from None
    auth: httpx2.Auth | None = None
    if settings.username is not None and settings.password_file is not None:
        auth = httpx2.BasicAuth(settings.username, read_secret(settings.password_file))
    elif settings.client_id is not None and settings.client_secret_file is not None:
        auth = ClientCredentials(
            settings.client_id,
            read_secret(settings.client_secret_file),
            clock=Clock().boottime,
            token_url=settings.token_endpoint,
            verify=context,
        )
    return RestClient(settings.endpoint, auth=auth, verify=context)
