"""A server with version 1 of the group API only: no extension of docs/api.md.

A strict one answers 400 to properties and query parameters that version 1 has not. No epochs, no revisions, no release, no blocking reads; 404 on what it does not know. Roles are
numbers; who is chosen is told PendingPrimary first and Primary at the next heartbeat. It keeps a
list of all that it was asked.
"""

import json
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from threading import Lock
from typing import Any
from urllib.parse import unquote

from .stage import Stage, listening

SECONDARY, PRIMARY, PENDING_PRIMARY = 0, 1, 2

Answer = tuple[int, Any]

KNOWN = {
    "groups": {"Id", "Name", "Description", "FailoverTimeout", "AdditionalData"},
    "clientsessions": {"Id", "Name", "AdditionalData"},
    "heartbeat": {"FailoverScore", "LastDataProcessedTime"},
}
"""The properties of the bodies that version 1 has, by the last part of the path."""


@dataclass
class Member:
    """One client session."""

    body: dict[str, Any]
    score: float = 0.0
    last_data: str | None = None
    heard_at: float | None = None


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    body: Any
    query: str
    at: float
    status: int = 0
    said: Any = None


@dataclass
class PlainV1:
    """The server, with one group at most. ``refuse`` is what the next heartbeat is answered by."""

    stage: Stage
    group: dict[str, Any] | None = None
    lease_s: float = 0.0
    members: dict[str, Member] = field(default_factory=dict)
    primary: str | None = None
    pending: str | None = None
    asked: list[Asked] = field(default_factory=list)
    refuse: tuple[int, str] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        plain, lock = self, Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"null")
                path, _, query = unquote(self.path).partition("?")
                _, _, path = path.rstrip("/").partition("/clientfailover/")
                with lock:
                    at = time.monotonic()
                    status, said, retry_after = plain.reply(
                        self.command, path.split("/"), body, query
                    )
                    plain.asked.append(Asked(self.command, path, body, query, at, status, said))
                text = b"" if said is None else json.dumps(said).encode()
                self.send_response(status)
                if retry_after is not None:
                    self.send_header("Retry-After", retry_after)
                if status != 204:
                    self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_DELETE = handle_one  # noqa: N815 - the names that http.server calls

            def log_message(self, *_: object) -> None:
                pass

        address = listening(self.stage, Handler).server_address
        self.endpoint = f"http://127.0.0.1:{address[1]}/api/v1/clientfailover"

    def heartbeats(self, session: str) -> list[Asked]:
        return [a for a in self.asked if a.path.endswith(f"/{session}/heartbeat")]

    def reply(
        self, method: str, path: list[str], body: Any, query: str
    ) -> tuple[int, Any, str | None]:
        """Status, body and Retry-After."""
        unknown = set(body or {}) - KNOWN.get(path[-1], set())
        if self.strict and (unknown or query):
            return 400, {"Reason": f"Unknown: {query or unknown}.", "Resolution": "Omit it."}, None
        if self.refuse is None or path[-1] != "heartbeat":
            return *self.answer(method, path, body), None
        (status, retry_after), self.refuse = self.refuse, None
        return status, {"Reason": "Too much."}, retry_after

    def answer(self, method: str, path: list[str], body: Any) -> Answer:
        """What one request is answered; it is done as well."""
        self._settle()
        known = self.group["Id"] if self.group is not None else None
        match method, path:
            case "POST", ["groups"]:
                return self._make(body)
            case _, ["groups", name, *_] if name != known:
                return 404, {"Reason": "There is no such group."}
            case "GET", ["groups", _]:
                return 200, self.group
            case "GET", ["groups", _, "status"]:
                status = {"Primary": self.primary, "PendingPrimary": self.pending}
                last_data = self.members[self.primary].last_data if self.primary else None
                status["LastDataProcessedTime"] = last_data
                return 200, {key: value for key, value in status.items() if value is not None}
            case "POST", ["groups", _, "clientsessions"]:
                new = body["Id"] not in self.members
                self.members.setdefault(body["Id"], Member(body))
                return 201 if new else 200, {**body, "Role": SECONDARY}
            case _, ["groups", _, "clientsessions", name, *_] if name not in self.members:
                return 404, {"Reason": "There is no such session."}
            case "DELETE", ["groups", _, "clientsessions", name]:
                self._remove(name)
                return 204, None
            case "POST", ["groups", _, "clientsessions", name, "heartbeat"]:
                return self._heartbeat(name, body)
            case _:
                return 404, {"Reason": "There is no such route."}

    def _make(self, body: dict[str, Any]) -> Answer:
        if self.group is not None:
            same = body["FailoverTimeout"] == self.group["FailoverTimeout"]
            return (200, self.group) if same else (409, {"Reason": "It exists otherwise."})
        self.group = body
        hours, minutes, seconds = map(float, body["FailoverTimeout"].split(":"))
        self.lease_s = (hours * 60 + minutes) * 60 + seconds
        return 201, body

    def _heartbeat(self, name: str, body: dict[str, Any]) -> Answer:
        member = self.members[name]
        member.score, member.heard_at = body["FailoverScore"], time.monotonic()
        member.last_data = body.get("LastDataProcessedTime")
        if self.pending == name:
            self.primary, self.pending = name, None
            return 200, {"Role": PRIMARY, **self._last_data()}
        if self.primary is None and self.pending is None:
            self.pending = max(self._alive(), key=lambda n: self.members[n].score)
        role = PRIMARY if self.primary == name else SECONDARY
        return 200, {"Role": PENDING_PRIMARY if self.pending == name else role, **self._last_data()}

    def _last_data(self) -> dict[str, str]:
        times = [m.last_data for m in self.members.values() if m.last_data]
        return {"LastDataProcessedTime": max(times)} if times else {}

    def _alive(self) -> list[str]:
        now = time.monotonic()
        members = self.members.items()
        return [n for n, m in members if m.heard_at is not None and now < m.heard_at + self.lease_s]

    def _settle(self) -> None:
        alive = self._alive()
        self.primary = self.primary if self.primary in alive else None
        self.pending = self.pending if self.pending in alive else None

    def _remove(self, name: str) -> None:
        del self.members[name]
        self.primary = None if self.primary == name else self.primary
        self.pending = None if self.pending == name else self.pending
