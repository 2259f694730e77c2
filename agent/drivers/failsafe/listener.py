"""The listener of failsafe: answers the questions of the other members of a group.

Owns the only route, decides who may ask, and accepts each question once. A callback decides whether the answer is
yes; it runs in the event loop and must not block.

    POST /failsafe/v1/question  -> 200 the answer, or
                                   401 the answer no, with the Challenge to put into the question, or
                                   4xx {"error": "..."} if the sender is not a member

A question is passed to the callback only if its code is right, it names this group, member and URL, and its
challenge is the last one that this process gave to that process. So a recorded question is never accepted again.
A wrong challenge does not change the right one, so repeating recorded questions disturbs no member.
"""

import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from http import HTTPStatus

from agent.drivers.failsafe.access import FailsafeAccess
from agent.drivers.failsafe.messages import (
    CHALLENGE_BYTES,
    LONGEST_WHY,
    MAC_HEADER,
    MAX_BODY_BYTES,
    PATH,
    Answer,
    Kind,
    Question,
    decode_question,
    encode,
    is_authentic,
    sign,
)
from agent.ops.clock import Clock
from agent.ops.http_connection import JSON, Limits, Request, Response, error_response
from agent.ops.http_server import HttpServer
from agent.ops.logs import Log
from agent.schema.addresses import Address

LIMITS = Limits(
    connections=64,  # each member has one for a few milliseconds, so the oldest is not a member's
    request_s=2.0,
    keep_alive_s=1,
    head_bytes=4 * 1024,
    headers=32,
    body_bytes=MAX_BODY_BYTES,
    request_bytes=16 * 1024,  # so that a body above MAX_BODY_BYTES is answered with 413
    pipelined=1,
)

MAX_PEERS = 256
"""For how many processes the challenge is kept: more than a group has. Only senders with the secret get one."""

QUIET_S = 60.0
"""Interval in which refusals of one kind are logged once."""

log = Log(__name__)


class Refusal(StrEnum):
    """Why a request was not passed to the callback. The values are labels of metrics."""

    NOT_A_QUESTION = "not_a_question"
    """Another path or method, a body that is too long, or no JSON of a question."""
    NOT_AUTHENTIC = "not_authentic"
    """No authentication code, or none that was made with a secret of this member."""
    NOT_FOR_US = "not_for_us"
    """It names another group, member or URL."""
    NO_CHALLENGE = "no_challenge"
    """The first question of a process, or a repeated one."""


@dataclass(frozen=True, slots=True)
class Vote:
    """The answer to a question: yes or no, and why, for people."""

    yes: bool
    why: str


class _Refused(Exception):  # noqa: N818 - ends a request
    def __init__(self, status: int, refusal: Refusal, error: str) -> None:
        super().__init__(error)
        self.status = status
        self.refusal = refusal


class Listener:
    """The listener of one member. ``start`` it inside a running loop; ``stop`` it there too.

    Args:
        group: its group.
        session_id: its own id.
        url: its own URL, as the coordinator knows it.
        access: the secret and the certificate.
        vote: the callback that answers a question.
        clock: for the interval between two log lines.

    Attributes:
        refused: the number of requests that were not passed to the callback, by reason.
    """

    def __init__(
        self,
        group: str,
        session_id: str,
        url: str,
        access: FailsafeAccess,
        *,
        vote: Callable[[Question], Vote],
        clock: Clock,
    ) -> None:
        self.refused = Counter(dict.fromkeys(Refusal, 0))
        self._group = group
        self._session_id = session_id
        self._url = url
        self._vote = vote
        self._clock = clock
        self._http = HttpServer("failsafe", LIMITS)
        self._challenges: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._logged_at: dict[Refusal, float] = {}
        self.use(access)

    def use(self, access: FailsafeAccess) -> None:
        """Use new secrets, and a new certificate for further connections."""
        self._keys = access.keys
        self._http.tls = access.listener_tls

    async def start(self, address: Address) -> Address:
        """Listen; return the bound address. Raises ConfigError: LISTEN, the address cannot be used."""
        return await self._http.start(self._serve, address)

    async def stop(self) -> None:
        """Stop listening. May be called twice, or without a start."""
        await self._http.stop()

    async def _serve(self, request: Request) -> Response:
        try:
            status, answer = self._answer(request)
        except _Refused as refused:
            self._count(refused.refusal, request.client, str(refused))
            allow = {"Allow": "POST"} if refused.status == HTTPStatus.METHOD_NOT_ALLOWED else None
            return replace(error_response(refused.status, str(refused), allow), close=True)
        if status != HTTPStatus.OK:
            self.refused[Refusal.NO_CHALLENGE] += 1
        body = encode(answer)
        mac = sign(self._keys, Kind.ANSWER, body)
        return Response(status, body, {**JSON, MAC_HEADER: mac}, close=True)

    def _answer(self, request: Request) -> tuple[int, Answer]:
        """The status and the answer to a member's question. Raises _Refused for other requests."""
        body = _question(request)
        mac = (request.header(MAC_HEADER.lower().encode()) or b"").decode("latin-1")
        if not is_authentic(self._keys, Kind.QUESTION, body, mac):
            raise _Refused(
                401, Refusal.NOT_AUTHENTIC, "The code is not made with the secret of this group."
            )
        try:
            question = decode_question(body)
        except (ValueError, RecursionError) as error:
            raise _Refused(
                400, Refusal.NOT_A_QUESTION, f"This is not a question: {error}."
            ) from None
        self._check_receiver(question)
        peer = question.sender, question.instance
        challenge = self._challenges.setdefault(peer, secrets.token_hex(CHALLENGE_BYTES))
        self._challenges.move_to_end(peer)
        if len(self._challenges) > MAX_PEERS:
            self._challenges.popitem(last=False)
        if not secrets.compare_digest(challenge.encode(), question.challenge.encode()):
            return 401, self._reply(
                question, Vote(yes=False, why="ask with this challenge"), challenge
            )
        self._challenges[peer] = challenge = secrets.token_hex(CHALLENGE_BYTES)
        return 200, self._reply(question, self._vote(question), challenge)

    def _check_receiver(self, question: Question) -> None:
        own = self._group, self._session_id, self._url
        if (
            question.group,
            question.to,
            question.url,
        ) != own or question.sender == self._session_id:
            raise _Refused(
                421,
                Refusal.NOT_FOR_US,
                f"This is member {self._session_id} of group {self._group} at {self._url}; {question.sender} asked"
                f" for {question.to} of {question.group} at {question.url}.",
            )

    def _reply(self, question: Question, vote: Vote, challenge: str) -> Answer:
        return Answer(
            group=self._group,
            sender=self._session_id,
            to=question.sender,
            nonce=question.nonce,
            yes=vote.yes,
            why=vote.why[:LONGEST_WHY],
            challenge=challenge,
        )

    def _count(self, refusal: Refusal, client: str | None, reason: str) -> None:
        self.refused[refusal] += 1
        now = self._clock.boottime()
        if now - self._logged_at.get(refusal, float("-inf")) >= QUIET_S:
            self._logged_at[refusal] = now
            log.warning(
                "failsafe question refused",
                of=client,
                kind=refusal.value,
                reason=reason,
            )


def _question(request: Request) -> bytes:
    """The body of a request to the only route. Raises _Refused."""
    if request.path != PATH:
        raise _Refused(404, Refusal.NOT_A_QUESTION, f"There is nothing here but {PATH}.")
    if request.method != "POST":
        raise _Refused(405, Refusal.NOT_A_QUESTION, "Questions are sent by POST.")
    if request.body is None:
        error = f"The body may have at most {MAX_BODY_BYTES} bytes."
        raise _Refused(413, Refusal.NOT_A_QUESTION, error)
    return request.body
