"""The client of the group API: RestClient, and OAuth2 credentials for it.

``exchange`` has one request and its answer, ``credentials`` the tokens, ``endpoints`` the choice of the endpoint, and
``client`` the operations of the API.
"""

from agent.drivers.rest.client import RestClient
from agent.drivers.rest.credentials import ClientCredentials

__all__ = ["ClientCredentials", "RestClient"]
