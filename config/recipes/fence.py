"""Refuse an epoch older than the newest that was seen. The newest survives a restart."""

import os
from pathlib import Path


class Fence:
    """One for each group, with a file of its own. Not for several threads at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.newest = int(path.read_text()) if path.exists() else 0

    def admits(self, epoch: int) -> bool:
        """Whether data of this epoch may be taken; a newer one is on disk before the answer."""
        if epoch > self.newest:
            beside = self._path.with_name(f"{self._path.name}.new")
            with beside.open("w") as file:
                file.write(str(epoch))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
            self.newest = epoch
        return epoch == self.newest
