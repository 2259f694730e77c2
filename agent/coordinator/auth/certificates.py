"""Client certificates: the identity that a verified one stands for.

The TLS layer has verified the chain before. The name is the first URI of the subject's alternative names,
else their first DNS name, else the common name; it becomes the client of that name.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.coordinator.auth.callers import CLIENT, MOST_NAME, Caller, Subject


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """The verified certificate of a connection.

    Attributes:
        name: whom it names, or None if it names nobody.
        until: when it expires, in seconds since 1970. A connection may outlive it.
    """

    name: str | None
    until: float

    def caller(self, now: float) -> Caller | None:
        """The client that the certificate identifies; None if it has expired or names nobody."""
        if self.name is None or now >= self.until:
            return None
        trustees = frozenset({Subject(CLIENT, self.name)})
        return Caller(self.name, trustees, identity=f"client:{self.name}")


def certificate_of(tls: ssl.SSLObject | ssl.SSLSocket | None) -> ClientCertificate | None:
    """The client's certificate of a TLS connection; None if there is none, or no TLS."""
    found: Mapping[str, Any] | None = tls.getpeercert() if tls is not None else None
    if not found:
        return None
    return ClientCertificate(_name(found), ssl.cert_time_to_seconds(found["notAfter"]))


def _name(certificate: Mapping[str, Any]) -> str | None:
    alternatives = certificate.get("subjectAltName", ())
    common = [
        value
        for part in certificate.get("subject", ())
        for key, value in part
        if key == "commonName"
    ]
    names = [
        *(value for kind, value in alternatives if kind == "URI"),
        *(value for kind, value in alternatives if kind == "DNS"),
        *common,
    ]
    name = next(filter(None, names), None)
    return name if name is not None and len(name) <= MOST_NAME else None
