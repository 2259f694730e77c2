"""The client of failsafe: asks another member of the group one question.

Owns a connection for each question, and everything that makes an answer count: its code, its sender, its
nonce. Any other outcome is an AskError with the reason. Knows nothing of epochs, and not what a yes is for.
"""

import asyncio
import secrets
from collections import OrderedDict
from dataclasses import dataclass

import httpx2
import msgspec

from agent.drivers.failsafe.access import FailsafeAccess
from agent.drivers.failsafe.messages import (
    CHALLENGE_BYTES,
    MAC_HEADER,
    MAX_BODY_BYTES,
    PATH,
    Answer,
    Kind,
    Question,
    decode_answer,
    encode,
    is_authentic,
    sign,
)
from agent.ops.connections import NotHttpError, TooLongError, open_client
from agent.ops.names import Names

MAX_CONNECTIONS = 256
"""Questions at once: one to each member of a large group."""

LONGEST_REASON = 200
"""Characters of an error, so that it stays one readable line."""


class AskError(Exception):
    """The question has no answer that counts; the message has the reason."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The member that is asked: its session id and its URL."""

    session_id: str
    url: str


class Asker:
    """The questions of one process.

    Args:
        group: its group.
        session_id: its own id.
        instance: identifies this process.
        access: the secret and the authorities of certificates.
    """

    def __init__(self, group: str, session_id: str, instance: str, access: FailsafeAccess) -> None:
        self._group = group
        self._session_id = session_id
        self._instance = instance
        self._names = Names(known_first=True)  # name servers are often behind the way that is cut
        self._challenges: OrderedDict[Peer, str] = OrderedDict()
        self._keys: tuple[bytes, ...] = ()
        self._client = self._open(access)

    def _open(self, access: FailsafeAccess) -> httpx2.AsyncClient:
        self._keys = access.keys
        return open_client(
            access.asker_tls,
            keepalive_s=0.0,  # a kept connection may be dead without anybody knowing
            connections=MAX_CONNECTIONS,
            names=self._names,
            longest_answer=MAX_BODY_BYTES,
        )

    async def use(self, access: FailsafeAccess) -> None:
        """Take other secrets and authorities for new questions."""
        former, self._client = self._client, self._open(access)
        await former.aclose()

    async def aclose(self) -> None:
        """Close what is open."""
        await self._client.aclose()

    async def ask(self, peer: Peer, epoch: int, *, rehearsal: bool, limit_s: float) -> Answer:
        """Ask one member; its answer, yes or no, which is authentic and to this very question.

        Args:
            peer: is asked.
            epoch: of the sender's tenure.
            rehearsal: whether it is a test, which promises nothing.
            limit_s: seconds for all of it.

        Raises:
            AskError: there is no such answer.
        """
        question = Question(
            group=self._group,
            sender=self._session_id,
            to=peer.session_id,
            url=peer.url,
            instance=self._instance,
            epoch=epoch,
            nonce=secrets.token_hex(CHALLENGE_BYTES),
            challenge=self._challenges.get(peer, ""),
            rehearsal=rehearsal,
        )
        try:
            async with asyncio.timeout(limit_s):
                status, answer = await self._exchange(peer, question)
                if (
                    status == httpx2.codes.UNAUTHORIZED
                ):  # the first one, or the member has restarted
                    question = msgspec.structs.replace(question, challenge=answer.challenge)
                    status, answer = await self._exchange(peer, question)
        except TimeoutError:
            raise AskError(f"no answer within {limit_s:g} s") from None
        if status != httpx2.codes.OK:
            raise AskError(f"answered {status} twice: {answer.why}")
        return answer

    async def _exchange(self, peer: Peer, question: Question) -> tuple[int, Answer]:
        """Send a question once; the status and the authentic answer. Raises AskError."""
        body = encode(question)
        headers = {
            MAC_HEADER: sign(self._keys, Kind.QUESTION, body),
            "Content-Type": "application/json",
        }
        try:
            answer = await self._client.post(
                f"{peer.url}{PATH}", content=body, headers=headers, timeout=None
            )
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, NotHttpError, TooLongError) as error:
            reason = str(error) or type(error).__name__
            raise AskError(reason[:LONGEST_REASON]) from error
        mac = answer.headers.get(MAC_HEADER, "")
        if not is_authentic(self._keys, Kind.ANSWER, answer.content, mac):
            raise AskError(_unauthentic(answer))
        return answer.status_code, self._check(peer, question, answer.content)

    def _check(self, peer: Peer, question: Question, body: bytes) -> Answer:
        try:
            answer = decode_answer(body)
        except msgspec.DecodeError as error:
            raise AskError(f"the answer cannot be read: {error}") from None
        expected = self._group, peer.session_id, self._session_id, question.nonce
        if (answer.group, answer.sender, answer.to, answer.nonce) != expected:
            raise AskError("the answer is of another member, or to another question")
        self._challenges[peer] = answer.challenge
        self._challenges.move_to_end(peer)
        if len(self._challenges) > MAX_CONNECTIONS:
            self._challenges.popitem(last=False)
        return answer


def _unauthentic(answer: httpx2.Response) -> str:
    """Why an answer without the right code does not count, with its own words."""
    try:
        error = msgspec.json.decode(answer.content)["error"]
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError, KeyError):
        error = "the answer is not by the secret of this group"
    words = " ".join(str(error).split())
    return f"answered {answer.status_code}: {words}"[:LONGEST_REASON]
