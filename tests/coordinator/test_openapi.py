"""The OpenAPI document is true: schemathesis calls a real coordinator with what it allows and forbids.

All its checks are on, positive and negative data, all its phases (examples, coverage, fuzzing,
stateful), and no operation is left out.
"""

import asyncio
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.coordinator import service
from agent.coordinator.auth import hash_password
from agent.coordinator.openapi import document
from agent.coordinator.route_table import ROUTES
from agent.coordinator.server import serving
from agent.schema.addresses import Address
from agent.schema.coordinator_settings import CoordinatorSettings

pytestmark = pytest.mark.long

ROOM_BYTES = 4 * 1024 * 1024
"""The longest body that the schemas allow has room: 413 depends on a setting, which no schema says."""

CONFIG = """
[[operations]]
include-path-regex = "/heartbeat$"
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 401, 403, 404, 409, 429, "5xx"]
"""
"""How far above a group's epoch a heartbeat's may be depends on the group, which no schema says: 400."""

SHOWN = 4000
"""Characters of a failing run's report: its beginning has the first failures, its end the counts."""


def run_schemathesis(cwd: Path, url: str, *options: str) -> None:
    (cwd / "schemathesis.toml").write_text(CONFIG)
    program = Path(sys.executable).with_name("schemathesis")
    command = [str(program), "run", f"{url}/openapi.json", "--checks", "all", "--no-color"]
    command += ["--continue-on-failure", "--seed", "2", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=110, cwd=cwd, check=False
    )
    report = done.stdout[done.stdout.find("= FAILURES") :] if "= FAILURES" in done.stdout else ""
    report = f"{report[:SHOWN]}\n...\n{done.stdout[-SHOWN:]}{done.stderr[-SHOWN:]}"
    assert done.returncode == 0, report


@contextmanager
def embedded(**given: Any) -> Iterator[str]:
    """A real coordinator on a real port, in a thread of its own."""
    settings = CoordinatorSettings(
        listen=Address("127.0.0.1", 0), store="memory", max_body_bytes=ROOM_BYTES, **given
    )
    told: queue.Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def serve() -> None:
        async with serving(settings) as url:
            stop = asyncio.Event()
            told.put((url, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    url, loop, stop = told.get(timeout=30)
    yield url
    loop.call_soon_threadsafe(stop.set)
    thread.join(30)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A blocking status read may last for minutes, and schemathesis does ask for that."""
    monkeypatch.setattr(service, "LONGEST_WAIT_S", 0.02)


def test_every_call_conforms_to_the_document(tmp_path: Path) -> None:
    """Whatever is allowed is accepted, whatever is forbidden is refused, as described."""
    with embedded() as url:
        run_schemathesis(tmp_path, url, "--max-examples", "8")


def test_a_secured_coordinator_conforms_too(tmp_path: Path) -> None:
    """Credentials that are missing or wrong are refused wherever the document says so."""
    users = tmp_path / "users"
    users.write_text(f"ann:{hash_password('secret')}\n")
    users.chmod(0o600)
    with embedded(users_file=users, role_form="name") as url:
        run_schemathesis(
            tmp_path,
            url,
            *(
                "--auth",
                "ann:secret",
                "--max-examples",
                "3",
                "--phases",
                "examples,coverage,fuzzing",
            ),
            *("--include-path-regex", "^/api/v1/clientfailover/groups/{groupId}/[hs]"),
        )


@pytest.fixture
def description() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(document(ROUTES, ("Basic", "Bearer")))
    return read


def test_it_has_every_route_and_nothing_else(description: dict[str, Any]) -> None:
    described = {
        (method.upper(), path)
        for path, operations in description["paths"].items()
        for method in operations
    }
    assert described == {(route.method, path) for route in ROUTES for path in route.paths}


def test_operations_have_ids_of_their_own(description: dict[str, Any]) -> None:
    ids = [
        operation["operationId"]
        for operations in description["paths"].values()
        for operation in operations.values()
    ]
    assert len(ids) == len(set(ids))


def test_only_what_anybody_may_call_is_without_security(description: dict[str, Any]) -> None:
    unsecured = {
        path
        for path, operations in description["paths"].items()
        for operation in operations.values()
        if "security" not in operation
    }
    assert unsecured == {"/", "/healthz", "/readyz", "/metrics", "/openapi.json"}
