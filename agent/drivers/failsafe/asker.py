"""The client of failsafe: asks another member of the group one question.

Owns one connection for each question, and verifies code, sender and nonce of its answer. Any other outcome is an
AskError with the reason. Knows nothing of epochs, and of what a yes allows.
"""

import asyncio
import secrets
import ssl
from collections import OrderedDict
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools
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
from agent.ops.names import Names

MAX_ANSWER_BYTES = 2 * MAX_BODY_BYTES
"""Bound of an answer, its head included."""

MAX_PEERS = 256
"""For how many members the challenge is kept: more than a group has."""

LONGEST_REASON = 200
"""Characters of an error, so that its log line stays readable."""

OK, UNAUTHORIZED = 200, 401


class AskError(Exception):
    """No valid answer to a question was received; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The member that is asked: its session id and its URL."""

    session_id: str
    url: str


@dataclass(slots=True)
class _Reply:
    """The HTTP answer of a member, filled by the callbacks of the parser."""

    status: int = 0
    mac: str = ""
    body: bytes = b""
    complete: bool = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == MAC_HEADER.lower().encode():
            self.mac = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


@dataclass(frozen=True, slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def aclose(self) -> None:
        self.writer.transport.abort()  # no further byte on this connection matters


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
        self._names = Names(known_first=True)  # the outage often cuts off name servers, too
        self._challenges: OrderedDict[Peer, str] = OrderedDict()
        self.use(access)

    def use(self, access: FailsafeAccess) -> None:
        """Use new secrets and authorities for further questions."""
        self._keys = access.keys
        self._tls = access.asker_tls

    async def ask(self, peer: Peer, epoch: int, *, rehearsal: bool, limit_s: float) -> Answer:
        """Ask one member; return its authentic answer to this question, yes or no.

        Args:
            peer: the member that is asked.
            epoch: of the sender's tenure.
            rehearsal: whether the question is only a test, for which no promise is given.
            limit_s: timeout for both requests together.

        Raises:
            AskError: no valid answer was received.
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
                status, answer = await self._exchange(peer, question, limit_s)
                if status == UNAUTHORIZED:  # the first question, or the member has restarted
                    question = msgspec.structs.replace(question, challenge=answer.challenge)
                    status, answer = await self._exchange(peer, question, limit_s)
        except TimeoutError:
            raise AskError(f"no answer within {limit_s:g} s") from None
        if status != OK:
            raise AskError(f"answered {status} twice: {answer.why}")
        return answer

    async def _exchange(self, peer: Peer, question: Question, limit_s: float) -> tuple[int, Answer]:
        """Send a question once; return status and authentic answer. Raises AskError."""
        body = encode(question)
        mac = sign(self._keys, Kind.QUESTION, body)
        try:
            head = (
                f"POST {PATH} HTTP/1.1\r\nHost: {urlsplit(peer.url).netloc}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                f"{MAC_HEADER}: {mac}\r\nConnection: close\r\n\r\n"
            )
            reply = await self._send(peer.url, head.encode() + body, limit_s)
            return reply.status, self._check(peer, question, reply)
        except AskError:
            raise
        except Exception as error:  # a stranger's URL or answer must not stop this agent
            raise AskError(_reason(error)) from error

    async def _send(self, url: str, request: bytes, limit_s: float) -> _Reply:
        """Send a request on a new connection; return the whole answer."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        tls = self._tls if parts.scheme == "https" else None

        async def dial(address: str) -> _Connection:
            name = host if tls is not None else None
            return _Connection(
                *await asyncio.open_connection(address, parts.port, ssl=tls, server_hostname=name)
            )

        connection = await self._names.connect(host, dial, timeout_s=limit_s)
        try:
            connection.writer.write(request)
            return await _receive(connection.reader)
        finally:
            await connection.aclose()

    def _check(self, peer: Peer, question: Question, reply: _Reply) -> Answer:
        if not is_authentic(self._keys, Kind.ANSWER, reply.body, reply.mac):
            raise AskError(_why_unauthentic(reply))
        try:
            answer = decode_answer(reply.body)
        except (ValueError, RecursionError) as error:
            raise AskError(f"the answer cannot be read: {error}") from None
        expected = self._group, peer.session_id, self._session_id, question.nonce
        if (answer.group, answer.sender, answer.to, answer.nonce) != expected:
            raise AskError("the answer is of another member, or to another question")
        self._challenges[peer] = answer.challenge
        self._challenges.move_to_end(peer)
        if len(self._challenges) > MAX_PEERS:
            self._challenges.popitem(last=False)
        return answer


async def _receive(reader: asyncio.StreamReader) -> _Reply:
    """Receive one whole answer. Raises AskError or HttpParserError."""
    reply, size = _Reply(), 0
    parser = httptools.HttpResponseParser(reply)
    while not reply.complete:
        data = await reader.read(MAX_ANSWER_BYTES)
        size += len(data)
        if size > MAX_ANSWER_BYTES:
            raise AskError(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
        if not data:
            raise AskError("the connection was closed before the answer was complete")
        parser.feed_data(data)
    reply.status = parser.get_status_code()
    return reply


def _reason(error: Exception) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            reason = f"its certificate is not trusted: {error.verify_message}"
        case ssl.SSLError():
            reason = f"TLS failed: {error.reason or error}"
        case OSError():
            reason = error.strerror or str(error) or type(error).__name__
        case httptools.HttpParserError():
            return f"the answer is not HTTP: {error}"[:LONGEST_REASON]
        case httptools.HttpParserUpgrade():  # whose only argument is a position
            return "the answer is not HTTP: it changes the protocol"
        case _:
            return f"cannot be asked ({str(error) or type(error).__name__})"[:LONGEST_REASON]
    return f"cannot be reached ({reason})"[:LONGEST_REASON]


def _why_unauthentic(reply: _Reply) -> str:
    """Why an answer without a valid authentication code is refused, with the error text that it contains."""
    try:
        error = msgspec.json.decode(reply.body)["error"]
    except (ValueError, RecursionError, TypeError, KeyError):
        error = "the answer is not made with the secret of this group"
    words = " ".join(str(error).split())
    return f"answered {reply.status}: {words}"[:LONGEST_REASON]
