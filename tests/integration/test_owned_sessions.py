"""Agents with credentials of their own: a coordinator that begins to ask for them, and a thief."""

import base64
import http.client
import json
import signal
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from agent.coordinator.auth import hash_password

from .stage import PATIENCE_S, Agent, Coordinator, Stage, free_port, until

LONG = ("--failover-timeout=8", "--demote=0.8", "--margin=0.7")
"""R is 6.5 s: a coordinator is started again in less, even on a busy machine."""

NAMES = ("host-a", "host-b", "thief")


def run_with_password(stage: Stage, name: str, coordinator: Coordinator) -> Agent:
    password = stage.directory / f"{name}.password"
    password.touch(0o600)
    password.write_text(name)
    flags = (f"--username={name}", f"--password-file={password}")
    return stage.run(name, coordinator, flags=flags, timing=LONG)


def ask(coordinator: Coordinator, user: str, method: str, path: str, body: object = None) -> Any:
    """Status and body of a request by a user whose name is the password."""
    parts = urlsplit(coordinator.endpoint)
    assert parts.hostname is not None
    token = base64.b64encode(f"{user}:{user}".encode()).decode()
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE_S)
    with closing(connection):
        content = None if body is None else json.dumps(body)
        headers = {"Authorization": f"Basic {token}"}
        connection.request(method, f"{parts.path}/{path}", content, headers)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text else None


def test_sessions_of_before_are_adopted_and_a_thief_moves_no_role(stage: Stage) -> None:
    """The coordinator gets a users file while agents run: the primary keeps its role and its epoch.

    Then a credential with every right but ManageAccessControl is refused on the sessions of others,
    and a takeover goes on as ever: the guard of a killed primary releases the role at once.
    """
    port = free_port()
    coordinator = stage.serve(port=port, store="sqlite")
    agents = [run_with_password(stage, name, coordinator) for name in NAMES[:2]]
    one = stage.until_primary(*agents, after_epoch=0)
    other = agents[agents[0] is one]
    other.until_said("joined")
    epoch = one.state["epoch"]
    users = stage.directory / "users"
    users.touch(0o600)
    users.write_text("".join(f"{name}:{hash_password(name)}\n" for name in NAMES))

    coordinator.end(signal.SIGKILL)
    coordinator = stage.serve(f"--users-file={users}", port=port, store="sqlite")
    renewed = one.state["active_until_boottime_s"] + 4
    until(lambda: (one.state["active_until_boottime_s"] or 0) > renewed, "renewals")
    assert (one.state["role"], one.state["epoch"]) == ("Primary", epoch)

    group = f"groups/{stage.group}"
    before = ask(coordinator, "thief", "GET", f"{group}/status")
    for name in NAMES[:2]:
        session = f"{group}/clientsessions/{name}"
        for method, path, body in (
            ("POST", f"{session}/heartbeat", {"FailoverScore": 100}),
            ("POST", f"{session}/release", {"Epoch": epoch}),
            ("POST", f"{group}/clientsessions", {"Id": name}),
            ("DELETE", session, None),
        ):
            status, answer = ask(coordinator, "thief", method, path, body)
            assert (status, answer["Error"]) == (403, "Forbidden")
    assert ask(coordinator, "thief", "GET", f"{group}/status") == before

    stage.kill(one)
    newer = stage.until_primary(other, after_epoch=epoch)
    assert newer.state["epoch"] == epoch + 1
    history = ask(coordinator, "thief", "GET", f"{group}/history")[1]
    assert "demoted by the guard" in history[1]["WhyEnded"]
    stage.check_promise()
