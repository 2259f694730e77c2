"""What happens to agents when the coordinator dies, forgets, or is not what answers."""

import contextlib
import signal
import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

import pytest

from .stage import Coordinator, Stage, free_port, listening, until

LONG = ("--failover-timeout=8", "--demote=0.8", "--margin=0.7")
"""R is 6.5 s: a coordinator is started again in less, even on a busy machine."""


def test_the_primary_keeps_role_and_epoch_over_a_restart_within_r(stage: Stage) -> None:
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


def test_the_primary_demotes_when_nobody_renews_and_one_is_primary_again_later(
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


def test_a_coordinator_that_has_forgotten_everything_is_told_again(stage: Stage) -> None:
    port = free_port()
    coordinator = stage.serve(port=port)
    one, other, epoch = stage.pair(coordinator)
    stage.kill(one)
    other.until_role("Primary", after_epoch=epoch)
    third = stage.run("host-c", coordinator)
    third.until_said("joined")
    before = len(other.said()), len(third.said())
    coordinator.end(signal.SIGKILL)
    coordinator = stage.serve(port=port)
    for agent, said in zip((other, third), before, strict=True):
        agent.until_said("joined", after=said)
    assert coordinator.ask("GET", f"groups/{stage.group}").body["FailoverTimeout"] == "00:00:02"
    newest = stage.until_primary(other, third, after_epoch=epoch + 1)
    until(lambda: coordinator.status().get("Primary") == newest.name, "the status")
    epochs = stage.check_promise()
    assert coordinator.status()["Epoch"] == epochs[-1] > epoch + 1


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
    """Two coordinators that know nothing of each other: epochs go on increasing all the same."""
    first, second = stage.serve(), stage.serve("--data-dir=/nonexistent")
    agent = stage.run("host-a", first, second)
    epoch = agent.until_role("Primary")["epoch"]
    first.end(signal.SIGKILL)
    state = agent.until_role("Primary", after_epoch=epoch)
    assert state["endpoint"] == second.endpoint
    stage.check_promise()
