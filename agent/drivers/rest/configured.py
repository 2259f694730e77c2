"""The client that the settings describe: endpoints, credentials, certificates."""

import httpx2

from agent.drivers.rest.client import RestClient
from agent.drivers.rest.credentials import ClientCredentials
from agent.errors import ConfigError
from agent.ops.blocking import BlockingThread
from agent.ops.clock import Clock
from agent.schema.secret_files import read_secret
from agent.schema.settings import AgentSettings

LONGEST_LOAD_S = 10.0
"""For the files of credentials and certificates, which are a few KiB."""


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


async def load_client(settings: AgentSettings, *, timeout_s: float = LONGEST_LOAD_S) -> RestClient:
    """The same, its files read off the event loop: they may lie on a file system that hangs.

    Raises:
        ConfigError: as ``client_for``, or a file was not read in time.
    """
    lane = BlockingThread("credentials")
    try:
        return await lane.run(lambda: client_for(settings), timeout_s=timeout_s)
    except TimeoutError:
        files = (settings.ca_file, settings.password_file, settings.client_secret_file)
        raise ConfigError(
            f"reading {', '.join(str(file) for file in files if file is not None) or 'certificates'}"
            f" took longer than {timeout_s:g} s; the file system that it is on must answer"
        ) from None
