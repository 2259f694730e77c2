"""A proxy before the coordinator that mixes answers up: nobody takes the answer to another request for its own (R3)."""

import http.client
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import urlsplit

from .stage import Coordinator, Stage, until

ANSWERED = 10
"""So many answers go to the wrong request: those of several beats of each member."""


class Mixing(BaseHTTPRequestHandler):
    """Passes on each request; a heartbeat gets the answer to the heartbeat before it, whoever sent that."""

    protocol_version = "HTTP/1.1"
    server: "Mixer"

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        place = urlsplit(self.server.coordinator.endpoint).netloc
        with closing(http.client.HTTPConnection(place, timeout=30)) as connection:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            whole = answer.status, answer.getheaders(), answer.read()
        if self.path.endswith("/heartbeat"):
            whole = self.server.swap(whole)
        status, headers, body = whole
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = _pass_on  # noqa: N815 - as the base class names them

    def log_message(self, *_args: object) -> None:
        pass


Whole = tuple[int, list[tuple[str, str]], bytes]


class Mixer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__(("127.0.0.1", 0), Mixing)
        self.coordinator = coordinator
        self.mixes = False
        self.mixed = 0
        self._before: Whole | None = None
        self._lock = Lock()

    def swap(self, answer: Whole) -> Whole:
        with self._lock:
            before, self._before = self._before, answer
            if before is None or not self.mixes:
                return answer
            self.mixed += 1
            return before


@contextmanager
def mixer(coordinator: Coordinator) -> Iterator[Mixer]:
    with Mixer(coordinator) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_r3_a_proxy_that_mixes_answers_up_makes_no_second_primary(tmp_path: Path) -> None:
    """Without the number of the request host-b takes the answer to host-a for its own, and promotes."""
    with Stage(tmp_path) as stage:
        coordinator = stage.serve()
        proxy = stage.enter(mixer(coordinator))
        direct = urlsplit(coordinator.endpoint).netloc
        endpoint = coordinator.endpoint.replace(direct, f"127.0.0.1:{proxy.server_port}")
        primary = stage.run("host-a", endpoint)
        epoch = primary.until_role("Primary")["epoch"]
        other = stage.run("host-b", endpoint)
        other.until_role("Secondary")
        proxy.mixes = True
        until(lambda: proxy.mixed >= ANSWERED or None, "mixed answers")
        primary.until_role("Secondary")  # no answer is its own, so its lease has ended
        other.until_said("answers another request")
        assert {happened.which for happened in stage.events("host-b")} == {"secondary"}
        proxy.mixes = False
        until(lambda: coordinator.status().get("Epoch", 0) > epoch or None, "another tenure")
