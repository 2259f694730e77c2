"""What was acknowledged survives SIGKILL, whenever it comes."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from agent.coordinator.store.sqlite import SqliteStore

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
ROUNDS = 6
SEED = 20240506

Acknowledged = dict[str, tuple[int, int]]


def write_until_killed(directory: Path, lines: int) -> Acknowledged:
    """Each group's last acknowledged (version, epoch) of a process killed after ``lines`` of them."""
    acknowledged: Acknowledged = {}
    program = [sys.executable, str(HERE / "killed_writer.py"), str(directory)]
    with subprocess.Popen(program, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for seen, line in enumerate(writer.stdout):
            if seen == lines:
                writer.kill()
            if line.endswith("\n"):
                group, version, epoch = line.split()
                acknowledged[group] = (int(version), int(epoch))
    assert writer.returncode == -9
    return acknowledged


async def test_every_acknowledged_change_is_there_after_sigkill(tmp_path: Path) -> None:
    """And no half of one: a record and its history are of the same transaction."""
    chance = random.Random(SEED)
    acknowledged: Acknowledged = {}
    for _ in range(ROUNDS):
        acknowledged |= write_until_killed(tmp_path, chance.randrange(2_000))
        store = SqliteStore.open(tmp_path)
        found = {key.group: (key, stored) for key, stored in (await store.load()).items()}
        for group, (version, epoch) in acknowledged.items():
            key, stored = found[group]
            assert stored.version >= version
            assert stored.record.epoch in {epoch, epoch + 1}  # the one under way may have happened
            assert stored.record.holder is not None
            assert stored.record.holder.epoch == stored.record.epoch
            total, entries = await store.history(key, count=1)
            assert total == min(stored.record.epoch, 1_000)
            assert [entry.epoch for entry in entries] == [stored.record.epoch][:total]
        await store.close()
    assert len(acknowledged) == 20


def test_a_death_at_any_line_of_the_first_opening_leaves_a_directory_that_opens(
    tmp_path: Path,
) -> None:
    program = [sys.executable, str(HERE / "crashing_opener.py"), str(tmp_path)]
    done = subprocess.run(program, env=ENVIRONMENT, check=False, capture_output=True, text=True)
    assert done.stderr == ""
    assert int(done.stdout) > 40
