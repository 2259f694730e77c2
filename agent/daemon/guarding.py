"""Keep the last resorts informed: the guard (R12) and the kernel's watchdog device (R4).

Owns when they are armed and when they are called off: only after a demotion that is done. Any other end
of the agent leaves them armed, and they act in its place.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.core.effects import HookFacts
from agent.daemon import handback
from agent.daemon.member import Member
from agent.drivers.guardian import Arming, Guardian, GuardLogContext
from agent.model import Role
from agent.ops import logs
from agent.ops.watchdog import WatchdogDevice

SHORTEST_GUARD_ANSWER_S = 0.5
"""How long the guard may take to answer on the busiest host; above that it is a margin."""

BY_GUARD = "demoted by the guard"
"""The reason in the state file that the guard writes."""


class Guarding:
    """The guard and the watchdog device of one agent.

    Args:
        member: read only.
        state: the content of the state file at this moment.
        state_path: where it is.
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
        self._armed = self._frozen = False
        self._fenced_by: float | None = None
        self._handback_store: str | None = None

    @property
    def enabled(self) -> bool:
        """Whether there is a guard."""
        return self._guardian is not None

    @property
    def ready(self) -> bool:
        """Whether there is a guard that answers."""
        return self._guardian is not None and self._guardian.ready

    @property
    def owed(self) -> bool:
        """Whether a demotion is still to be done: something is promoted, or being demoted."""
        return self._armed

    def freeze(self) -> None:
        """Leave both as they are from now on: the session can no longer be trusted."""
        self._frozen = True

    async def start(self, changed: Callable[[str | None], None], claim: int | None) -> None:
        """Start what the settings ask for.

        Args:
            changed: called with what is wrong with the guard, or None when it answers again.
            claim: the descriptor of the state file's lock, for the guard to keep open.

        Raises:
            ConfigError: the guard cannot be started, or the watchdog device not be used.
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
        """Notice a guard that does not answer, and keep the watchdog device from firing."""
        if self._guardian is not None:
            self._guardian.check()
        if self._watchdog is not None:
            self._watchdog.pet()

    async def set_promotion(self, facts: HookFacts) -> None:
        """Tell the guard the demotion hook of the tenure whose promotion is about to start."""
        if self._guardian is not None:
            demote_s = self._member.session.timing.demote_s
            self._guardian.set_hook(await self._member.runs.guard_hook(facts, demote_s))

    def fencing(self, limit_s: float) -> None:
        """Leave the agent the time for its fence command and its exit: seconds from now."""
        self._fenced_by = self._member.clock.boottime() + limit_s
        self.update()

    def update(self) -> None:
        """Tell both the newest deadline, and the guard what it would have to kill (R12)."""
        if self._frozen:
            return
        due = self._member.session.guard_by
        self._armed = due is not None
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
        self._send_handback()
        guardian.arm(None if due is None else self._arming(*due))

    def _arming(self, hook_at: float, kill_at: float) -> Arming:
        runs = self._member.runs
        workload = runs.workload
        state = dict(self._state()) | {
            "role": Role.SECONDARY.value,
            "reason": BY_GUARD,
            "active_until_boottime_s": None,
        }
        return Arming(
            hook_at=hook_at,
            kill_at=kill_at,
            running=runs.running_groups,
            groups=runs.tenure_groups,
            roots=runs.tenure_roots,
            mark=runs.cookie,
            epoch=self._member.session.tenure,
            agent_at=self._fenced_by,
            workload=workload.pgid if workload is not None else None,
            cgroup=str(runs.cgroup) if runs.cgroup is not None else None,
            state=(str(self._state_path), json.dumps(state)),
        )

    def _send_handback(self) -> None:
        """Give the guard what it needs to release the role, once the coordinator's store is known."""
        store_id = self._member.session.store_id
        if self._guardian is None or store_id == self._handback_store:
            return
        self._handback_store = store_id
        text = None
        if store_id is not None:
            member = self._member
            text = handback.document(member.settings, member.session_id, member.instance, store_id)
        self._guardian.set_handback(text)

    def _update_watchdog(self, *, armed: bool) -> None:
        if self._watchdog is None or armed is self._watchdog_armed:
            return
        self._watchdog_armed = armed
        if armed:
            self._watchdog.arm(self._member.session.timing.lease_s)
        else:
            self._watchdog.disarm()

    async def stop(self) -> None:
        """Call both off if nothing is owed; else leave them armed, for this process is about to end."""
        if self.owed:
            if self._guardian is not None:
                self._guardian.abandon()
            return
        self._update_watchdog(armed=False)
        if self._guardian is not None:
            await self._guardian.call_off()
