"""Publish the state of one agent: the state file, the probe's answers, systemd's status line.

Owns the state file's content and its writing. A disk may hang, so a thread writes the file, and only the
newest state; ``flush`` waits for that, with a timeout. Decides nothing.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from agent import __version__, proctree
from agent.core.events import Event, Stop
from agent.core.failsafe_view import FailsafeView
from agent.core.session import Phase, PreviousTenure
from agent.daemon.failsafe_report import describe_failsafe
from agent.daemon.member import Member
from agent.daemon.previous_state import boot_id, previous_scripts
from agent.daemon.telemetry import Snapshot
from agent.drivers.hooks.spec import shown
from agent.drivers.progress import Progress, Reason
from agent.drivers.statefile import StateFile
from agent.errors import ConfigError, ExitCode, FailoverError
from agent.model import Role
from agent.ops import logs
from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.tasks import start_task
from agent.schema.scalars import format_date_time

FLUSH_S = 0.1
"""How long a hook waits for the state file. A disk that hangs for longer must not delay a demotion, since
sidecars can read the deadline in the previous state."""

FIRST_WRITE_S = 5.0
"""Timeout of the first write, which everything else waits for."""

RETRY_S = 1.0
"""Delay before a failed write is retried."""

STOPPED = "stopped"
"""The reason in the state file of an agent that has stopped in order."""

log = logs.Log(__name__)


class StatePublisher:
    """Publishes the state of one agent.

    Args:
        member: read only.
        state_file: locked by this process.
        previous_tenure: the tenure that the previous process has not released.
        previous: the state that it has left.
        post_event: receives Stop if another process has claimed the state file.

    Attributes:
        failsafe_view: as of the last call of ``write``.
    """

    failsafe_view: FailsafeView

    def __init__(
        self,
        member: Member,
        state_file: StateFile,
        previous_tenure: PreviousTenure | None,
        previous: Mapping[str, Any],
        post_event: Callable[[Event], None],
    ) -> None:
        self._member = member
        self._post_event = post_event
        own = proctree.identify(os.getpid())
        self._pid_start = None if own is None else own[1]
        self._state_file = state_file
        self._lane = BlockingThread("state file", vital=True)
        self._pending_state: Mapping[str, Any] | None = None
        self._scheduled_key: object = None
        self._writing: asyncio.Task[bool] | None = None
        self._failure = ""
        self._facts: Mapping[str, Any] = {}
        self._own_state: Mapping[str, Any] = {}
        self._unreleased_epoch: int | None = None
        self._previous_tenure = previous_tenure
        self._previous_scripts = previous_scripts(previous)
        self.score: Callable[[], float] = lambda: 0.0
        self.unfit_reason: Callable[[], str | None] = lambda: None

    # -- the state file -------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The content of the state file, and of the probe's /status."""
        session, clock = self._member.session, self._member.clock
        described = dict(self.own_state())
        if session.options.failsafe is not None:
            now = clock.boottime()
            described["failsafe"] = describe_failsafe(session.failsafe_view(now), now, clock.wall())
        return described

    def own_state(self) -> Mapping[str, Any]:
        """The content of the state file without failsafe, which changes with each answer of another member.

        Returns the same mapping while nothing in it changes, since each step of the session needs it.
        """
        member, role_runner = self._member, self._member.role_runner
        session, published, hook = member.session, member.published, role_runner.demotion_hook
        holds = published.role is not Role.SECONDARY
        facts = {
            "group": member.settings.group,
            "session": member.session_id,
            "role": published.role.value,
            "epoch": published.epoch,
            "since": published.since,
            "reason": published.reason,
            "phase": session.phase.value,
            # On CLOCK_BOOTTIME. By then the demotion is done, or killed; a workload that checks it
            # before each write fences itself.
            "active_until_boottime_s": session.renew_by + session.timing.demote_s
            if holds
            else None,
            "last_data_processed_time": member.progress,
            "failover_timeout_s": session.timing.lease_s,
            "score": self.score(),
            "unfit": self.unfit_reason(),
            "endpoint": member.requests.endpoint,
            "probe": role_runner.payloads.probe_url,
            "instance": member.instance,
            "unreleased": self._unreleased(),
            "processes": role_runner.known_processes,
            "marks": role_runner.leftover.marks,
            "boot": boot_id(),
            "store": session.store_id,
            "stop_command": () if hook is None else shown(hook.value),
            "stop_context": None if hook is None else hook.context.digest,
            "stop_scripts": self._stop_scripts(),
            "pid": os.getpid(),
            "pid_start": self._pid_start,
            "version": __version__,
        }
        if facts != self._facts:
            self._facts = facts
            self._own_state = {name: _to_json(value) for name, value in facts.items()}
        return self._own_state

    def _stop_scripts(self) -> Sequence[str]:
        """The scripts of the demotion hook that has to succeed before ``_unreleased`` may be released."""
        if (unreleased := self._unreleased()) is not None and unreleased is self._previous_tenure:
            return self._previous_scripts
        hook = self._member.role_runner.demotion_hook
        return () if hook is None else [step.argv[0] for step in hook.scripts]

    def _unreleased(self) -> PreviousTenure | None:
        """The tenure that the next process has to release: of this process, or of the previous one."""
        session = self._member.session
        if self._unreleased_epoch is not None:
            return PreviousTenure(self._unreleased_epoch, self._member.instance)
        if session.phase in {Phase.STARTING, Phase.RETURNING}:
            return self._previous_tenure  # if this process dies now, the next one releases it
        return None

    @property
    def path(self) -> str:
        """The path of the state file."""
        return str(self._state_file.path)

    async def write_first(self, reason: str) -> FailoverError | None:
        """Write Secondary before anything else happens (R6); return the error if that fails, or None."""
        state = self.describe() | {"reason": reason}
        try:
            await self._lane.run(lambda: self._state_file.write(state), timeout_s=FIRST_WRITE_S)
        except (OSError, TimeoutError, StuckError) as error:
            why = (
                getattr(error, "strerror", None) or str(error) or f"not within {FIRST_WRITE_S:g} s"
            )
            return ConfigError(
                f"state file {self.path} cannot be written ({why}): make room for it, or choose"
                " another --state-file",
                exit_code=ExitCode.STATE_FILE,
            )
        return None

    def with_hint(self, failure: FailoverError) -> FailoverError:
        """The failure; if it can be mended by removing the state file, with a hint that explains that."""
        if failure.exit_code is ExitCode.OTHER_STORE:
            failure.hint = (
                "if the coordinator's data were deleted on purpose, remove"
                f" {self.path} and start the agent again"
            )
        return failure

    def write(self) -> None:
        """Schedule a write of the state file if its content has changed. Does not wait."""
        session = self._member.session
        if session.guard_deadlines is not None and session.tenure is not None:
            self._unreleased_epoch = session.tenure
        self.failsafe_view = session.failsafe_view(self._member.clock.boottime())
        key = (
            session.renew_by,
            self.failsafe_view,
            session.store_id,
            self._member.published,
            self._member.role_runner.payloads.probe_url,
            self.unfit_reason(),
            self._unreleased_epoch,
            self._member.role_runner.known_processes,
            self._member.role_runner.leftover.marks,
            self._stop_scripts(),
        )
        if key == self._scheduled_key:
            return
        self._scheduled_key = key
        self._pending_state = self.describe()
        if self._writing is None or self._writing.done():
            self._writing = start_task(self._write_pending())

    def on_released(self) -> None:
        """Record that the tenure is released: the next process need not do that."""
        self._unreleased_epoch = None
        self.write()

    async def flush(self, limit_s: float = FLUSH_S) -> bool:
        """Wait until the newest state is written, at most ``limit_s`` seconds; return whether it is."""
        if (writing := self._writing) is None:
            return True
        await asyncio.wait([writing], timeout=limit_s)
        ended = writing.done() and not writing.cancelled()
        return ended and writing.exception() is None and writing.result()

    async def close(self) -> None:
        """Write the last state, and stop writing."""
        self.write()
        await self.flush(RETRY_S)
        if self._writing is not None:
            self._writing.cancel()

    async def _write_pending(self) -> bool:
        """Write until the newest state is on the disk; a failed write is retried. Return whether it is."""
        while (state := self._pending_state) is not None:
            self._pending_state = None
            try:
                await self._lane.run(lambda: self._state_file.write(state))
            except (OSError, StuckError, ConfigError) as error:
                if isinstance(error, ConfigError) and str(error) == self._failure:
                    # The same process holds the claim at two attempts: it is not one that starts and ends at once.
                    self._post_event(Stop(error.exit_code, "another agent has claimed the session"))
                    return False
                self._log_failure(error)
                await asyncio.sleep(RETRY_S)
                self._requeue(state)
            else:
                self._failure = ""
        return True

    def _requeue(self, state: Mapping[str, Any]) -> None:
        if self._pending_state is None:  # no newer state meanwhile
            self._pending_state = state

    def _log_failure(self, error: Exception) -> None:
        if not self._failure:
            log.error(
                "state file cannot be written",
                path=self.path,
                reason=getattr(error, "strerror", None) or error,
                resolution="remove the cause; until then sidecars see an old role whose deadline has passed",
            )
        self._failure = str(error)

    # -- the rest -------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """The status line in ``systemctl status``."""
        published = self._member.published
        epoch = "-" if published.epoch is None else published.epoch
        group = self._member.settings.group
        doing = self._member.session.sentence
        return f"{published.role} of {group} epoch={epoch} ({published.reason}); {doing}"


def _to_json(value: Any) -> Any:
    match value:
        case datetime():
            return format_date_time(value)
        case tuple():
            return [_to_json(part) for part in value]
        case PreviousTenure():
            return {"epoch": value.epoch, "instance": value.instance}
        case _:
            return value


def refused_times(source: Progress | None, future_refused: int) -> dict[str, int]:
    """The number of refused data-processed times, by reason."""
    counts = dict(source.refused) if source is not None else dict.fromkeys(map(str, Reason), 0)
    counts[Reason.FUTURE] += future_refused
    return counts


def take_snapshot(member: Member, **rest: Any) -> Snapshot:
    """Take a snapshot for probes and metrics."""
    session = member.session
    return Snapshot(
        now=member.clock.boottime(),
        wall=member.clock.wall(),
        group=member.settings.group,
        session_id=member.session_id,
        timing=session.timing,
        phase=session.phase,
        session_role=session.role,
        demoting=session.guard_deadlines is not None and session.role is Role.SECONDARY,
        epoch=session.newest_epoch,
        renew_by=session.renew_by,
        lease_until=session.lease_until,
        wake_at=session.wake_at,
        data=member.progress,
        group_data=member.requests.group_data,
        endpoint=member.requests.endpoint,
        endpoints=member.settings.endpoint,
        notifications_dropped=member.role_runner.notifier.dropped,
        notifications_failed=member.role_runner.notifier.failed,
        stats=member.stats,
        **rest,
    )
