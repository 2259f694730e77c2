"""Started by test_sigkill.py: is killed at every line of the opening of a data directory in turn.

``crashing_opener.py DIRECTORY`` forks, for each n, a child that opens DIRECTORY/n for the first time
and sends itself SIGKILL before the n-th line of data_dir.py; then opens what is left, writes to it
and opens it again. Prints how many lines there were; any failure is an exception.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from agent.coordinator.store import data_dir


def die_at(line: int) -> None:
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != data_dir.__file__:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def killed_while_opening(directory: Path, line: int) -> bool:
    child = os.fork()
    if child == 0:
        die_at(line)
        data_dir.open_data_dir(directory)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def check_usable(directory: Path) -> None:
    insert = "INSERT INTO access VALUES ('t', 'n', '{}')"
    select = "SELECT count(*) FROM access"
    opened = data_dir.open_data_dir(directory)
    opened.database.execute(insert)
    opened.close()
    opened = data_dir.open_data_dir(directory)
    kept = opened.database.execute(select).get
    opened.close()
    if kept != 1:
        raise RuntimeError(f"{directory} kept {kept} rows of 1")
    if unfinished := list(directory.glob("*.new")):
        raise RuntimeError(f"left behind: {unfinished}")


def main() -> None:
    line = 1
    while killed_while_opening(directory := Path(sys.argv[1]) / str(line), line):
        check_usable(directory)
        line += 1
    print(line - 1)  # noqa: T201 - the answer


main()
