"""Which worker of `make test` gets which test file: one only computes, and the others do not wait for it.

Most tests wait for processes and clocks, and disturb each other. Those that only compute have the lowest priority, and
use the time that the others leave: in one of the other workers they would occupy it for five times as long as they need.
"""

from pathlib import PurePath
from typing import Any

from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped] # it has no types

COMPUTING = {"cluster", "core", "schema", "simulation"}
"""Folders of pure computation: no process, no clock."""


def computes(path: PurePath) -> bool:
    return not COMPUTING.isdisjoint(path.parts)


class Distribution(LoadFileScheduling):  # type: ignore[misc] # likewise
    """Whole files, in their order: to the first worker those that compute, to the others the rest first.

    The first one ends when no more files compute: no more tests wait at once than there are others.
    """

    def _assign_work_unit(self, node: Any) -> None:
        wanted = self._is_first(node)
        for file in self.workqueue:
            if computes(PurePath(file)) is wanted:
                self.workqueue.move_to_end(file, last=False)
                break
        super()._assign_work_unit(node)

    def _reschedule(self, node: Any) -> None:
        done = self._is_first(node) and any(computes(PurePath(f)) for f in self.assigned_work[node])
        if done and not any(computes(PurePath(file)) for file in self.workqueue):
            if not node.shutting_down:
                node.shutdown()
        else:
            super()._reschedule(node)

    def _is_first(self, node: Any) -> bool:
        return len(self.assigned_work) > 1 and node is next(iter(self.assigned_work))
