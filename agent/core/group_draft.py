"""A draft of a group's next state, and the steps that several inputs share.

Owns how a tenure begins and ends, the pending session, quiet times and expiry. core/group.py owns which steps
each input takes; core/group_choice.py owns which session is the better choice.
A draft is discarded if the input is refused, so a step may change it before a later one raises.
"""

from dataclasses import replace
from datetime import datetime

from agent.core import group_choice as choice
from agent.core import group_failsafe as failsafe
from agent.core import group_retention as retention
from agent.core.group_state import (
    GroupState,
    Policy,
    Removal,
    RemovalCause,
    last_data_of,
    last_heard,
    role_of,
)
from agent.core.roles import check_transition
from agent.errors import Conflict
from agent.model import HistoryEntry, Instant, Role, RoleOverride, SessionConfig, Tenure, TenureEnd

CONFIRM_SHARE = 0.6
"""Share of L in which a candidate has to confirm. A v1 client sends a heartbeat every L/2 (docs/api.md, "What v1
clients do, and what they get"); the rest allows for a late one."""

RESUMED = ", resumed"
"""Appended to the reason why a tenure began, in status, log and history."""

RESTORED = "the store was restored from a copy"

MAX_ADDITIONAL_BYTES = 256 * 1024
"""Bound for the AdditionalData of a group and its sessions together: it is part of the record, which each change
of a role writes and syncs as a whole."""


def wake_at(state: GroupState, now: Instant, policy: Policy) -> float:
    """When the next change is due without an input: CLOCK_BOOTTIME seconds, or infinity."""
    record, live = state.record, state.live
    due = [
        now.mono + max(0.0, (session.override_until - now.wall).total_seconds())
        for session in record.sessions.values()
        if session.override_until is not None
    ]
    if record.quiet:
        due.append(live.quiet_until)
    if record.holder is not None:
        due.append(live.lease_until)
        hold_until = live.held_since + policy.minimum_hold_s
        if hold_until > now.mono and len(record.sessions) > 1:
            due.append(hold_until)
    if record.pending is not None:
        due += [live.confirm_by, live.contacts[record.pending].heard_at + record.config.lease_s]
    due.append(retention.next_due_at(state, now, policy))
    due += [c.hold_off_until for c in live.contacts.values() if c.hold_off_until > now.mono]
    return min(due, default=float("inf"))


class Draft:
    """The next state of a group, with its history.

    ``record`` stays the same object while nothing durable has changed.
    """

    def __init__(self, state: GroupState, now: Instant, policy: Policy) -> None:
        self.record = state.record
        self.live = state.live
        self.now = now
        self.policy = policy
        self.history: dict[int, HistoryEntry] = {}
        self.removals: tuple[Removal, ...] = ()

    @property
    def state(self) -> GroupState:
        """The state so far."""
        return GroupState(self.record, self.live)

    @property
    def lease_s(self) -> float:
        """L in seconds."""
        return self.record.config.lease_s

    def holds(self, session_id: str, instance: str | None) -> bool:
        """Whether this process of this session holds the current tenure."""
        holder = self.record.holder
        return holder is not None and (holder.session_id, holder.instance) == (session_id, instance)

    # -- changes of one part ------------------------------------------------------------------

    def change_status(self, **changes: object) -> None:
        """Change fields of the record that a status read shows; this makes a new revision."""
        self.record = replace(self.record, revision=self.record.revision + 1, **changes)  # type: ignore[arg-type]

    def change_session(self, session_id: str, **changes: object) -> None:
        """Change the durable part of a session."""
        session = replace(self.record.sessions[session_id], **changes)  # type: ignore[arg-type]
        self.record = replace(self.record, sessions={**self.record.sessions, session_id: session})

    def change_contact(self, session_id: str, **changes: object) -> None:
        """Change the part of a session that is not durable."""
        contact = replace(self.live.contacts[session_id], **changes)  # type: ignore[arg-type]
        self.live = replace(self.live, contacts={**self.live.contacts, session_id: contact})

    def remove_session(self, session_id: str) -> None:
        """Remove both parts of a session. Its tenure, if it has one, goes on."""
        sessions, contacts = dict(self.record.sessions), dict(self.live.contacts)
        del sessions[session_id], contacts[session_id]
        self.record = replace(self.record, sessions=sessions)
        self.live = replace(self.live, contacts=contacts)

    # -- dead sessions ------------------------------------------------------------------------

    def apply_retention(self) -> None:
        """Record since when dead sessions are silent, and remove those that are dead for too long (R20)."""
        recorded_s = retention.recorded_after_s(self.lease_s, self.policy)
        for session_id, session in self.record.sessions.items():
            heard_at = self.live.contacts[session_id].heard_at
            if session.silent_since is None and heard_at + recorded_s <= self.now.mono:
                heard = last_heard(self.state, session_id, self.now)
                self.change_session(session_id, silent_since=heard)
            if self.record.sessions[session_id].silent_since is None:
                continue
            removal_at = retention.removal_at(self.state, session_id, self.now, self.policy)
            if removal_at <= self.now.mono:
                self._remove_dead(session_id, RemovalCause.RETENTION)

    def make_room(self) -> bool:
        """Remove the session that has been dead for longest; return False if none may be removed."""
        session_id = retention.longest_dead(self.state, self.now)
        if session_id is not None:
            self._remove_dead(session_id, RemovalCause.FULL)
        return session_id is not None

    def refuse_too_much_data(self, config: SessionConfig) -> None:
        """Bound the AdditionalData of a group: each change of the group writes all of it."""
        record = self.record
        given = [config.additional, record.config.additional]
        given += [session.config.additional for session in record.sessions.values()]
        total = sum(len(text.encode()) for text in given if text is not None)
        if config.additional is not None and total > MAX_ADDITIONAL_BYTES:
            raise Conflict(
                f'The AdditionalData of group "{record.config.id}" and its client sessions would have {total}'
                f" bytes: it must be at most {MAX_ADDITIONAL_BYTES}.",
                "Give this session less AdditionalData, or delete sessions that are not used any more.",
            )

    def _remove_dead(self, session_id: str, cause: RemovalCause) -> None:
        silent_s = retention.silence_s(self.state, session_id, self.now)
        self.removals += (Removal(session_id, silent_s, cause),)
        self.remove_session(session_id)

    # -- expiry -------------------------------------------------------------------------------

    def apply_due_changes(self) -> None:
        """Apply every change that is due at ``now``."""
        self._expire_overrides_and_hold_offs()
        if self.record.quiet and self.now.mono >= self.live.quiet_until:
            self._end_quiet_time()
        if self.record.holder is not None and self.now.mono >= self.live.lease_until:
            self.end_tenure(
                self.record.holder, TenureEnd.EXPIRED, "its lease ended without a heartbeat"
            )
        pending = self.record.pending
        if pending is not None and not self._may_stay_pending(pending):
            self.set_pending(None)
        self._choose()

    def _end_quiet_time(self) -> None:
        """End the quiet time: unknown leases have ended. With failsafe the group stays restricted (R34)."""
        self.record = replace(self.record, quiet=False)
        if self.record.holder is None and not failsafe.is_restricted(self.record):
            self.record = failsafe.clear(self.record)

    def _expire_overrides_and_hold_offs(self) -> None:
        """End the overrides and hold-offs that have expired."""
        for session_id, session in self.record.sessions.items():
            if session.override_until is not None and session.override_until <= self.now.wall:
                self.change_session(session_id, override=RoleOverride.OFF, override_until=None)
            if (
                session.hold_off is not None
                and self.live.contacts[session_id].hold_off_until <= self.now.mono
            ):
                self.change_session(session_id, hold_off=None)

    def _may_stay_pending(self, session_id: str) -> bool:
        if not choice.is_eligible(self.state, session_id, self.now):
            return False
        if self.now.mono >= self.live.confirm_by:
            self.change_contact(session_id, passed_over=True)
            return False
        return True

    def _choose(self) -> None:
        """Choose a candidate for a vacant role, or to replace a worse holder (R16, R17)."""
        state, holder = self.state, self.record.holder
        if holder is not None and not holder.revoked:
            if failsafe.has_to_accept(self.record):
                return
            challenger = choice.best_candidate(state, self.now, exclude=holder.session_id)
            if challenger is not None and choice.should_replace(
                state, challenger, holder.session_id, self.now, self.policy
            ):
                self.revoke(holder)
                self.set_pending(challenger)
        elif self.record.pending is None:
            chosen = choice.best_candidate(
                state, self.now, exclude=holder.session_id if holder is not None else None
            )
            if chosen is not None:
                self.set_pending(chosen)

    # -- tenures ------------------------------------------------------------------------------

    def confirm(self, session_id: str, instance: str | None) -> None:
        """Begin the candidate's tenure, unless a better session would replace it at once."""
        better = choice.best_candidate(self.state, self.now, exclude=session_id)
        if better is not None and choice.outranks(self.state, better, session_id, self.policy):
            self.set_pending(better)
        else:
            self._begin_tenure(session_id, instance)

    def _begin_tenure(self, session_id: str, instance: str | None) -> None:
        check_transition(role_of(self.record, session_id), Role.PRIMARY)
        why = "overridden" if choice.override_rank(self.state, session_id) else "chosen"
        self.record = failsafe.begin_tenure(self.record, session_id)
        epoch = self.record.epoch
        tenure = Tenure(session_id, epoch, self.now.wall, why, instance=instance)
        self.change_status(holder=tenure, pending=None)
        # The answer carries the previous tenure's progress, not this heartbeat's, which may be of an
        # older tenure (R18). The new tenure's own progress begins with the next heartbeat.
        self.live = replace(
            self.live,
            lease_until=self.now.mono + self.lease_s,
            held_since=self.now.mono,
            answers_reach_holder=False,
            last_data=None,
        )
        self.history[epoch] = HistoryEntry(epoch, session_id, self.now.wall, why)

    def extend(self) -> None:
        """Renew the holder's lease: it lasts one full L from now."""
        self.live = replace(self.live, lease_until=self.now.mono + self.lease_s)

    def revoke(self, holder: Tenure) -> None:
        """Answer the holder Secondary from now on, and stop renewing its lease."""
        self.record = replace(self.record, holder=replace(holder, revoked=True))

    def resume(self, ended: Tenure) -> None:
        """Continue a tenure whose lease had ended: its holder was active by failsafe all the time (R33)."""
        resumed = replace(ended, why=f"{ended.why.removesuffix(RESUMED)}{RESUMED}")
        self.change_status(holder=resumed, pending=None, ended=None, ended_at=None)
        self.live = replace(
            self.live,
            lease_until=self.now.mono + self.lease_s,
            held_since=self.now.mono,
            answers_reach_holder=True,
            last_data=self.record.last_data,
        )
        self.history[ended.epoch] = HistoryEntry(
            ended.epoch, ended.session_id, ended.since, resumed.why
        )

    def end_tenure(self, holder: Tenure, end: TenureEnd, why: str) -> None:
        """End the current tenure, which is ``holder``."""
        check_transition(Role.PRIMARY, Role.SECONDARY)
        released = end in {TenureEnd.RELEASED, TenureEnd.REFUSED}
        if released:
            held = end is TenureEnd.RELEASED
            self.record = failsafe.end_by_release(self.record, held=held)
        elif end is not TenureEnd.DATA_LOSS:
            self.record = failsafe.end_by_expiry(self.record)
        if end is not TenureEnd.REFUSED:  # else it never was primary
            self.record = replace(
                self.record, previous=holder.session_id, last_data=last_data_of(self.state)
            )
        self.history[holder.epoch] = HistoryEntry(
            holder.epoch, holder.session_id, holder.since, holder.why, self.now.wall, why, end
        )
        self.change_status(
            holder=None,
            ended=None if released else holder,
            ended_at=None if released else self.now.wall,
        )
        self.live = replace(self.live, last_data=None)
        self._set_confirmation_deadline()

    def learn_epoch(self, seen: int) -> None:
        """Adopt a newer epoch that a client has seen: the record is older than the group.

        A lease that the record does not have may exist, so no tenure begins for a full L; with failsafe, none
        begins before an operator lifts the restriction (R34).
        """
        self._continue_after_data_loss(seen, "its epoch is older than one that a client has seen")
        if failsafe.uses_failsafe(self.record):
            self.record = failsafe.distrust(self.record)

    def declare_restored(self, epoch: int) -> None:
        """Restrict a record that is an older copy: nobody may be promoted until an operator's lift (R34)."""
        self._continue_after_data_loss(epoch, RESTORED)
        self.record = failsafe.distrust(self.record)
        self.record_event(epoch, RESTORED, TenureEnd.RESTORED)

    def record_event(self, epoch: int, why: str, end: TenureEnd) -> None:
        """Add an entry to the history that is not a tenure: it has no session, and an epoch of its own."""
        self.history[epoch] = HistoryEntry(epoch, "", self.now.wall, why, self.now.wall, why, end)

    def _continue_after_data_loss(self, epoch: int, why: str) -> None:
        """Continue with an epoch newer than the record's, after a quiet time of one full L."""
        self.live = replace(self.live, quiet_until=self.now.mono + self.lease_s)
        if self.record.holder is not None:
            self.end_tenure(self.record.holder, TenureEnd.DATA_LOSS, why)
        self.change_status(epoch=epoch, quiet=True)
        self._set_confirmation_deadline()

    def record_progress(self, last_data: datetime | None) -> None:
        """Record the holder's data-processed time, which never goes back within a tenure (R18)."""
        known = self.live.last_data
        if last_data is not None and (known is None or last_data > known):
            self.live = replace(self.live, last_data=last_data)

    # -- the pending session ------------------------------------------------------------------

    def set_pending(self, session_id: str | None) -> None:
        """Make this session the candidate, in place of the previous one."""
        if self.record.pending is not None:
            check_transition(Role.PENDING_PRIMARY, Role.SECONDARY)
        if session_id is not None:
            check_transition(role_of(self.record, session_id), Role.PENDING_PRIMARY)
        self.change_status(pending=session_id)
        self._set_confirmation_deadline()

    def _set_confirmation_deadline(self) -> None:
        """Set the deadline to confirm: it counts from the end of the last lease and of the quiet time."""
        earliest = max(self.now.mono, self.live.quiet_until)
        if self.record.holder is not None:
            earliest = max(earliest, self.live.lease_until)
        self.live = replace(self.live, confirm_by=earliest + CONFIRM_SHARE * self.lease_s)
