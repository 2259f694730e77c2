"""The messages from the agent to the guard, as values and as fields (agent/guard/main.py). Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class GuardHook:
    """The demotion hook as the guard runs it.

    Attributes:
        commands: run one after the other.
        environment: all their variables.
        stdin: what each command reads: the hook payload as JSON.
        directory: their working directory.
        user: user id, or None for the agent's own; ``group`` and ``groups`` are used with it only.
        complete: whether the commands are the whole demotion. If a part is missing, such as a webhook,
            the guard runs the rest, and does not release the role.
    """

    commands: Sequence[Sequence[str]]
    environment: Mapping[str, str]
    stdin: str = ""
    directory: str = "/"
    user: int | None = None
    group: int | None = None
    groups: Sequence[int] = ()
    complete: bool = True

    def fields(self) -> list[str]:
        """The fields of a HOOK message."""
        env = [f"{key}={value}" for key, value in self.environment.items()]
        fields = [
            str(Path(self.directory).absolute()),  # the guard's own directory is /
            str(-1 if self.user is None else self.user),
            str(-1 if self.group is None else self.group),
            ",".join(map(str, self.groups)),
            str(int(self.complete)),
            self.stdin,
            str(len(env)),
            *env,
        ]
        for command in self.commands:
            fields += [str(len(command)), *command]
        return fields


@dataclass(frozen=True, slots=True)
class Arming:
    """The deadlines of a tenure, and the processes to kill then. Moments are CLOCK_BOOTTIME seconds.

    Attributes:
        hook_at: when the guard stops the agent and runs the demotion hook; infinity while the agent
            runs it.
        kill_at: when the guard kills the tenure's processes.
        agent_at: when the guard kills an agent that demotes, or None for ``kill_at``. Later than
            ``kill_at`` if the agent runs its fence command after a failed demotion.
        running: process groups of running hooks, killed first.
        groups: process groups of hooks that have run in this tenure, killed last.
        workload: process group of the command of ``exec``, stopped before the hook, or None.
        cgroup: the cgroup of the tenure, killed last, or None. The workload's is ``workload`` below it.
        roots: processes whose descendants belong to this tenure, as process id and start time
            (proctree.py), with the leaders of the running hooks and of the workload.
        mark: value of FAILOVER_TENURE in the environment of the tenure's processes, or None.
        epoch: of the tenure; None at a plain v1 server, where no role can be released.
        state: path and content of the state file for Secondary.
    """

    hook_at: float
    kill_at: float
    agent_at: float | None = None
    running: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    workload: int | None = None
    cgroup: str | None = None
    roots: tuple[tuple[int, int], ...] = ()
    mark: str | None = None
    epoch: int | None = None
    state: tuple[str, str] | None = None

    def fields(self) -> list[str]:
        """The fields of an ARM message."""
        path, text = self.state or ("", "")
        return [
            repr(self.hook_at),
            repr(self.kill_at),
            repr(self.kill_at if self.agent_at is None else self.agent_at),
            ",".join(map(str, self.running)),
            ",".join(map(str, self.groups)),
            str(self.workload or ""),
            self.cgroup or "",
            ",".join(f"{pid}:{start}" for pid, start in self.roots),
            self.mark or "",
            "" if self.epoch is None else str(self.epoch),
            str(Path(path).absolute()) if path else "",  # the guard's own directory is /
            text,
        ]


@dataclass(frozen=True, slots=True)
class GuardLogContext:
    """Format of the guard's log lines, and the agent that they are about.

    Attributes:
        min_level: the lowest level that is shown, as a number of the logging module.
        form: as in ops/logs.py.
        role: the agent's role, as last published.
    """

    min_level: int
    form: str
    group: str
    session: str
    role: str
    epoch: int | None

    def fields(self) -> list[str]:
        """The fields of a LOG message."""
        epoch = "" if self.epoch is None else str(self.epoch)
        return [str(self.min_level), self.form, self.group, self.session, self.role, epoch]
