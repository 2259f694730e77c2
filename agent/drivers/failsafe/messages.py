"""The messages of failsafe: a question, its answer, and the authentication code (MAC) of each.

Owns their JSON, their bounds and their authentication. Knows nothing of sockets, and of what a yes allows.

A code covers the kind of the message and every byte of its body, so a question is never taken for an answer.
While the secret is being changed two secrets are valid: each message has a code for each of them, and one right
code is enough. So the members' files may be changed one after another, in any order.
"""

import hashlib
import hmac
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import msgspec

MAC_HEADER = "Failsafe-Mac"
PATH = "/failsafe/v1/question"

MAX_BODY_BYTES = 4 * 1024
"""Bound of a question and of an answer: three ids of 256 characters, a URL and 400 further bytes fit."""

MAX_MACS = 4
"""How many codes of one message are compared; a member sends two at most."""

LARGEST_EPOCH = 2**53 - 1
"""As in the group API."""

LONGEST_WHY = 200
"""Characters of the reason in an answer."""

CHALLENGE_BYTES = 16
"""Size of a nonce and of a challenge: 128 random bits."""


class Kind(StrEnum):
    """The kind of message that a code belongs to."""

    QUESTION = "question"
    ANSWER = "answer"


class Question(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """May the sender keep the role of its epoch without the coordinator?

    Attributes:
        sender: session id of the member that asks.
        to: session id of the member that is asked.
        url: of the member that is asked, as the coordinator knows it.
        instance: identifies the process that asks.
        nonce: identifies this question; the answer repeats it.
        challenge: from the last answer of the member that is asked; empty before the first.
        rehearsal: whether the question is only a test, for which no promise is given.
    """

    group: str
    sender: str = msgspec.field(name="From")
    to: str
    url: str
    instance: str
    epoch: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_EPOCH)]
    nonce: str
    challenge: str = ""
    rehearsal: bool = False


class Answer(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """The answer to a question.

    Attributes:
        sender: session id of the member that answers.
        to: session id of the member that has asked.
        why: the reason, for people.
        challenge: to put into the next question.
    """

    group: str
    sender: str = msgspec.field(name="From")
    to: str
    nonce: str
    yes: bool
    why: str = ""
    challenge: str = ""


encode = msgspec.json.Encoder().encode
decode_question = msgspec.json.Decoder(Question).decode
decode_answer = msgspec.json.Decoder(Answer).decode


def sign(keys: Sequence[bytes], kind: Kind, body: bytes) -> str:
    """The header ``Failsafe-Mac`` of a message: one code for each key."""
    return ", ".join(_code(key, kind, body) for key in keys)


def is_authentic(keys: Sequence[bytes], kind: Kind, body: bytes, header: str) -> bool:
    """Whether one of the codes in the header was made with one of the keys."""
    given = [code.strip().encode() for code in header.split(",", MAX_MACS)[:MAX_MACS]]
    fits = False
    for key in keys:
        right = _code(key, kind, body).encode()
        for code in given:
            fits |= hmac.compare_digest(right, code)
    return fits


def _code(key: bytes, kind: Kind, body: bytes) -> str:
    return hmac.new(key, f"{kind}\n".encode() + body, hashlib.sha256).hexdigest()
