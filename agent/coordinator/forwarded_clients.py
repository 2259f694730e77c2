"""Vouch for a client that was identified by its certificate when its request is forwarded (R19).

The coordinator that forwards has verified the client's certificate, but cannot present it to the leader. It sends
the client's name in the header CLIENT instead, with an HMAC by a key that only coordinators have. The key is in
etcd, beside the shards: whoever can read it there can act as any client, and whoever can write there decides about
roles anyway.

The signature covers the client, the receiving coordinator's session, and the request's number, method, target and
body. Each number is accepted once, so a copied header is of no use at any coordinator. No clocks are compared.

A header with a wrong signature is refused. A coordinator never forwards this header; it writes its own.
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
"""How many later requests of the same sender may overtake a request: 10 s of heartbeats."""

MAX_SENDERS = 256
"""For how many processes of other coordinators the numbers are remembered, in 8 KiB each. The one that was
silent for longest is forgotten first."""

_NUMBER = re.compile(rb"[0-9a-f]{1,16}")

_PURPOSE = b"failover-agent forwarded client 1"


@dataclass(slots=True)
class _AcceptedNumbers:
    """The numbers of one sender that were accepted: bit n of ``bits`` stands for the number ``newest - n``."""

    newest: int = 0
    bits: int = 0

    def accept(self, number: int) -> bool:
        """Accept a number once; return False if it was accepted before, or is older than the window."""
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
    """Signs and verifies the header CLIENT.

    Attributes:
        keys: of the store. The first one signs; a signature by any of them is valid, so that keys can be replaced.
    """

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        self.keys = keys
        self._senders: dict[bytes, _AcceptedNumbers] = {}

    def sign(
        self, certificate: ClientCertificate, request: Request, number: bytes, receiver: str
    ) -> bytes:
        """The value of the header CLIENT.

        Args:
            certificate: verified, with a name.
            request: as it is forwarded.
            number: the value of its header FORWARDED.
            receiver: the session with etcd of the coordinator that receives the request.
        """
        name = quote(certificate.name or "", safe="", errors="surrogatepass")
        digest = hashlib.sha256(request.body).hexdigest()
        signed = f"{receiver} {certificate.until:.0f} {name} {digest}".encode()
        return b"%b %b" % (signed, _mac(self.keys[0], signed, request, number))

    def read(self, request: Request, member: str) -> ClientCertificate | None:
        """The client that the sender of a request vouches for; None if it vouches for nobody.

        The request may still lack its body: call ``accept_once`` when it is complete.

        Args:
            request: as it was received.
            member: this coordinator's session with etcd.

        Raises:
            NotLeading: the header is for an earlier session of this coordinator, or for another one.
            Unauthenticated: the signature is not a coordinator's, or belongs to another request.
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

    def accept_once(self, request: Request) -> None:
        """Accept a complete request once. Call ``read`` first, which verifies the signature.

        Raises:
            Unauthenticated: the body is not the signed one, or the request was accepted before.
        """
        signed, mac = _parts(request)
        if mac is None:
            return
        digest = hashlib.sha256(request.body).hexdigest().encode()
        if not hmac.compare_digest(signed.rpartition(b" ")[2], digest):
            raise _refused()
        sender, _, number = (header(request.headers, FORWARDED) or b"").rpartition(b"-")
        accepted = self._senders.pop(sender, None) or _AcceptedNumbers()
        self._senders[sender] = accepted
        if len(self._senders) > MAX_SENDERS:
            del self._senders[next(iter(self._senders))]
        if not _NUMBER.fullmatch(number) or not accepted.accept(int(number, 16)):
            raise _refused()


def _mac(key: bytes, signed: bytes, request: Request, number: bytes) -> bytes:
    method = request.method.encode()
    parts = (_PURPOSE, signed, number, method, request.target)  # none has a line break in it
    return hmac.digest(key, b"\n".join(parts), "sha256").hex().encode()


def _parts(request: Request) -> tuple[bytes, bytes | None]:
    """The signed text and the signature; no signature if the request has an Authorization header.

    That header takes precedence, as it does over a certificate.
    """
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
