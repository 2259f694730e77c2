"""Requests over a network that may drop every packet: each has a short timeout."""

import http.client
import json
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 1.5


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; ``body`` is the JSON in it, or None."""

    status: int
    body: Any


def request(method: str, url: str, body: object = None, timeout_s: float = TIMEOUT_S) -> Reply:
    """Send one request. Raises OSError or HTTPException where there is no answer."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
    with closing(connection):
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        return Reply(answer.status, json.loads(text) if text else None)
