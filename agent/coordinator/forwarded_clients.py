"""Clients known by certificate, in forwarded requests: the follower vouches for them by a signature (R19).

A follower cannot present its caller's certificate to the leader. It has verified that certificate, and sends what
the leader needs of it in the header CLIENT, with an HMAC by a key that only coordinators have. It is in etcd, beside
the shards: whoever reads it there can act as any client, and whoever can write there decides about roles anyway.

The signature covers the receiving coordinator's session, the request's number, method, target and body, and the
client. Each number is taken once, so a copied header is of no use, neither here nor elsewhere. No clock is compared.

Headers without a right signature are refused, and a follower sends none on: it writes its own.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from agent.coordinator.auth import ClientCertificate
from agent.coordinator.calls import FORWARDED, Request, header
from agent.errors import NotLeading, Unauthenticated

CLIENT = b"failover-client"
"""Header of a forwarded request whose caller is known by certificate."""

WINDOW = 65_536
"""A request may arrive after so many later ones of its sender: 10 s of heartbeats."""

MAX_SENDERS = 256
"""Runs of other coordinators that numbers are remembered of, 8 KiB each; the one heard last is forgotten last."""

_NUMBER = re.compile(rb"[0-9a-f]{1,16}")

_PURPOSE = b"failover-agent forwarded client 1"


@dataclass(slots=True)
class _Taken:
    """The numbers of one sender: the newest, and of those up to it, by their distance, one bit each."""

    newest: int = 0
    bits: int = 0

    def take(self, number: int) -> bool:
        """Whether the number was not taken yet, and is not too old to know."""
        if number > self.newest:
            ahead = number - self.newest
            kept = self.bits << ahead if ahead < WINDOW else 0
            self.bits = (kept | 1) & ((1 << WINDOW) - 1)
            self.newest = number
            return True
        behind = self.newest - number
        if behind >= WINDOW or self.bits >> behind & 1:
            return False
        self.bits |= 1 << behind
        return True


class ForwardedClients:
    """Signs and verifies.

    Attributes:
        keys: of the store. The first one signs; a signature by any is right, so that keys can be replaced.
    """

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        self.keys = keys
        self._senders: dict[bytes, _Taken] = {}

    def sign(
        self, certificate: ClientCertificate, request: Request, number: bytes, receiver: str
    ) -> bytes:
        """The value of the header CLIENT.

        Args:
            certificate: verified, with a name.
            request: as it is sent.
            number: in its header FORWARDED.
            receiver: the session with etcd of the coordinator that it is for.
        """
        name = quote(certificate.name or "", safe="", errors="surrogatepass")
        digest = hashlib.sha256(request.body).hexdigest()
        signed = f"{receiver} {certificate.until:.0f} {name} {digest}".encode()
        return b"%b %b" % (signed, _mac(self.keys[0], signed, request, number))

    def read(self, request: Request, member: str) -> ClientCertificate | None:
        """The client that the sender of a request vouches for; None if it vouches for nobody.

        The request may still lack its body: call ``take`` when it is complete.

        Args:
            request: as it came.
            member: the session of this coordinator.

        Raises:
            NotLeading: it was for an earlier session, or for another coordinator.
            Unauthenticated: the signature is not that of a coordinator, or is for another request.
        """
        signed, mac = _parts(request)
        if mac is None:
            return None
        number = header(request.headers, FORWARDED) or b""
        if not any(
            hmac.compare_digest(mac, _mac(key, signed, request, number)) for key in self.keys
        ):
            raise _refused()
        receiver, until, name, _ = signed.decode().split(" ")
        if not member or receiver != member:
            raise NotLeading
        return ClientCertificate(unquote(name, errors="surrogatepass"), float(until))

    def take(self, request: Request) -> None:
        """Accept a complete request whose signature was right, once.

        Raises:
            Unauthenticated: the body is another one, or the request was taken before.
        """
        signed, mac = _parts(request)
        if mac is None:
            return
        digest = hashlib.sha256(request.body).hexdigest().encode()
        if not hmac.compare_digest(signed.rpartition(b" ")[2], digest):
            raise _refused()
        sender, _, number = (header(request.headers, FORWARDED) or b"").rpartition(b"-")
        taken = self._senders.pop(sender, None) or _Taken()
        self._senders[sender] = taken
        if len(self._senders) > MAX_SENDERS:
            del self._senders[next(iter(self._senders))]
        if not _NUMBER.fullmatch(number) or not taken.take(int(number, 16)):
            raise _refused()


def _mac(key: bytes, signed: bytes, request: Request, number: bytes) -> bytes:
    method = request.method.encode()
    parts = (_PURPOSE, signed, number, method, request.target)  # none has a line break in it
    return hmac.digest(key, b"\n".join(parts), "sha256").hex().encode()


def _parts(request: Request) -> tuple[bytes, bytes | None]:
    """What is signed, and its signature. An Authorization header takes precedence, as at certificates."""
    value = header(request.headers, CLIENT)
    if value is None or header(request.headers, b"authorization") is not None:
        return b"", None
    signed, _, mac = value.rpartition(b" ")
    return signed, mac


def _refused() -> Unauthenticated:
    return Unauthenticated(
        f"The header {CLIENT.decode()} was not written by a coordinator for this request.",
        "Send credentials, or a client certificate.",
    )
