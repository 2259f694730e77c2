"""Arm and disarm the guard (R12) and the kernel's watchdog device (R4).

Owns when they are armed and disarmed: both are disarmed only after a completed demotion. If the agent ends in any
other way they stay armed, and act in its place.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.core.effects import HookFacts
from agent.daemon import release_helper
from agent.daemon.member import Member
from agent.drivers.guardian.messages import Arming, GuardLogContext
from agent.drivers.guardian.supervisor import Guardian
from agent.model import Role
from agent.ops import logs
from agent.ops.blocking import StuckError
from agent.ops.watchdog import WatchdogDevice

SHORTEST_GUARD_ANSWER_S = 0.5
"""Lower bound of the guard's answer timeout, for a busy host; otherwise the timeout is a margin."""

HOOK_SHARE = 1 / 3
"""The guard's share of the time for a demotion, if the agent freezes before it has started the demotion hook."""

BY_GUARD = "demoted by the guard"
"""The reason in a state file that the guard has written."""


class GuardControl:
    """The guard and the watchdog device of one agent.

    Args:
        member: read only.
        state: returns the content of the state file at this moment, but for failsafe; the same mapping as
            long as nothing in it has changed.
        state_path: path of the state file.

    Attributes:
        frozen: leave guard and watchdog as they are, since a step of the session has failed.
    """

    def __init__(
        self, member: Member, state: Callable[[], Mapping[str, Any]], state_path: Path
    ) -> None:
        self._member = member
        self._state = state
        self._state_path = state_path
        self._guardian: Guardian | None = None
        self._watchdog: WatchdogDevice | None = None
        self._watchdog_armed = False
        self.frozen = False
        self._due: tuple[float, float] | None = None
        self._fence_by: float | None = None
        self._document_store: str | None = None
        self._own_state: Mapping[str, Any] | None = None
        self._state_text = ""
        self._act_by = float("-inf"), float("-inf")
        """The deadline of the running demotion, and when the guard acts if the hook has not started by then."""

    @property
    def enabled(self) -> bool:
        """Whether the settings ask for a guard."""
        return self._guardian is not None

    @property
    def ready(self) -> bool:
        """Whether a guard answers."""
        return self._guardian is not None and self._guardian.ready

    @property
    def demotion_is_owed(self) -> bool:
        """Whether a demotion has yet to succeed: something is promoted, or being demoted."""
        return self._due is not None

    @property
    def kill_at(self) -> float:
        """The deadline of the demotion that is owed: CLOCK_BOOTTIME seconds; infinity if none is."""
        return float("inf") if self._due is None else self._due[1]

    async def start(self, changed: Callable[[str | None], None], claim: int | None) -> None:
        """Start the guard and open the watchdog device, as configured.

        Args:
            changed: called with the fault of the guard, or None when it answers again.
            claim: the descriptor of the state file's lock, for the guard to keep open.

        Raises:
            ConfigError: the guard cannot be started, or the watchdog device cannot be used.
        """
        settings = self._member.settings
        if settings.watchdog_device is not None:
            watchdog = WatchdogDevice(settings.watchdog_device)
            watchdog.check()
            self._watchdog = watchdog
        if settings.guard:
            limit_s = max(SHORTEST_GUARD_ANSWER_S, self._member.session.timing.margin_s)
            self._guardian = Guardian(self._member.clock, changed, limit_s=limit_s, claim=claim)
            await self._guardian.start()

    def check(self) -> None:
        """Detect a guard that does not answer, and keep the watchdog device from firing."""
        if self._guardian is not None:
            self._guardian.check()
        if self._watchdog is not None:
            self._watchdog.pet()

    async def send_demotion_hook(self, facts: HookFacts) -> bool:
        """Send the guard the demotion hook of the tenure that begins; return whether it could be read."""
        if self._guardian is not None:
            try:
                hook = await self._member.role_runner.build_guard_hook(facts)
            except (TimeoutError, StuckError):
                return False  # the promotion checks the hook, too, and fails with the reason
            self._guardian.set_hook(hook)
        return True

    def allow_fencing(self, limit_s: float) -> None:
        """Have the guard wait for the fence command and the exit of the agent: seconds from now."""
        self._fence_by = self._member.clock.boottime() + limit_s
        self.update()

    def update(self) -> None:
        """Send guard and watchdog the newest deadline, and the guard the processes to kill (R12)."""
        if self.frozen:
            return
        self._due = due = self._member.session.guard_deadlines
        self._update_watchdog(armed=due is not None)
        guardian = self._guardian
        if guardian is None:
            return
        member, published = self._member, self._member.published
        guardian.set_log(
            GuardLogContext(
                logs.LEVELS[member.settings.log_level],
                member.settings.log_format,
                member.settings.group,
                member.session_id,
                published.role.value,
                published.epoch,
            )
        )
        self._send_release_document()
        guardian.arm(None if due is None else self._arming(*due))

    def _arming(self, hook_at: float, kill_at: float) -> Arming:
        role_runner = self._member.role_runner
        workload = role_runner.workload
        if hook_at == float("inf"):
            if self._act_by[0] != kill_at:  # the demotion has just begun
                left_s = kill_at - self._member.clock.boottime()
                self._act_by = kill_at, kill_at - HOOK_SHARE * left_s
            if not role_runner.demotion_hook_started and self._fence_by is None:
                hook_at = self._act_by[1]
        if (state := self._state()) is not self._own_state:
            self._own_state = state
            demoted = {
                "role": Role.SECONDARY.value,
                "reason": BY_GUARD,
                "active_until_boottime_s": None,
            }
            self._state_text = json.dumps({**state, **demoted})
        return Arming(
            hook_at=hook_at,
            kill_at=kill_at,
            running=role_runner.running_groups,
            groups=role_runner.tenure_groups,
            roots=role_runner.tenure_roots,
            mark=role_runner.process_mark,
            epoch=self._member.session.tenure,
            agent_at=self._fence_by,
            workload=workload.pgid if workload is not None else None,
            cgroup=str(role_runner.cgroup) if role_runner.cgroup is not None else None,
            state=(str(self._state_path), self._state_text),
        )

    def _send_release_document(self) -> None:
        """Send the guard the document for releasing the role, once the coordinator's store is known."""
        store_id = self._member.session.store_id
        if self._guardian is None or store_id == self._document_store:
            return
        self._document_store = store_id
        text = None
        if store_id is not None:
            member = self._member
            text = release_helper.format_document(
                member.settings, member.session_id, member.instance, store_id
            )
        self._guardian.set_release_document(text)

    def _update_watchdog(self, *, armed: bool) -> None:
        if self._watchdog is None or armed is self._watchdog_armed:
            return
        self._watchdog_armed = armed
        if armed:
            self._watchdog.arm(self._member.session.timing.lease_s)
        else:
            self._watchdog.disarm()

    async def stop(self) -> None:
        """Disarm both. If a demotion is owed they stay armed, and act when this process has ended."""
        if self.demotion_is_owed:
            if self._guardian is not None:
                self._guardian.abandon()
            return
        self._update_watchdog(armed=False)
        if self._guardian is not None:
            await self._guardian.call_off()
