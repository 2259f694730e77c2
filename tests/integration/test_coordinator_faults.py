"""Agents whose coordinator dies, loses its data, or is replaced by another server."""

import contextlib
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Thread

import pytest

from agent.errors import ExitCode
from tests.bad_server import make_certificate

from .stage import Coordinator, Gate, Stage, free_port, listening, until

LONG = ("--failover-timeout=8", "--demote=0.8", "--margin=0.7")
"""R is 6.5 s: a coordinator is started again in less, even on a busy machine."""


def test_the_primary_keeps_role_and_epoch_if_the_coordinator_restarts_within_r(
    stage: Stage,
) -> None:
    port = free_port()
    coordinator = stage.serve(port=port, store="sqlite")
    agent = stage.run("host-a", coordinator, timing=LONG)
    state = agent.until_role("Primary")
    coordinator.end(signal.SIGKILL)
    coordinator = stage.serve(port=port, store="sqlite")
    renewed = state["active_until_boottime_s"] + 1
    until(lambda: (agent.state["active_until_boottime_s"] or 0) > renewed, "a renewal")
    until(lambda: coordinator.status().get("Primary") == "host-a", "the status")
    assert (agent.state["role"], agent.state["epoch"]) == ("Primary", state["epoch"])
    assert [entry["Epoch"] for entry in coordinator.history()] == [state["epoch"]]
    assert stage.check_promise() == [state["epoch"]]


def test_the_primary_demotes_without_a_coordinator_and_a_primary_returns_with_it(
    stage: Stage,
) -> None:
    port = free_port()
    coordinator = stage.serve(port=port, store="sqlite")
    one, other, epoch = stage.pair(coordinator)
    coordinator.end(signal.SIGKILL)
    state = one.until_role("Secondary")
    assert "no renewal" in state["reason"]
    stage.until_event(one.name, "end", "secondary")
    coordinator = stage.serve(port=port, store="sqlite")
    newer = stage.until_primary(one, other, after_epoch=epoch)
    assert coordinator.tenure(epoch)["SessionId"] == one.name
    assert coordinator.status()["Primary"] == newer.name
    stage.check_promise()


def test_a_coordinator_that_lost_its_data_is_refused(stage: Stage) -> None:
    """Its store is another one: somebody may be primary of the one that was lost (Fault 9)."""
    port = free_port()
    coordinator = stage.serve(port=port)
    one, other, _ = stage.pair(coordinator)
    coordinator.end(signal.SIGKILL)
    coordinator = stage.serve(port=port)
    for agent in (one, other):
        agent.until_said("coordinator of another store refused")
    one.until_role("Secondary")
    assert "Primary" not in coordinator.status()
    assert [agent.end() for agent in (one, other)] == [0, 0]
    stage.check_promise()


def dead(_stage: Stage) -> str:
    return f"http://127.0.0.1:{free_port()}"


def a_page(stage: Stage) -> str:
    class Page(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>Welcome</title>")

        do_GET = do_POST = do_DELETE = answer  # noqa: N815 - the names that http.server calls

        def log_message(self, *_: object) -> None:
            pass

    return f"http://127.0.0.1:{listening(stage, Page).server_address[1]}"


def silence(stage: Stage) -> str:
    server = stage.enter(contextlib.closing(socket.create_server(("127.0.0.1", 0))))
    return f"http://127.0.0.1:{server.getsockname()[1]}"  # the kernel accepts, nobody reads


@pytest.mark.parametrize("bad", [dead, a_page, silence])
def test_the_next_endpoint_is_used_if_the_first_is_no_coordinator(
    stage: Stage, coordinator: Coordinator, bad: Callable[[Stage], str]
) -> None:
    agent = stage.run("host-a", f"{bad(stage)}/api/v1/clientfailover", coordinator)
    assert agent.until_role("Primary")["endpoint"] == coordinator.endpoint
    assert agent.end() == 0
    assert coordinator.tenure(1)["WhyEnded"] == "stopping"


def test_the_second_endpoint_is_used_when_the_first_dies(stage: Stage) -> None:
    """Both lead to one coordinator, as those of a cluster do."""
    coordinator = stage.serve()
    first, second = Gate(stage, coordinator.endpoint), Gate(stage, coordinator.endpoint)
    agent = stage.run("host-a", first.endpoint, second.endpoint)
    agent.until_role("Primary")
    first.close()
    until(lambda: agent.state["endpoint"] == second.endpoint, "the second endpoint")
    assert agent.state["role"] == "Primary"
    assert agent.end() == 0
    assert [tenure["WhyEnded"] for tenure in coordinator.history()] == ["stopping"]


def test_a_coordinator_of_another_store_makes_no_second_primary(stage: Stage) -> None:
    """Fault 9: one member is cut off from the first coordinator, and the second is one of its own."""
    first, second = stage.serve(), stage.serve("--data-dir=/nonexistent")
    gate = Gate(stage, first.endpoint)
    cut_off = stage.run("host-a", gate.endpoint, second)
    cut_off.until_role("Primary")
    other = stage.run("host-b", first, second)
    other.until_said("joined")
    gate.close()
    other.until_role("Primary")
    cut_off.until_said("coordinator of another store refused")
    assert cut_off.state["role"] == "Secondary"
    gate.open()
    until(lambda: cut_off.state["endpoint"] == gate.endpoint, "the first coordinator again")
    assert "Primary" not in second.status()
    assert cut_off.end() == 0
    assert other.end() == 0
    stage.check_promise()


def test_dead_endpoints_in_the_list_do_not_cost_the_role(stage: Stage) -> None:
    """Fault 18: 5 roles of 5 were lost; the good one is away for 0.8 s at a lease of 3 s."""
    gate = Gate(stage, stage.serve().endpoint)
    dead = [silence(stage) + "/api/v1/clientfailover" for _ in range(2)]
    timing = ("--failover-timeout=3",)
    agent = stage.run("host-a", dead[0], gate.endpoint, dead[1], timing=timing)
    epoch = agent.until_role("Primary")["epoch"]
    for _ in range(5):
        gate.close()
        time.sleep(0.8)
        gate.open()
        time.sleep(1.5)
        assert agent.state["role"] == "Primary"
    assert agent.state["epoch"] == epoch
    assert agent.end() == 0


@pytest.mark.parametrize("role", ["joining", "Secondary", "Primary"])
def test_a_graceful_stop_completes_without_a_coordinator(stage: Stage, role: str) -> None:
    """Fault 11: whatever cannot be told then, the agent gets on."""
    coordinator = stage.serve()
    gate = Gate(stage, coordinator.endpoint)
    if role == "joining":
        gate.close()
    if role == "Secondary":
        stage.run("host-b", coordinator).until_role("Primary")
    agent = stage.run("host-a", gate.endpoint, flags=("--startup-timeout=0",))
    if role == "joining":
        agent.until_said("join failed, retrying")
    elif role == "Secondary":
        agent.until_said("joined")
    else:
        agent.until_role("Primary")
    gate.close()
    began = time.monotonic()
    assert agent.end() == 0
    assert time.monotonic() - began < 10.0
    last = stage.events("host-a")[-1]
    assert (last.what, last.which) == ("end", "secondary")
    assert agent.state["role"] == "Secondary"


def test_a_start_fails_at_a_server_that_requires_a_client_certificate(
    stage: Stage, tmp_path: Path
) -> None:
    """Fault 11: the TLS alert left the agent joining for ever."""
    certificate = make_certificate(tmp_path)
    wanting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    wanting.load_cert_chain(certificate)
    wanting.load_verify_locations(certificate)
    wanting.verify_mode = ssl.CERT_REQUIRED
    port = stage.enter(accepting(wanting))
    flags = ("--startup-timeout=1", f"--ca-file={certificate}")
    agent = stage.run("host-a", f"https://127.0.0.1:{port}/clientfailover", flags=flags)
    assert agent.wait() in {ExitCode.UNREACHABLE, ExitCode.NO_ANSWER}
    assert "join failed, retrying" in agent.said()


@contextlib.contextmanager
def accepting(tls: ssl.SSLContext) -> Iterator[int]:
    """A server that makes handshakes and reads."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with tls.wrap_socket(
                        connection, server_side=True, do_handshake_on_connect=False
                    ) as wrapped:
                        with contextlib.suppress(OSError):
                            wrapped.do_handshake()
                        time.sleep(0.2)  # a close at once may overtake the alert

        thread = Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
