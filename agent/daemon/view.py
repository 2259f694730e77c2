"""What the outside sees of one agent: the state file, the probe's answers, the status line of systemd.

Owns the state file's content and its writing. The file may lie on a disk that hangs, so it is written
beside the event loop, the newest state only; whoever must not go on before it is written waits for
``flushed``, with a limit. Decides nothing.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from agent import __version__
from agent.core.session import FormerTenure, Phase
from agent.daemon.member import Member
from agent.daemon.vitals import Snapshot
from agent.drivers.progress import Progress, Reason
from agent.drivers.statefile import StateFile
from agent.errors import ConfigError, ExitCode, FailoverError
from agent.model import Role
from agent.ops import logs
from agent.ops.blocking import Lane, StuckError
from agent.schema.scalars import format_date_time

FLUSH_S = 0.1
"""How long a hook waits for the state file to be written. Sidecars read a deadline in it, so a disk that
hangs for longer may not delay a demotion."""

FIRST_WRITE_S = 5.0
"""The same for the first state, before anything else happens."""

RETRY_S = 1.0
"""After a write that failed, the same state is written again after this time."""

STOPPED = "stopped"
"""The reason in the state file of an agent that ended in order."""

log = logs.Log(__name__)


class View:
    """The view of one agent.

    Args:
        member: read only.
        state_file: claimed by this process.
        former: the tenure that the process before this one has not given back.
    """

    def __init__(self, member: Member, state_file: StateFile, former: FormerTenure | None) -> None:
        self._member = member
        self._state_file = state_file
        self._lane = Lane("state file")
        self._wanted: Mapping[str, Any] | None = None
        self._key: object = None
        self._writing: asyncio.Task[None] | None = None
        self._failing = False
        self._owed: int | None = None
        self._former = former
        self.score: Callable[[], float] = lambda: 0.0
        self.trouble: Callable[[], str | None] = lambda: None

    # -- the state file -------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The content of the state file, and of the probe's /status."""
        member = self._member
        session, published = member.session, member.published
        demotion = member.runs.demotion
        holds = published.role is not Role.SECONDARY
        return {
            "group": member.settings.group,
            "session": member.session_id,
            "role": published.role.value,
            "epoch": published.epoch,
            "since": format_date_time(published.since),
            "reason": published.reason,
            "phase": session.phase.value,
            # On CLOCK_BOOTTIME. By then demotion is done or killed; a workload that looks at it
            # before each write fences itself.
            "active_until_boottime_s": session.renew_by + session.timing.demote_s
            if holds
            else None,
            "last_data_processed_time": format_optional(member.progress),
            "failover_timeout_s": session.timing.lease_s,
            "score": self.score(),
            "unfit": self.trouble(),
            "endpoint": member.requests.endpoint,
            "probe": member.runs.payloads.probe_url,
            "instance": member.instance,
            "unreleased": self._unreleased(),
            "boot": this_boot(),
            "store": session.store_id,
            "stop_command": list(demotion.value) if demotion is not None else [],
            "pid": os.getpid(),
            "version": __version__,
        }

    def _unreleased(self) -> dict[str, Any] | None:
        """The tenure that is not released yet, for the next process: ours, or that of the one before."""
        session = self._member.session
        if self._owed is not None:
            owed: FormerTenure | None = FormerTenure(self._owed, self._member.instance)
        else:  # a process that dies before its first demotion is done hands it on
            owed = self._former if session.phase in {Phase.STARTING, Phase.RETURNING} else None
        return {"epoch": owed.epoch, "instance": owed.instance} if owed is not None else None

    @property
    def path(self) -> str:
        """Where the state file is."""
        return str(self._state_file.path)

    async def write_first(self, reason: str) -> FailoverError | None:
        """Write Secondary before anything else happens (R6); why that failed, or None."""
        state = self.describe() | {"reason": reason}
        try:
            await self._lane.run(lambda: self._state_file.write(state), timeout_s=FIRST_WRITE_S)
        except (OSError, TimeoutError, StuckError) as error:
            why = getattr(error, "strerror", None) or f"not within {FIRST_WRITE_S:g} s"
            return ConfigError(
                f"state file {self.path} cannot be written ({why}): make room for it, or choose"
                " another --state-file",
                exit_code=ExitCode.STATE_FILE,
            )
        return None

    def write(self) -> None:
        """Have the state file written if something in it is new. Does not wait."""
        session = self._member.session
        if session.guard_by is not None and session.tenure is not None:
            self._owed = session.tenure
        key = (
            session.renew_by,
            session.store_id,
            self._member.published,
            self._member.runs.payloads.probe_url,
            self.trouble(),
            self._owed,
        )
        if key == self._key:
            return
        self._key = key
        self._wanted = self.describe()
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write_wanted())

    def released(self) -> None:
        """Note that the tenure was given back: the next process has nothing to release."""
        self._owed = None
        self.write()

    async def flushed(self, limit_s: float = FLUSH_S) -> bool:
        """Wait until the newest state is written, for ``limit_s`` seconds at most; whether it is."""
        if self._writing is not None and not self._writing.done():
            await asyncio.wait([self._writing], timeout=limit_s)
        return self._writing is None or self._writing.done()

    async def close(self) -> None:
        """Write the last state, and write no more."""
        self.write()
        await self.flushed(RETRY_S)
        if self._writing is not None:
            self._writing.cancel()

    async def _write_wanted(self) -> None:
        """Write until the newest state is on the disk: a full one is tried again, slowly."""
        while (state := self._wanted) is not None:
            self._wanted = None
            try:
                await self._lane.run(lambda: self._state_file.write(state))
            except (OSError, StuckError) as error:
                self._report(error)
                await asyncio.sleep(RETRY_S)
                self._want_again(state)
            else:
                self._failing = False

    def _want_again(self, state: Mapping[str, Any]) -> None:
        if self._wanted is None:  # nothing newer has come meanwhile
            self._wanted = state

    def _report(self, error: Exception) -> None:
        if not self._failing:
            log.error(
                "state file cannot be written",
                path=self.path,
                reason=getattr(error, "strerror", None) or error,
                resolution="make room; until then sidecars see an old role that has run out",
            )
        self._failing = True

    # -- the rest -------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """The line in ``systemctl status``."""
        published = self._member.published
        epoch = "-" if published.epoch is None else published.epoch
        group = self._member.settings.group
        doing = self._member.session.sentence
        return f"{published.role} of {group} epoch={epoch} ({published.reason}); {doing}"


def former_tenure(state: Mapping[str, Any], stop_command: Sequence[str]) -> FormerTenure | None:
    """The tenure that the process before this one has not given back, by its state file.

    Args:
        state: the content of the file.
        stop_command: the demotion hook of now. Another one may not stop what that process has started,
            so then the role is left to its lease.
    """
    unreleased = state.get("unreleased")
    if not isinstance(unreleased, dict) or store_of(state) is None:
        return None
    if not is_of_this_boot(state):
        return None  # another machine's: its processes may live on
    epoch, instance = unreleased.get("epoch"), unreleased.get("instance")
    if not isinstance(epoch, int) or not isinstance(instance, str):
        return None
    if state.get("stop_command") != list(stop_command):
        log.warning(
            "role of the previous run not given back: it had another demotion hook",
            epoch=epoch,
            resolution="make sure that its workload is stopped",
            stop_command=state.get("stop_command"),
        )
        return None
    return FormerTenure(epoch, instance)


@cache
def this_boot() -> str | None:
    """Identifies the processes that this one can see: a boot of a machine, and a PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def former_instances(state: Mapping[str, Any]) -> set[str]:
    """The earlier processes that may have left something running here, by the state file."""
    if not is_of_this_boot(state):
        return set()
    unreleased = state.get("unreleased")
    given = {state.get("instance"), unreleased.get("instance") if unreleased else None}
    return {instance for instance in given if isinstance(instance, str) and instance}


def is_of_this_boot(state: Mapping[str, Any]) -> bool:
    """Whether the processes of the state's writer, if they live, can be seen here."""
    return state.get("boot") is not None and state["boot"] == this_boot()


def store_of(state: Mapping[str, Any]) -> str | None:
    """The store that the process before this one belonged to, by its state file."""
    store = state.get("store")
    return store if isinstance(store, str) else None


def refused_times(source: Progress | None, future_refused: int) -> dict[str, int]:
    """How many data-processed times were refused, by reason."""
    counts = dict(source.refused) if source is not None else dict.fromkeys(map(str, Reason), 0)
    counts[Reason.FUTURE] += future_refused
    return counts


def format_optional(time: datetime | None) -> str | None:
    """A time as the API has it, or None."""
    return format_date_time(time) if time is not None else None


def snapshot_of(member: Member, **rest: Any) -> Snapshot:
    """Everything that probes and metrics are answered from, at this moment."""
    session = member.session
    return Snapshot(
        now=member.clock.boottime(),
        wall=member.clock.wall(),
        group=member.settings.group,
        session_id=member.session_id,
        timing=session.timing,
        phase=session.phase,
        said=session.role,
        demoting=session.guard_by is not None and session.role is Role.SECONDARY,
        epoch=session.newest_epoch,
        renew_by=session.renew_by,
        lease_until=session.lease_until,
        wake_at=session.wake_at,
        data=member.progress,
        group_data=member.requests.group_data,
        endpoint=member.requests.endpoint,
        endpoints=member.settings.endpoint,
        notifications_dropped=member.runs.notifier.dropped,
        notifications_failed=member.runs.notifier.failed,
        tally=member.tally,
        **rest,
    )
