"""The group API as its callers see it: RestClient, and OAuth2 credentials for it.

``exchange`` is one request and its answer, ``credentials`` the tokens, ``endpoints``
which endpoint is asked, and ``client`` the operations of the API.
"""

from agent.drivers.rest.client import RestClient
from agent.drivers.rest.credentials import ClientCredentials

__all__ = ["ClientCredentials", "RestClient"]
