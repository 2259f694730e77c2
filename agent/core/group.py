"""The coordinator's side of a group: one pure function, (state, input, now) -> decision (R13).

Rules of this file:

- ``decide`` changes nothing that it is given. It returns the next state, the answer, the history to
  keep and the next moment at which something will be due. Same arguments, same result.
- An input that cannot be obeyed raises a RequestRefused, and nothing has happened.
- Whoever calls it must make ``decision.state.record`` and ``decision.history`` durable *before* it
  hands the answer to anybody, whenever the record is not the one it put in.
- ``state.live`` is what a restart forgets. After one, ``awaken`` gives every session one full L
  (R14): a lease is made longer by trouble, never shorter.
- At most one tenure exists at a time, and only a session whose own heartbeat is being answered
  receives one, under a new epoch (R15, R16).
"""

from dataclasses import replace
from datetime import datetime

from agent.core.group_state import (
    AddSession,
    Beat,
    Contact,
    Decision,
    GroupState,
    Input,
    KeepProgress,
    Policy,
    ReleaseRole,
    RemoveGroup,
    RemoveSession,
    SetAccess,
    SetOverride,
    Tick,
    alive,
    last_data_of,
    progress_is_unkept,
    role_of,
    session_of,
)
from agent.core.roles import check_transition
from agent.errors import Conflict, TooSoon
from agent.model import (
    GroupConfig,
    HeartbeatAnswer,
    HistoryEntry,
    Instant,
    Role,
    RoleOverride,
    SessionConfig,
    SessionRecord,
    Tenure,
)

CONFIRM_SHARE = 0.6
"""Share of L in which a chosen session has to confirm. A v1 client beats every L/2 (api.md, B.2);
the rest is room for a late one."""

INTERVAL_SHARE = 0.05
LONGEST_INTERVAL_S = 1.0
"""Heartbeats closer than L/20, at most 1 s, are refused (api.md, B.4)."""

INTERVAL_TOLERANCE = 0.9
"""A v1 client's second heartbeat comes 1 s after its first by a timer that may be early."""


def _unheard(contact: Contact, beat: Beat) -> int | None:
    """What a session still has to see, after a heartbeat that says what it has seen."""
    wanted = contact.has_to_see
    if wanted is None or beat.seen_epoch is None or beat.seen_epoch >= wanted:
        return None
    return wanted


def minimum_interval_s(lease_s: float) -> float:
    """How far apart two heartbeats of one session should be, in seconds (api.md, B.4)."""
    return min(lease_s * INTERVAL_SHARE, LONGEST_INTERVAL_S)


def decide(state: GroupState, what: Input, now: Instant, policy: Policy) -> Decision:
    """What one input does to a group.

    Args:
        state: the group as it is; not changed.
        what: what came, or Tick.
        now: the moment of the decision. A lease that it grants runs from here, which is never
            before the request was received.
        policy: the coordinator's settings.

    Raises:
        RequestRefused: the input cannot be obeyed, and nothing has happened.
    """
    work = _Work(state, now, policy)
    work.settle()
    answer = work.apply(what)
    work.settle()
    if isinstance(what, Beat):
        answer = work.answer_beat(what.session_id)
    after = GroupState(work.record, work.live)
    return Decision(after, answer, tuple(work.history.values()), wake_at(after, now, policy))


def wake_at(state: GroupState, now: Instant, policy: Policy) -> float:
    """When something is due next if nothing comes: CLOCK_BOOTTIME seconds, or infinity."""
    record, live = state.record, state.live
    lease_s = record.config.lease_s
    due = [
        now.mono + max(0.0, (session.override_until - now.wall).total_seconds())
        for session in record.sessions.values()
        if session.override_until is not None
    ]
    if record.holder is not None:
        due.append(live.lease_until)
        hold_until = live.held_since + policy.minimum_hold_s
        if hold_until > now.mono and len(record.sessions) > 1:
            due.append(hold_until)
    if record.pending is not None:
        due += [live.confirm_by, live.contacts[record.pending].heard_at + lease_s]
    due += [c.hold_off_until for c in live.contacts.values() if c.hold_off_until > now.mono]
    return min(due, default=float("inf"))


class _Work:
    """One decision in the making. ``record`` stays the very object it was if nothing durable changed."""

    def __init__(self, state: GroupState, now: Instant, policy: Policy) -> None:
        self.record = state.record
        self.live = state.live
        self.now = now
        self.policy = policy
        self.history: dict[int, HistoryEntry] = {}

    # -- what comes in ------------------------------------------------------------------------

    def apply(self, what: Input) -> HeartbeatAnswer | bool | None:
        match what:
            case Beat():
                self._beat(what)
            case AddSession():
                return self._add(what.config)
            case RemoveSession():
                self._remove(what.session_id)
            case SetOverride():
                self._override(what)
            case ReleaseRole():
                self._release(what)
            case SetAccess():
                self.record = replace(self.record, acl=what.acl)
            case RemoveGroup():
                self._refuse_removal_while_alive()
            case KeepProgress():
                self._keep_progress()
            case Tick():
                pass
        return None

    def _beat(self, beat: Beat) -> None:
        session_of(self.record, beat.session_id)
        contact = self.live.contacts[beat.session_id]
        self._refuse_haste(beat, contact)
        self.live = replace(
            self.live,
            contacts={
                **self.live.contacts,
                beat.session_id: Contact(  # each heartbeat comes by here: replace() costs twice this
                    heard_at=self.now.mono,
                    posted_at=self.now,
                    score=beat.score,
                    last_data=beat.last_data if beat.last_data is not None else contact.last_data,
                    instance=beat.instance,
                    told_revision=contact.told_revision,
                    hold_off_until=contact.hold_off_until,
                    has_to_see=_unheard(contact, beat),
                ),
            },
        )
        if beat.seen_epoch is not None and beat.seen_epoch > self.record.epoch:
            self._learn_epoch(beat.seen_epoch)
        holder = self.record.holder
        if holder is not None and self._holds(beat.session_id, beat.instance):
            self._progress(beat.last_data)
            if self._is_deaf(holder, beat):
                self._contact(beat.session_id, has_to_see=holder.epoch)
                self.record = replace(self.record, holder=replace(holder, revoked=True))
            elif not holder.revoked:
                self.live = replace(
                    self.live, lease_until=self.now.mono + self.record.config.lease_s
                )
        elif self.record.pending == beat.session_id and holder is None and not self._quiet():
            self._confirm(beat)

    def _is_deaf(self, holder: Tenure, beat: Beat) -> bool:
        """Whether a holder of ours beats on, and has long not heard that it is one.

        Our answers do not reach it: it is not active, and would keep everybody else from the role.
        """
        held_s = self.now.mono - self.live.held_since
        return (
            beat.seen_epoch is not None
            and beat.seen_epoch < holder.epoch
            and held_s > CONFIRM_SHARE * self.record.config.lease_s
        )

    def _refuse_haste(self, beat: Beat, contact: Contact) -> None:
        """B.4: confirmations, and whoever has not heard of the newest change, are never refused."""
        interval_s = minimum_interval_s(self.record.config.lease_s)
        if (
            contact.posted_at is None
            or contact.instance != beat.instance
            or contact.told_revision != self.record.revision
            or self.record.pending == beat.session_id
        ):
            return
        early_s = contact.posted_at.mono + interval_s - self.now.mono
        if early_s > interval_s * (1 - INTERVAL_TOLERANCE):
            raise TooSoon(
                f'The heartbeat of client session "{beat.session_id}" came {early_s:.3f} s before'
                f" the group's minimum interval of {interval_s:g} s had passed.",
                "Wait for the time in Retry-After, and beat every FailoverTimeout / 2 or so.",
                retry_after_s=early_s,
            )

    def _add(self, config: SessionConfig) -> bool:
        known = self.record.sessions.get(config.id)
        if known is None:
            if len(self.record.sessions) >= self.policy.max_sessions:
                raise Conflict(
                    f'Group "{self.record.config.id}" has {len(self.record.sessions)} client'
                    " sessions, the most that this coordinator allows.",
                    "Delete sessions that are not used any more, or raise max_sessions_per_group.",
                )
            sessions = {**self.record.sessions, config.id: SessionRecord(config)}
            self.record = replace(self.record, sessions=sessions)
            self.live = replace(
                self.live,
                contacts={**self.live.contacts, config.id: Contact(heard_at=self.now.mono)},
            )
            return True
        if not agrees(config, known.config):
            raise Conflict(
                f'Client session "{config.id}" exists with another configuration.',
                "Use the same Name and AdditionalData, another Id, or delete that session first.",
            )
        return False

    def _remove(self, session_id: str) -> None:
        session_of(self.record, session_id)
        holder = self.record.holder
        # A v1 client deletes its session when it has stopped (B.7). Ours releases first (R5): if one
        # is removed while it still holds, somebody else did it, and the lease has to run out.
        if holder is not None and holder.session_id == session_id and holder.instance is None:
            self._end_tenure("its client session was deleted")
        if self.record.pending == session_id:
            self._set_pending(None)
        sessions = {k: v for k, v in self.record.sessions.items() if k != session_id}
        contacts = {k: v for k, v in self.live.contacts.items() if k != session_id}
        self.record = replace(self.record, sessions=sessions)
        self.live = replace(self.live, contacts=contacts)

    def _override(self, wish: SetOverride) -> None:
        session = session_of(self.record, wish.session_id)
        changed = replace(
            session,
            override=wish.value,
            override_until=wish.until if wish.value is not RoleOverride.OFF else None,
            override_order=1 + max(s.override_order for s in self.record.sessions.values()),
        )
        sessions = {**self.record.sessions, wish.session_id: changed}
        self.record = replace(self.record, sessions=sessions)

    def _release(self, release: ReleaseRole) -> None:
        if release.session_id in self.record.sessions and release.hold_off_s > 0:
            self._contact(release.session_id, hold_off_until=self.now.mono + release.hold_off_s)
        holder = self.record.holder
        if holder is None or (holder.session_id, holder.epoch) != (
            release.session_id,
            release.epoch,
        ):
            return  # it was released before, or its lease has ended: what is asked for is so
        self._progress(release.last_data)
        self._end_tenure(release.why)
        if release.session_id in self.record.sessions:
            # The others are asked first: it may be heard here, and hear nothing itself.
            self._contact(release.session_id, passed_over=True)

    def _refuse_removal_while_alive(self) -> None:
        state = GroupState(self.record, self.live)
        active = {s for s in self.record.sessions if alive(state, s, self.now)}
        if self.record.holder is not None:
            active.add(self.record.holder.session_id)
        if active:
            raise Conflict(
                f'Group "{self.record.config.id}" has active client sessions:'
                f" {', '.join(sorted(active))}.",
                "Stop these clients, or wait until FailoverTimeout after their last heartbeat.",
            )

    def _keep_progress(self) -> None:
        holder = self.record.holder
        if holder is not None and progress_is_unkept(GroupState(self.record, self.live)):
            self.record = replace(
                self.record, holder=replace(holder, last_data=self.live.last_data)
            )

    # -- what follows of itself ---------------------------------------------------------------

    def settle(self) -> None:
        """Do all that is due at ``now``."""
        self._expire_overrides()
        holder = self.record.holder
        if holder is not None and self.now.mono >= self.live.lease_until:
            self._end_tenure("its lease ended without a heartbeat")
        pending = self.record.pending
        if pending is not None and not self._may_stay_pending(pending):
            self._set_pending(None)
        self._choose()

    def _expire_overrides(self) -> None:
        for session_id, session in self.record.sessions.items():
            if session.override_until is not None and session.override_until <= self.now.wall:
                ended = replace(session, override=RoleOverride.OFF, override_until=None)
                sessions = {**self.record.sessions, session_id: ended}
                self.record = replace(self.record, sessions=sessions)

    def _may_stay_pending(self, session_id: str) -> bool:
        if not self._eligible(session_id):
            return False
        if self.now.mono >= self.live.confirm_by:
            self._contact(session_id, passed_over=True)
            return False
        return True

    def _choose(self) -> None:
        """Fill the vacancy, or replace a holder that is worse by enough (R16, R17)."""
        holder = self.record.holder
        if holder is not None and not holder.revoked:
            challenger = self._best(exclude=holder.session_id)
            if challenger is not None and self._is_better(challenger, holder):
                self.record = replace(self.record, holder=replace(holder, revoked=True))
                self._set_pending(challenger)
        elif self.record.pending is None:
            chosen = self._best(exclude=holder.session_id if holder else None)
            if chosen is not None:
                self._set_pending(chosen)

    def _eligible(self, session_id: str) -> bool:
        contact = self.live.contacts.get(session_id)
        return (
            contact is not None
            and alive(GroupState(self.record, self.live), session_id, self.now)
            and contact.hold_off_until <= self.now.mono
            and contact.has_to_see is None
        )

    def _best(self, *, exclude: str | None) -> str | None:
        """R17. Only a session that was heard in this run, and was not just passed over, is asked."""
        ready = [
            session_id
            for session_id in self.record.sessions
            if session_id != exclude
            and self._eligible(session_id)
            and self.live.contacts[session_id].posted_at is not None
            and not self.live.contacts[session_id].passed_over
        ]
        return min(ready, key=self._preference, default=None)

    def _preference(self, session_id: str) -> tuple[float, float, float, str]:
        contact = self.live.contacts[session_id]
        data_at = contact.last_data.timestamp() if contact.last_data is not None else float("-inf")
        return (-self._override_rank(session_id), -contact.score, -data_at, session_id)

    def _override_rank(self, session_id: str) -> int:
        session = self.record.sessions.get(session_id)
        if session is None or session.override is not RoleOverride.PRIMARY:
            return 0
        return session.override_order

    def _is_better(self, challenger: str, holder: Tenure) -> bool:
        held_s = self.now.mono - self.live.held_since
        overridden = self._override_rank(challenger) != self._override_rank(holder.session_id)
        if not overridden and held_s < self.policy.minimum_hold_s:
            return False
        return self._outranks(challenger, holder.session_id)

    def _outranks(self, challenger: str, incumbent: str) -> bool:
        """By a newer override, else by a score that is better by more than the hysteresis."""
        theirs, ours = self._override_rank(challenger), self._override_rank(incumbent)
        if theirs != ours:
            return theirs > ours
        contact = self.live.contacts.get(incumbent)
        if contact is None or contact.posted_at is None:
            return False  # after a restart its score is not known yet
        return self.live.contacts[challenger].score - contact.score > self.policy.score_hysteresis

    def _learn_epoch(self, seen: int) -> None:
        """A client has seen an epoch that is not in our data: the data is older than the group.

        Somebody may hold a lease that we know nothing of, so nobody is given one for a full L.
        """
        if self.record.holder is not None:
            self._end_tenure("its epoch is older than one that a client has seen")
        self._bump(epoch=seen)
        self.live = replace(self.live, quiet_until=self.now.mono + self.record.config.lease_s)

    # -- small steps --------------------------------------------------------------------------

    def _confirm(self, beat: Beat) -> None:
        """Begin its tenure, unless it would be taken away at once: that would cost a whole lease."""
        better = self._best(exclude=beat.session_id)
        if better is not None and self._outranks(better, beat.session_id):
            self._set_pending(better)
        else:
            self._begin_tenure(beat)

    def _begin_tenure(self, beat: Beat) -> None:
        check_transition(role_of(self.record, beat.session_id), Role.PRIMARY)
        epoch = self.record.epoch + 1
        why = "overridden" if self._override_rank(beat.session_id) else "chosen"
        tenure = Tenure(beat.session_id, epoch, self.now.wall, why, instance=beat.instance)
        self._bump(epoch=epoch, holder=tenure, pending=None)
        self.live = replace(
            self.live,
            lease_until=self.now.mono + self.record.config.lease_s,
            held_since=self.now.mono,
            last_data=None,
        )
        # This answer hands over what the tenure before left, not what the beat says of an older one
        # (R18); the tenure's own progress begins with the next heartbeat.
        self.history[epoch] = HistoryEntry(epoch, beat.session_id, self.now.wall, why)

    def _end_tenure(self, why: str) -> None:
        holder = self.record.holder
        assert holder is not None  # noqa: S101 - callers have just looked
        check_transition(Role.PRIMARY, Role.SECONDARY)
        last_data = last_data_of(GroupState(self.record, self.live))
        self.history[holder.epoch] = HistoryEntry(
            holder.epoch, holder.session_id, holder.since, holder.why, self.now.wall, why
        )
        self._bump(holder=None, previous=holder.session_id, last_data=last_data)
        self.live = replace(self.live, last_data=None)
        if self.record.pending is not None:
            self._allow_time_to_confirm()

    def _set_pending(self, session_id: str | None) -> None:
        before = self.record.pending
        if before is not None:
            check_transition(Role.PENDING_PRIMARY, Role.SECONDARY)
        if session_id is not None:
            check_transition(role_of(self.record, session_id), Role.PENDING_PRIMARY)
        self._bump(pending=session_id)
        self._allow_time_to_confirm()

    def _allow_time_to_confirm(self) -> None:
        """It can confirm from the end of the last lease on, and of the quiet after data loss."""
        earliest = max(self.now.mono, self.live.quiet_until)
        if self.record.holder is not None:
            earliest = max(earliest, self.live.lease_until)
        confirm_by = earliest + CONFIRM_SHARE * self.record.config.lease_s
        self.live = replace(self.live, confirm_by=confirm_by)

    def _progress(self, last_data: datetime | None) -> None:
        known = self.live.last_data
        if last_data is not None and (known is None or last_data > known):
            self.live = replace(self.live, last_data=last_data)

    def _holds(self, session_id: str, instance: str | None) -> bool:
        holder = self.record.holder
        return holder is not None and (holder.session_id, holder.instance) == (session_id, instance)

    def _quiet(self) -> bool:
        return self.now.mono < self.live.quiet_until

    def _bump(self, **changes: object) -> None:
        self.record = replace(self.record, revision=self.record.revision + 1, **changes)  # type: ignore[arg-type]

    def _contact(self, session_id: str, **changes: object) -> None:
        contact = replace(self.live.contacts[session_id], **changes)  # type: ignore[arg-type]
        self.live = replace(self.live, contacts={**self.live.contacts, session_id: contact})

    def answer_beat(self, session_id: str) -> HeartbeatAnswer:
        holder = self.record.holder
        role = role_of(self.record, session_id)
        if holder is not None and role is Role.PRIMARY:
            instance = self.live.contacts[session_id].instance
            if holder.revoked or not self._holds(session_id, instance):
                role = Role.SECONDARY  # to be demoted, or another process than the one that holds
        if self.live.contacts[session_id].told_revision != self.record.revision:
            self._contact(session_id, told_revision=self.record.revision)
        return HeartbeatAnswer(
            role=role,
            last_data=last_data_of(GroupState(self.record, self.live)),
            epoch=self.record.epoch,
            revision=self.record.revision,
            lease_s=self.record.config.lease_s,
            previous=self.record.previous,
        )


def agrees(wanted: SessionConfig | GroupConfig, known: SessionConfig | GroupConfig) -> bool:
    """Whether a registration says nothing that contradicts what exists: absent says nothing (B.1)."""
    if isinstance(wanted, GroupConfig) and isinstance(known, GroupConfig):
        if wanted.timeout_ticks != known.timeout_ticks:
            return False
        if wanted.description is not None and wanted.description != known.description:
            return False
    return (wanted.name is None or wanted.name == known.name) and (
        wanted.additional is None or wanted.additional == known.additional
    )
