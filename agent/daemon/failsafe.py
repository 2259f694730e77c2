"""Connect the session's failsafe to the network: send its questions, and answer those of the other members.

Owns the listener and the asker of one agent. The session (core/failsafe.py) has the rules: it decides when to ask,
and each vote.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from agent.core.effects import Ask
from agent.core.effects import Vote as Decision
from agent.core.events import Answered, Asked, Event
from agent.daemon.failsafe_report import FailsafeSnapshot, Outcome
from agent.daemon.member import Member
from agent.drivers.failsafe.access import FailsafeAccess, warn_of_shared_url
from agent.drivers.failsafe.asker import Asker, AskError, Peer
from agent.drivers.failsafe.listener import Listener, Vote
from agent.drivers.failsafe.messages import LONGEST_WHY, Question
from agent.ops.logs import Log

MAX_QUESTIONS = 128
"""Questions under way at once, so that their answers fit into the inbox; others wait, as part of their timeout."""

UseAccess = Callable[[FailsafeAccess], Awaitable[None]]
LoadAccess = Callable[[UseAccess], Awaitable[FailsafeAccess]]
"""Loads secret and certificates, calls its argument after each later change of them; raises ConfigError."""

log = Log(__name__)


class Failsafe:
    """Failsafe of one agent. ``start`` it before the agent joins, ``stop`` it at the very end.

    Args:
        member: read only.
        access: the group's secret and the certificates.
        vote: passes a question to the session, and returns its decision.
        post_event: puts an event into the agent's inbox.
    """

    def __init__(
        self,
        member: Member,
        access: FailsafeAccess,
        *,
        vote: Callable[[Asked], Decision],
        post_event: Callable[[Event], None],
    ) -> None:
        settings = member.settings
        assert settings.failsafe_listen is not None  # noqa: S101 - the caller has checked it
        self._member = member
        self._address = settings.failsafe_listen
        self._decide = vote
        self._post_event = post_event
        self._listener = Listener(
            settings.group,
            member.session_id,
            str(settings.member_url),
            access,
            vote=self._vote,
            clock=member.clock,
        )
        self._asker = Asker(settings.group, member.session_id, member.instance, access)
        self._slots = asyncio.Semaphore(MAX_QUESTIONS)
        self._asked = Counter(dict.fromkeys(Outcome, 0))
        self._votes = Counter({Outcome.YES: 0, Outcome.NO: 0})

    async def start(self) -> None:
        """Listen. Raises ConfigError: LISTEN, the address cannot be used."""
        address = await self._listener.start(self._address)
        url = self._member.settings.member_url
        log.info("failsafe listens", address=str(address), url=url)
        if warning := warn_of_shared_url(self._member.settings):
            log.warning("failsafe URL may not be unique", url=url, reason=warning)

    async def stop(self) -> None:
        """Stop listening. May be called twice."""
        await self._listener.stop()

    def use(self, access: FailsafeAccess) -> None:
        """Use new secrets and certificates from now on."""
        self._listener.use(access)
        self._asker.use(access)

    # -- questions ------------------------------------------------------------------------------

    async def ask(self, effect: Ask) -> None:
        """Ask another member, and post the result as an ``Answered`` event."""
        peer = Peer(effect.member.id, effect.member.url)
        limit_s = self._member.session.timing.question_interval_s
        try:
            async with asyncio.timeout(limit_s), self._slots:
                answer = await self._asker.ask(
                    peer, effect.epoch, rehearsal=effect.rehearsal, limit_s=limit_s
                )
            outcome = Outcome.YES if answer.yes else Outcome.NO
            answered = Answered(effect.nonce, yes=answer.yes, why=answer.why[:LONGEST_WHY])
        except AskError as error:
            outcome, answered = Outcome.ERROR, Answered(effect.nonce, yes=False, why=str(error))
        except TimeoutError:
            outcome, answered = (
                Outcome.ERROR,
                Answered(effect.nonce, yes=False, why="not asked in time"),
            )
        if not effect.rehearsal:
            self._asked[outcome] += 1
        self._post_event(answered)

    def _vote(self, question: Question) -> Vote:
        decision = self._decide(Asked(question.sender, question.epoch, question.rehearsal))
        if not question.rehearsal:
            self._votes[Outcome.YES if decision.yes else Outcome.NO] += 1
        return Vote(decision.yes, decision.why)

    def snapshot(self) -> FailsafeSnapshot:
        """A snapshot for metrics."""
        view = self._member.session.failsafe_view(self._member.clock.boottime())
        refused = {reason.value: count for reason, count in self._listener.refused.items()}
        return FailsafeSnapshot(view, dict(self._asked), dict(self._votes), refused)


async def start_failsafe(
    member: Member,
    load: LoadAccess,
    *,
    vote: Callable[[Asked], Decision],
    post_event: Callable[[Event], None],
) -> Failsafe:
    """Start failsafe for a member whose settings turn it on.

    Raises:
        ConfigError: the address, the secret or a certificate cannot be used.
    """
    failsafe: Failsafe

    async def use(access: FailsafeAccess) -> None:
        failsafe.use(access)

    access = await load(use)
    failsafe = Failsafe(member, access, vote=vote, post_event=post_event)
    await failsafe.start()
    return failsafe
