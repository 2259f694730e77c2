"""The members that a primary asks while the coordinator is away, and their votes (R23, R27, R28, R35).

Owns the set of members of the current tenure, the questions under way, and the moment from which the members'
votes extend the role. Knows neither leases nor phases: core/failsafe.py decides when to ask.
"""

from dataclasses import dataclass, replace

from agent.core.effects import Ask
from agent.core.failsafe_view import MemberReadiness
from agent.model import Member, MemberSet

NO_REVISION = -1
NEVER = float("-inf")

REHEARSAL_INTERVAL_S = 60.0
"""Time between two rehearsals: a member that stops answering is noticed soon, at no cost to speak of."""

NO_SET = "the coordinator has sent no set of members"
NOT_ASKED = "not asked yet"


@dataclass(frozen=True, slots=True)
class _Question:
    member: Member
    sent_at: float
    rehearsal: bool


class FailsafeHolder:
    """The set of members and their votes. Moments are CLOCK_BOOTTIME seconds.

    Attributes:
        me: this member, which is not asked.
        ask_at: when the next questions may be sent.
        rehearse_at: when the next rehearsal is due.
    """

    def __init__(self, me: Member | None) -> None:
        """Build it without a tenure.

        Args:
            me: this member, which is not asked; None if it takes no part in failsafe.
        """
        self.me = me
        self._nonce = 0
        self.end_tenure()

    def end_tenure(self) -> None:
        """Forget set, questions and votes."""
        self._in_use: MemberSet | None = None
        self.ask_at = NEVER
        self.rehearse_at = float("inf")
        self._newest_revision = NO_REVISION
        self._questions: dict[int, _Question] = {}
        self._yes: dict[Member, float] = {}
        self._alone_at = NEVER
        self._readiness: dict[Member, MemberReadiness] = {}

    def forget_questions(self) -> None:
        """Forget the questions under way: a demotion has begun."""
        self._questions = {}

    # -- the set --------------------------------------------------------------------------------

    def adopt(self, received: MemberSet | None, now: float) -> None:
        """Use the set from a heartbeat's answer, unless it is older than the one in use (R23).

        If the answer has no set, stop using one.
        """
        if received is None or self.me is None:
            self._in_use = None
        elif received.revision > self._newest_revision:
            self._in_use, self._newest_revision = received, received.revision
            self.rehearse_at = now
            self._readiness = {
                member: self._readiness.get(
                    member, MemberReadiness(member, ready=False, why=NOT_ASKED, since=now)
                )
                for member in self.others
            }
        elif received.revision == self._newest_revision:
            self._in_use = received

    @property
    def revision(self) -> int | None:
        """The revision of the last set received, which may state that failsafe is off; None without one."""
        return None if self._in_use is None else self._in_use.revision

    @property
    def off(self) -> str | None:
        """Why no set is used, or None if one is."""
        return NO_SET if self._in_use is None else self._in_use.off

    @property
    def members(self) -> tuple[Member, ...] | None:
        """The set that is used, this member included; None while none is used."""
        return None if self._in_use is None or self._in_use.off else self._in_use.members

    @property
    def others(self) -> tuple[Member, ...]:
        """The members to ask. This session under another URL counts as another member (R22)."""
        return tuple(member for member in self.members or () if member != self.me)

    # -- counting -------------------------------------------------------------------------------

    @property
    def counts_from(self) -> float:
        """The moment up to which all others have voted yes: the oldest of each one's newest yes (R28)."""
        if self.members is None:
            return NEVER
        if not self.others:
            return self._alone_at
        return min(self._yes.get(member, NEVER) for member in self.others)

    def ask(self, epoch: int, now: float, *, interval_s: float, forget_s: float) -> list[Ask]:
        """Build the questions to all others (R27). Without others, this moment counts as a vote of all.

        Args:
            epoch: of the tenure.
            now: this moment; an answer of yes extends the role from here.
            interval_s: the time to the next questions.
            forget_s: questions that are unanswered for longer than this are forgotten.
        """
        self.ask_at = now + interval_s
        self._questions = {
            nonce: question
            for nonce, question in self._questions.items()
            if now - question.sent_at <= forget_s
        }
        if not self.others:
            self._alone_at = now
        return self._send(epoch, now, rehearsal=False)

    def rehearse(self, epoch: int, now: float) -> list[Ask]:
        """Build rehearsals to all others, for which no promise is given (R35)."""
        self.rehearse_at = now + REHEARSAL_INTERVAL_S
        return self._send(epoch, now, rehearsal=True)

    def on_answered(self, nonce: int, now: float, *, yes: bool, why: str) -> None:
        """Record an answer. A yes counts from when its question was sent; the newest one is kept."""
        question = self._questions.get(nonce)
        if question is None:
            return
        self._questions = {n: q for n, q in self._questions.items() if n != nonce}
        member = question.member
        if yes and not question.rehearsal:
            self._yes = {**self._yes, member: max(self._yes.get(member, NEVER), question.sent_at)}
        known = self._readiness.get(member)
        if known is not None:
            since = known.since if known.ready is yes else now
            after = replace(
                known, ready=yes, why=why, since=since, yes_at=self._yes.get(member, NEVER)
            )
            self._readiness = {**self._readiness, member: after}

    @property
    def readiness(self) -> tuple[MemberReadiness, ...]:
        """How each other member has answered."""
        return tuple(self._readiness.values())

    def _send(self, epoch: int, now: float, *, rehearsal: bool) -> list[Ask]:
        asks = []
        for member in self.others:
            self._nonce += 1
            question = _Question(member, now, rehearsal)
            self._questions = {**self._questions, self._nonce: question}
            asks.append(Ask(member, epoch, self._nonce, rehearsal))
        return asks
