"""A known caller that asks for long lists over many connections, and reads none of them, costs nobody a role."""

import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit

from tests.coordinator.raw import Raw, crowd

from .stage import Stage
from .test_several_coordinators import check_unmoved, running

GROUPS, CONNECTIONS = 1_000, 100
NOTE = {"Note": "x" * 15_000}


def test_a_flood_of_lists_costs_no_role(stage: Stage) -> None:
    """A page has 15 MB. Made at once, a hundred of them held up all heartbeats for seconds."""
    coordinator = stage.serve()
    agent, epoch = running(stage, coordinator)
    base = urlsplit(coordinator.endpoint)
    url = f"{base.scheme}://{base.netloc}"
    with Raw(url) as writer:
        for number in range(GROUPS):
            group = {"Id": f"x{number}", "FailoverTimeout": "00:00:30", "AdditionalData": NOTE}
            assert writer.request("POST", f"{base.path}/groups", group).answer().status == 201
    ended = threading.Event()

    def flood() -> None:
        while not ended.is_set():
            with suppress(OSError), crowd(url, CONNECTIONS) as callers:
                for one in callers:
                    one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    one.request("GET", f"{base.path}/groups?count={GROUPS}")
                ended.wait(2.0)

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        check_unmoved(stage, agent, epoch, 6.0)
    finally:
        ended.set()
        flooding.join()
