"""The state that the parts of one agent share: settings, session, published role.

Each field has one writer, named below; the other parts read it, or post an event.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from agent.core.options import FailsafeOptions
from agent.core.session import Options, Session
from agent.daemon.payload import EVENTS
from agent.daemon.requests import Requests
from agent.daemon.role_runner import RoleRunner
from agent.daemon.telemetry import Stats
from agent.model import Role
from agent.ops.clock import Clock
from agent.ops.sd_notify import Notify
from agent.schema.settings import AgentSettings

if TYPE_CHECKING:
    from agent.drivers.mqtt import Announcer


@dataclass(frozen=True, slots=True)
class Published:
    """The role that this member published last."""

    role: Role
    epoch: int | None
    reason: str
    since: datetime


@dataclass(slots=True)
class Member:
    """One agent of a group.

    Attributes:
        settings: those in force. Written by ``Reload``.
        session: stepped by ``Daemon`` only.
        published: written by ``EffectRunner``.
        progress: the last time up to which data was processed in this tenure. Written by ``HostHealth``.
        instance: identifies this process for the coordinator, and the processes of its tenures.
    """

    settings: AgentSettings
    session_id: str
    instance: str
    clock: Clock
    stats: Stats
    notify: Notify
    session: Session
    role_runner: RoleRunner
    requests: Requests
    published: Published
    progress: datetime | None = None


def build_options(
    settings: AgentSettings,
    session_id: str,
    role_runner: RoleRunner,
    jitter: float,
    store_id: str | None,
) -> Options:
    """Build the options of a session from its settings.

    Args:
        settings: those in force.
        session_id: its own id.
        role_runner: names the roles that have a hook or a workload.
        jitter: from 0 to 1, drawn once for this process.
        store_id: the store that the session has joined, if any.
    """
    url = settings.member_url
    return Options(
        session_id=session_id,
        hooks=role_runner.roles,
        hook_limit_s=settings.hook_limit,
        hook_limits_s={
            role: settings.hook_limit_of(EVENTS[role])
            for role in (Role.PENDING_PRIMARY, Role.PRIMARY)
        },
        cooldown_s=settings.cooldown,
        cooldown_limit_s=settings.cooldown_limit,
        jitter=jitter,
        store_id=store_id,
        failsafe=None if url is None else FailsafeOptions(url),
    )


def build_announcer(member: Member) -> "Announcer":
    """Build the announcer of a member whose settings have an MQTT broker.

    Raises:
        ConfigError: a password or certificate cannot be used.
    """
    from agent.drivers import mqtt  # noqa: PLC0415 - needs the extra

    assert member.settings.mqtt is not None  # noqa: S101 - the caller has checked it
    return mqtt.Announcer(
        member.settings.mqtt,
        member.settings.group,
        member.session_id,
        clock=member.clock,
        first=member.published,
    )
