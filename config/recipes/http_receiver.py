"""Takes readings by POST and refuses old epochs: ``http_receiver.py PORT FENCE_FILE OUTPUT``.

The header ``X-Failover-Epoch`` is the sender's FAILOVER_EPOCH. 409 means that there is a newer one:
the sender must stop. One request at a time, so nothing comes between the check and the write.
"""

import http.server
import sys
from pathlib import Path

from fence import Fence


class Handler(http.server.BaseHTTPRequestHandler):
    """POST: one reading."""

    def do_POST(self) -> None:
        """204 if the reading is written, 409 for an old epoch."""
        reading = self.rfile.read(int(self.headers["Content-Length"]))
        admitted = fence.admits(int(self.headers["X-Failover-Epoch"]))
        if admitted:
            output.write(reading + b"\n")
        self.send_response(204 if admitted else 409)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log no request."""


fence = Fence(Path(sys.argv[2]))
with Path(sys.argv[3]).open("ab", buffering=0) as output:
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
