"""Build the payload of every hook of one agent: facts of the event, and common ones (docs/hooks.md)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from agent.core.effects import HookFacts
from agent.drivers.guardian.messages import GuardHook
from agent.drivers.hooks.payload import build_payload, payload_environment
from agent.drivers.hooks.spec import CommandStep, HookSpec, WebhookStep, shown
from agent.errors import ConfigError
from agent.model import Role
from agent.ops import process
from agent.ops.clock import Clock
from agent.ops.logs import Log

EVENTS: Mapping[Role, str] = {
    Role.PRIMARY: "primary",
    Role.PENDING_PRIMARY: "pending_primary",
    Role.SECONDARY: "secondary",
}

log = Log(__name__)


@dataclass(slots=True, eq=False)
class Payloads:
    """Builds the hook payloads of one agent.

    Attributes:
        group: id of the group.
        session_id: of this member.
        state_file: path of its state file.
        clock: for the time of the event.
        probe_url: of the local HTTP server; set once it listens.
    """

    group: str
    session_id: str
    state_file: Path
    clock: Clock
    probe_url: str | None = None

    def build_role_payload(self, facts: HookFacts, last_data: datetime | None) -> dict[str, Any]:
        """Build the payload of a role hook."""
        return self.build(
            event=EVENTS[facts.role],
            old_role=facts.old_role,
            new_role=facts.role,
            epoch=facts.epoch,
            reason=facts.reason,
            last_data=last_data,
            deadline_s=facts.limit_s,
            previous_primary=facts.previous_primary,
        )

    def build(self, **facts: Any) -> dict[str, Any]:
        """Build a payload: the fields of the event plus the common ones."""
        return build_payload(
            **facts,
            group=self.group,
            session=self.session_id,
            state_file=str(self.state_file),
            probe_url=self.probe_url,
            now=self.clock.wall(),
        )

    def build_guard_hook(self, spec: HookSpec | None, promotion: HookFacts) -> GuardHook:
        """Build the demotion hook that the guard runs for the tenure of a promotion. May block.

        Args:
            spec: the demotion hook, if there is one.
            promotion: the facts of the promotion. The guard replaces the deadline in them.
        """
        if spec is None:
            return GuardHook([], {})
        try:
            steps = spec.steps()
        except ConfigError as error:
            log.error("the guard has no demotion hook", reason=error)  # noqa: TRY400 - no traceback needed
            return GuardHook([], {}, complete=False)
        left_out = any(isinstance(step, WebhookStep) for step in steps)
        if left_out:
            log.warning(
                "the guard cannot call webhooks", hook=spec.name, left_out=shown(spec.value)
            )
        reason = "the guard acts for the agent"
        facts = replace(promotion, role=Role.SECONDARY, old_role=Role.PRIMARY, reason=reason)
        payload = self.build_role_payload(facts, promotion.last_data)
        context, run_as = spec.context, spec.context.run_as
        environment = {**context.variables(), **payload_environment(payload)}
        return GuardHook(
            [step.argv for step in steps if isinstance(step, CommandStep)],
            {**environment, **process.mark(process.NO_TENURE)},
            json.dumps(payload) + "\n",
            context.directory,
            run_as.uid if run_as else None,
            run_as.gid if run_as else None,
            run_as.groups if run_as else (),
            complete=not left_out,
        )
