"""A real agent whose stderr is a pipe that nobody reads keeps its role."""

import fcntl
import os
import signal
import time
from pathlib import Path

from tests.integration.stage import PATIENCE_S, TIMING, Agent, Stage

LINES = 1500
"""Of each of two hooks; the log takes 1,000 of one."""

HOLD_S = 5.0
"""More than two leases."""


def test_an_unread_stderr_loses_log_lines_but_not_the_role(tmp_path: Path) -> None:
    """Fault 1: hook output into a FIFO without a reader stopped the agent."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    with Stage(tmp_path) as stage:
        coordinator = stage.serve()
        flood = f"i=0; while [ $i -lt {LINES} ]; do echo line $i {'x' * 45}; i=$((i+1)); done"
        words = [
            f"--group={stage.group}",
            "--session-id=host-a",
            f"--state-file={tmp_path / 'host-a.json'}",
            f"--endpoint={coordinator.endpoint}",
            f"--hook-pending-primary={stage.hook('host-a', 'pending_primary', flood)}",
            f"--hook-primary={stage.hook('host-a', 'primary', flood)}",
            f"--hook-secondary={stage.hook('host-a', 'secondary')}",
            "--hook-limit=30",
            *TIMING,
        ]
        unread = (
            "/bin/sh",
            "-c",
            f'exec "$@" 2<>{fifo}',
            "sh",
        )  # as O_RDWR it opens without a reader
        spawned = stage.spawn("host-a", "run", *words, before=unread)
        agent = Agent("host-a", *spawned, tmp_path / "host-a.json")
        stage.later(lambda: agent.popen.poll() is None and agent.end(signal.SIGKILL))
        epoch = agent.until_role("Primary")["epoch"]
        time.sleep(HOLD_S)
        assert agent.state["role"] == "Primary"
        assert [tenure["Epoch"] for tenure in coordinator.history()] == [epoch]
        found, end_at = b"", time.monotonic() + PATIENCE_S
        while b"log lines dropped" not in found:
            assert time.monotonic() < end_at, found[-1000:].decode()
            try:
                found += os.read(reader, 65536)
            except BlockingIOError:
                time.sleep(0.02)
        assert agent.end(signal.SIGTERM) == 0
        os.close(reader)
        assert b"role changed" in found
