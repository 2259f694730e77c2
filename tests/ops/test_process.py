"""Child processes, and what they inherit."""

import asyncio
import gc
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from agent import proctree
from agent.ops import process
from agent.ops.process import Child
from agent.proctree import ENDED


@pytest.mark.parametrize(
    ("vital", "ours", "theirs"), [(False, "-900", "0"), (True, "-900", "-900"), (False, "7", "7")]
)
@pytest.mark.parametrize("user", [None, 65534])
async def test_only_demotion_hooks_keep_the_protection_from_the_oom_killer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    vital: bool,
    ours: str,
    theirs: str,
    user: int | None,
) -> None:
    """A workload kept it, and then the agent, which is larger, was killed before it; and likewise for hook_user.

    The real file cannot be given such a value without CAP_SYS_RESOURCE.
    """
    if user is not None and os.geteuid() != 0:
        pytest.skip("needs: root: run the tests as root")
    score = tmp_path / "oom_score_adj"
    score.write_text(f"{ours}\n")
    monkeypatch.setattr(process, "OOM_SCORE", str(score))
    child = Child(["/bin/true"], vital=vital, start_new_session=True, user=user)
    child.start()
    assert (await child.wait()).code == 0
    child.release()
    assert score.read_text().split()[0] == theirs


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Popen knows that process only by half
@pytest.mark.parametrize("owner", [os, proctree], ids=["after its exec", "after its fork"])
async def test_no_command_runs_whose_start_has_failed(
    monkeypatch: pytest.MonkeyPatch, owner: ModuleType
) -> None:
    """Memory lacked when its start was awaited: a demotion hook ran on beside its repetition, or into a new tenure."""
    read = os.read

    def without_memory(*given: int) -> bytes:
        if given[1:] in {(), (50_000,)}:  # what Popen reads, to wait for the exec
            raise MemoryError
        return read(*given)

    def children() -> set[int]:
        table = proctree.snapshot().items()
        return {p for p, one in table if one.parent == os.getpid() and one.state not in ENDED}

    before = children()
    monkeypatch.setattr(owner, "read", without_memory)
    child = Child(["/bin/sleep", "2"], start_new_session=True)
    child.start()
    await child.wait()
    monkeypatch.undo()
    child.release()
    del child
    gc.collect()
    assert not children() - before


MANY = """
import asyncio, subprocess
from pathlib import Path
from agent.ops import process

def zombies():
    return Path("/proc/thread-self/children").read_text().split()

async def main():
    process.TASKS
    process.REAP_S = 0.1
    process.become_subreaper()
    orphans = process.OrphanReaper()
    asyncio.get_running_loop().call_later(0.15, setattr, process, "REAP_S", 1000.0)
    script = "for i in $(seq 200); do (true &); done"
    subprocess.run(["/bin/sh", "-c", script], check=True)
    while zombies():
        await asyncio.sleep(0.01)
    print("reaped")

asyncio.run(asyncio.wait_for(main(), 20))
"""


@pytest.mark.parametrize("children_are_listed", [True, False])
async def test_many_orphans_are_reaped_soon(*, children_are_listed: bool) -> None:
    """Each counts as a task, so in the interval between two searches they could use up the limit of tasks."""
    program = MANY if children_are_listed else MANY.replace("TASKS", 'TASKS = Path("/none")', 1)
    work = asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, check=False, text=True
    )
    result = await work
    assert result.stdout == "reaped\n", result.stderr
