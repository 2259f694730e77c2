"""A collector that runs on every host and works on the primary only: ``hot_collector.py PORT OUTPUT``.

Hooks post each role to it. The answer to ``secondary`` comes after the last write, so that the demotion
hook does not end before the work has ended.
"""

import http.server
import json
import sys
import threading
import time
from pathlib import Path

PERIOD_S = 0.05


class Collector:
    """Born inactive."""

    def __init__(self, output: Path) -> None:
        self._output = output.open("a", buffering=1)
        self._lock = threading.Lock()
        self._epoch = None

    def follow(self, payload: dict) -> None:
        """Take on a role; returns when no write of another role is under way."""
        with self._lock:
            self._epoch = payload["epoch"] if payload["event"] == "primary" else None

    def is_active(self) -> bool:
        """Whether it writes."""
        return self._epoch is not None

    def work(self) -> None:
        """Write while active, for ever."""
        while True:
            with self._lock:
                if self._epoch is not None:
                    self._output.write(f"{self._epoch} {time.monotonic_ns()}\n")
            time.sleep(PERIOD_S)


class Handler(http.server.BaseHTTPRequestHandler):
    """POST /role: a hook payload. GET /role: for the agent's check."""

    def do_GET(self) -> None:
        """200 while active, else 503."""
        self.send_response(200 if collector.is_active() else 503)
        self.end_headers()

    def do_POST(self) -> None:
        """Answer when the role has been taken on."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        collector.follow(json.loads(body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log no request."""


collector = Collector(Path(sys.argv[2]))
threading.Thread(target=collector.work, daemon=True).start()
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
