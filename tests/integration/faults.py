"""Faults inside a running agent, which no signal and no file can cause: a module for PYTHONPATH.

``variables`` makes an agent import it as ``sitecustomize``. When the trigger file has a line
``module Class.method fails``, each call of that method raises; with ``hangs`` it never returns. A file beside
it then shows that the fault is in force. The guard runs in isolated mode, so it has no such fault.
"""

import os
from pathlib import Path

from .stage import until

SOURCE = """
import os, sys, threading, time

def watch(trigger):
    while not os.path.exists(trigger):
        time.sleep(0.01)
    module, path, what = open(trigger).read().split()
    owner, _, name = path.rpartition(".")
    def fail(*_args, **_kwargs):
        raise RuntimeError("a fault that a test has put here")
    def hang(*_args, **_kwargs):
        threading.Event().wait()
    setattr(getattr(sys.modules[module], owner), name, hang if what == "hangs" else fail)
    open(trigger + ".done", "w").close()

if "reader" not in sys.argv and (trigger := os.environ.get("FAULT_TRIGGER")):
    threading.Thread(target=watch, args=(trigger,), daemon=True).start()
"""


class Fault:
    """One fault, in a folder of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "fault"
        self._directory.mkdir()
        (self._directory / "sitecustomize.py").write_text(SOURCE)
        self._trigger = self._directory / "trigger"

    @property
    def variables(self) -> dict[str, str]:
        """For the environment of the agent."""
        inherited = os.environ.get("PYTHONPATH")
        path = f"{self._directory}:{inherited}" if inherited else str(self._directory)
        return {"PYTHONPATH": path, "FAULT_TRIGGER": str(self._trigger)}

    def trigger(self, module: str, method: str, *, hangs: bool = False) -> None:
        """Make the method raise, or never return, in the running agent; returns when that is in force."""
        beside = self._trigger.with_suffix(".new")
        beside.write_text(f"{module} {method} {'hangs' if hangs else 'fails'}\n")
        beside.replace(self._trigger)
        done = self._trigger.with_suffix(".done")
        until(done.exists, "the fault to be in force")
