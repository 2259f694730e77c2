"""An authenticated caller, and the trustees by which access-control lists can name it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

USER, CLIENT, ROLE = 1, 2, 3

KINDS = {"user": USER, "client": CLIENT, "role": ROLE}
"""How settings write the kind of a trustee, as in ``user:ann``."""

MOST_NAME = 256
"""Characters of a name: as many as the ObjectId of a trustee may have."""


class Subject(NamedTuple):
    """A trustee without a tenant: ``kind`` 1 is a user, 2 a client, 3 a role."""

    kind: int
    object_id: str


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller.

    Attributes:
        name: for the log.
        trustees: each trustee that this caller matches.
        tenant: the tenant that the identity belongs to; None: every tenant.
        identity: the caller's name as an owner of sessions: ``user:ann`` or ``client:host-a``.
    """

    name: str
    trustees: frozenset[Subject]
    tenant: str | None = None
    identity: str = ""


def user_caller(name: str, roles: Iterable[str]) -> Caller:
    """Build the caller for a user of the users file."""
    trustees = {Subject(USER, name), *(Subject(ROLE, role) for role in roles)}
    return Caller(name, frozenset(trustees), identity=f"user:{name}")


def parse_subject(text: str) -> Subject:
    """The trustee that a setting names as ``user:NAME``, ``client:ID`` or ``role:NAME``."""
    kind, _, name = text.partition(":")
    return Subject(KINDS[kind], name)
