"""The demonstration's workload: a collector that reads a growing file and appends to an output.

It does what a real one should: it starts after the data-processed time that it receives, reports its
own, checks its lease before each write, and its sink refuses an epoch older than the newest.
Standard library only, so that it starts at once. Runs alone: ``python -m agent.cli.demo_collector``.

Lines of the source: ``number time``. Lines of the output: ``number time epoch host nanoseconds``.
Each attempt to write is recorded in the activity file, before the sink accepts or refuses it.
"""

import fcntl
import json
import os
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

POLL_S = 0.01
"""How often the source is polled."""

REPORT_S = 0.1
TAIL_BYTES = 256
"""Bytes of the output's end that are read: more than its longest line has."""


class Fenced(Exception):  # noqa: N818 - an outcome
    """A holder with a newer epoch has written, or our own lease has expired."""


def main(directory: Path, host: str) -> None:
    """Collect until SIGTERM, or until fenced. The facts come from the hook's environment."""
    epoch = int(os.environ["FAILOVER_EPOCH"])
    state_file = Path(os.environ["FAILOVER_STATE_FILE"])
    processed_until = _time(os.environ["FAILOVER_LAST_DATA_PROCESSED_TIME"])
    reported_at = 0.0
    with (
        (directory / "source").open("rb") as source,
        (directory / "output").open("r+b") as output,
        (directory / "activity").open("ab", buffering=0) as activity,
    ):
        while True:
            line = source.readline()
            if not line.endswith(b"\n"):
                source.seek(-len(line), os.SEEK_CUR)
                time.sleep(POLL_S)
                continue
            number, stamp = line.decode().split()
            if processed_until is not None and _parse(stamp) <= processed_until:
                continue
            _check_lease(state_file, epoch)
            activity.write(f"{epoch} {host} {time.monotonic_ns()}\n".encode())
            _append(output, int(number), stamp, epoch, host)
            if time.monotonic() - reported_at >= REPORT_S:
                reported_at = time.monotonic()
                _report(os.environ["FAILOVER_PROBE_URL"], stamp)


def _time(text: str) -> datetime | None:
    return _parse(text) if text else None


def _parse(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _check_lease(state_file: Path, epoch: int) -> None:
    """Raise Fenced unless this tenure's lease is valid, by the state file (docs/hooks.md)."""
    state = json.loads(state_file.read_text())
    until = state["active_until_boottime_s"]
    expired = until is None or time.clock_gettime(time.CLOCK_BOOTTIME) >= until
    if expired or state["epoch"] != epoch:
        raise Fenced


def _append(output: BinaryIO, number: int, stamp: str, epoch: int, host: str) -> None:
    """The sink: one writer at a time, no epoch older than the newest, no line twice."""
    fcntl.flock(output, fcntl.LOCK_EX)
    try:
        end = output.seek(0, os.SEEK_END)
        output.seek(max(0, end - TAIL_BYTES))
        last = output.read().decode().splitlines()[-1:]
        if last:
            last_number, _, last_epoch, *_ = last[0].split()
            if int(last_epoch) > epoch:
                raise Fenced
            if int(last_number) >= number:
                return
        line = f"{number} {stamp} {epoch} {host} {time.monotonic_ns()}\n"
        output.write(line.encode())
        output.flush()
    finally:
        fcntl.flock(output, fcntl.LOCK_UN)


def _report(probe_url: str, stamp: str) -> None:
    """Report the data-processed time to the agent; the next report follows soon, so errors are ignored."""
    address, _, port = probe_url.removeprefix("http://").rpartition(":")
    body = json.dumps({"time": stamp}).encode()
    head = (
        f"POST /data-processed HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    try:
        with socket.create_connection((address.strip("[]"), int(port)), timeout=1) as connection:
            connection.sendall(head.encode() + body)
            connection.recv(1024)
    except OSError:
        pass


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except Fenced:
        sys.exit("fenced: the lease has expired, or a newer epoch has written")
