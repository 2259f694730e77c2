"""A guard that is frozen in the kernel, beside a real agent that is Primary."""

from pathlib import Path

from tests.hung import freezer

from .stage import Stage


def guards_of(agent: int) -> list[int]:
    """The guards of an agent, by their command line."""
    return [
        child
        for children in Path(f"/proc/{agent}/task").glob("*/children")
        for child in map(int, children.read_text().split())
        if b"failover-agent guard" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def test_an_agent_whose_guard_cannot_be_killed_demotes_and_continues(stage: Stage) -> None:
    """Fault 1: it waited for the guard's end, and neither renewed nor demoted: two were active."""
    coordinator = stage.serve()
    one, other, epoch = stage.pair(coordinator)
    (frozen,) = guards_of(one.popen.pid)
    with freezer("agent") as cgroup:
        cgroup.freeze(frozen)
        one.until_said("guard lost")
        one.until_said("role changed", after=one.said().index("guard lost"))
        one.until_said("guard ready", after=one.said().index("guard lost"))
        stage.until_primary(one, other, after_epoch=epoch)
        assert len(guards_of(one.popen.pid)) == 2
        assert one.end() == 0
        assert other.end() == 0
    stage.check_promise()
