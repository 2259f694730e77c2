"""Lines to a pipe that nobody reads: nobody waits, and what is missing is counted."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.ops import lines
from agent.ops.lines import LineWriter, StderrLines

PATIENCE_S = 30.0
TASKS = Path("/proc/self/task")
QUICK_S = 5.0
"""For what takes milliseconds unless it blocks for ever."""


@dataclass
class Pipe:
    read_fd: int
    write_fd: int

    def fill(self) -> int:
        """Fill it to the brim; how many bytes were written."""
        os.set_blocking(self.write_fd, False)
        written = 0
        try:
            while True:
                written += os.write(self.write_fd, b"." * 4096)
        except BlockingIOError:
            os.set_blocking(self.write_fd, True)
            return written

    def read(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            found += os.read(self.read_fd, size - len(found))
        return found

    def read_until(self, text: str) -> list[str]:
        """Everything up to a line with this text."""
        found = b""
        os.set_blocking(self.read_fd, False)
        end_at = time.monotonic() + PATIENCE_S
        while text.encode() not in found or not found.endswith(b"\n"):
            assert time.monotonic() < end_at, f"no {text!r} in the last of {found[-200:]!r}"
            try:
                found += os.read(self.read_fd, 65536)
            except BlockingIOError:
                time.sleep(0.005)
        return found.decode().splitlines()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    read_fd, write_fd = os.pipe()
    yield Pipe(read_fd, write_fd)
    for fd in (read_fd, write_fd):
        try:
            os.close(fd)
        except OSError:
            continue


def writer_to(pipe: Pipe) -> LineWriter:
    return LineWriter(pipe.write_fd, lambda count: f"dropped {count}")


def test_lines_are_written_in_order(pipe: Pipe) -> None:
    writer = writer_to(pipe)
    for number in range(100):
        writer.put(f"line {number}")
    assert writer.flush(PATIENCE_S)
    assert pipe.read_until("line 99") == [f"line {number}" for number in range(100)]
    assert writer.dropped == 0


def test_a_full_pipe_blocks_no_caller_and_missing_lines_are_reported_in_their_place(
    pipe: Pipe,
) -> None:
    """Fault 1: a pipe that nobody reads stopped the agent."""
    filled = pipe.fill()
    writer = writer_to(pipe)
    began_at = time.monotonic()
    for number in range(20_000):
        writer.put(f"line {number:>50}", bulk=True)
    assert not writer.flush(0.05)
    assert time.monotonic() - began_at < QUICK_S
    dropped = writer.dropped
    assert 0 < dropped < 20_000
    pipe.read(filled)
    found = pipe.read_until("dropped")
    kept = 20_000 - dropped
    assert found == [f"line {number:>50}" for number in range(kept)] + [f"dropped {dropped}"]
    writer.put("again")
    assert pipe.read_until("again") == ["again"]


def test_the_report_comes_before_the_first_line_after_the_gap(pipe: Pipe) -> None:
    filled = pipe.fill()
    writer = writer_to(pipe)
    for _ in range(1000):
        writer.put("x" * 500)
    dropped = writer.dropped
    pipe.read(filled)
    kept = 1000 - dropped
    pipe.read(501 * (kept - 10))  # room for the next line, and the queue is not empty yet
    writer.put("after")
    assert pipe.read_until("after")[-2:] == [f"dropped {dropped}", "after"]


def test_output_of_programs_leaves_room_for_our_own_lines(pipe: Pipe) -> None:
    filled = pipe.fill()
    writer = writer_to(pipe)
    while not writer.dropped:
        writer.put("bulk " * 20, bulk=True)
    dropped = writer.dropped
    writer.put("role changed")
    assert writer.dropped == dropped
    pipe.read(filled)
    assert "role changed" in pipe.read_until("dropped")


def test_a_pipe_without_a_reader_loses_lines_without_a_busy_loop(pipe: Pipe) -> None:
    os.close(pipe.read_fd)
    writer = writer_to(pipe)
    for _ in range(3):
        writer.put("lost")
        assert writer.flush(PATIENCE_S)
    assert writer.dropped == 3
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_lines_that_were_refused_are_reported_when_writing_works_again(pipe: Pipe) -> None:
    target = os.dup(pipe.write_fd)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        writer = LineWriter(target, lambda count: f"dropped {count}")
        os.dup2(full, target)
        for _ in range(2):
            writer.put("lost")
            assert writer.flush(PATIENCE_S)
        os.dup2(pipe.write_fd, target)
        writer.put("seen")
        assert writer.flush(PATIENCE_S)
        assert pipe.read_until("seen") == ["dropped 2", "seen"]
    finally:
        os.close(target)
        os.close(full)


def test_a_non_blocking_descriptor_loses_no_line(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = pipe.fill()
    writes: list[int] = []
    write = os.write

    def counted(fd: int, data: memoryview) -> int:
        writes.append(fd)
        return write(fd, data)

    monkeypatch.setattr(os, "write", counted)
    os.set_blocking(pipe.write_fd, False)
    writer = writer_to(pipe)
    writer.put("kept " * 2000)
    assert not writer.flush(0.3)
    assert len(writes) < 10, "it waits for room without a busy loop"
    pipe.read(filled)
    assert pipe.read_until("kept") == ["kept " * 2000]
    assert writer.dropped == 0


def test_a_child_between_fork_and_exec_can_log_while_the_thread_has_the_lock(pipe: Pipe) -> None:
    writer = writer_to(pipe)
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        # only this lock is what the thread holds while it writes
        with writer._changed:
            locked.set()
            done.wait(PATIENCE_S)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait(PATIENCE_S)
    try:
        subprocess.run(
            ["/bin/true"], preexec_fn=lambda: writer.put("x"), check=True, timeout=QUICK_S
        )
    finally:
        done.set()
        thread.join()


def test_signals_are_left_to_the_main_thread(pipe: Pipe) -> None:
    before = set(TASKS.iterdir())
    writer = writer_to(pipe)
    writer.put("x")
    assert writer.flush(PATIENCE_S)
    (thread,) = set(TASKS.iterdir()) - before
    status = (thread / "status").read_text()
    blocked = next(line for line in status.splitlines() if line.startswith("SigBlk:"))
    assert int(blocked.split()[1], 16) & (1 << (signal.SIGTERM - 1))


@pytest.mark.parametrize("refused", [RuntimeError, MemoryError, None])
def test_a_thread_that_does_not_start_holds_up_no_caller_and_the_next_line_tries_again(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch, refused: type[Exception] | None
) -> None:
    """If memory is lacking, the kernel's thread may also end before it runs."""

    def start(*_: object) -> None:
        if refused is not None:
            raise refused

    writer = writer_to(pipe)
    with monkeypatch.context() as patched:
        patched.setattr("_thread.start_new_thread", start)
        writer.put("one")
        assert not writer.flush(0.01)
    if refused is not None:
        writer.put("two")
        assert pipe.read_until("two") == ["one", "two"]


def test_printed_text_is_written_line_by_line(pipe: Pipe) -> None:
    writer = writer_to(pipe)
    stream = StderrLines(writer)
    print("one", 2, file=stream)
    print("begun, ", end="", file=stream)
    print("ended", file=stream, flush=True)
    stream.write("x" * (lines.LONGEST_PART + 1))
    assert writer.flush(PATIENCE_S)
    found = pipe.read_until("x" * (lines.LONGEST_PART + 1))
    assert found == ["one 2", "begun, ended", "x" * (lines.LONGEST_PART + 1)]
    assert (stream.fileno(), stream.isatty(), stream.writable()) == (pipe.write_fd, False, True)


ENDING = """
import sys, threading, warnings
from agent.ops import logs
logs.configure("INFO", "text")
log = logs.Log("x")
for number in range({count}):
    log.info("hook output", stream="stdout", line="x" * 100)
warnings.warn("stray")
print("printed", file=sys.stderr)
print(logs.dropped(), flush=True)
log.error("the last line")
sys.exit(7)
"""


def test_the_last_lines_are_written_before_the_process_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(count=200)],
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, b"0\n")
    found = done.stderr.decode().splitlines()
    assert len(found) >= 203
    assert found[-2] == "printed"
    assert found[-1].endswith("ERROR the last line")


def test_a_process_exits_although_nobody_reads_its_last_lines(pipe: Pipe) -> None:
    """Fault 1: 3,000 lines of hook output into a pipe that nobody reads."""
    pipe.fill()
    began_at = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(count=3000)],
        stdout=subprocess.PIPE,
        stderr=pipe.write_fd,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 7
    assert int(done.stdout) > 0
    assert time.monotonic() - began_at < 10
