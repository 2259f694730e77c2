"""Refuse requests that web pages of other sites make: across sites, or by DNS rebinding.

Any page that a browser shows may send requests to addresses that the browser can reach, loopback too. It
cannot hide the headers by which they are recognised here (Fetch Metadata, RFC 6454), and a name that an
attacker's DNS server resolves to loopback stays in the header Host. Knows nothing of routes and answers.
"""

from collections.abc import Collection, Iterable

from agent.schema.addresses import is_loopback

PREFLIGHT = b"access-control-request-method"

WATCHED = frozenset(
    {b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest", PREFLIGHT}
)
"""The headers that are checked."""

OWN_SITE = frozenset({b"same-origin", b"none"})
"""Values of Sec-Fetch-Site that only a page of the service itself, or a person, can cause."""

LINK = (b"navigate", b"document")
"""Sec-Fetch-Mode and Sec-Fetch-Dest when a person follows a link: no page can read the answer, or frame it."""

MOST_HOSTS = 64
"""How many accepted values of Host are remembered; a service has a few names."""

LONGEST_SHOWN = 100
"""The most characters of a header's value in an error."""

RESOLUTION = "Use a page of this service itself, or a program that is not a browser."


class BrowserCheck:
    """The check of one listening address.

    Args:
        loopback: whether the service can be reached from this machine only, so that Host must be one of its
            names.
        names: further accepted names in Host, without a port.
    """

    def __init__(self, *, loopback: bool = False, names: Collection[str] = ()) -> None:
        self._loopback = loopback
        self._names = frozenset(name.lower() for name in names)
        self._hosts: set[bytes] = set()

    def refusal(
        self, headers: Iterable[tuple[bytes, bytes]], scheme: str, *, page: bool = False
    ) -> str | None:
        """Why a request is refused, as one sentence; None if it may be answered.

        Args:
            headers: names in lower case.
            scheme: of this connection, http or https.
            page: whether the route is a page for people, to which other sites may link.
        """
        found = {name: value for name, value in headers if name in WATCHED}
        host = found.pop(b"host", b"")
        if self._loopback and host and host not in self._hosts and not self._accept(host):
            return (
                f"The header Host is {_shown(host)}, which is no name of this machine's loopback."
            )
        if not found:
            return None
        if PREFLIGHT in found:
            return "A page of another site (a CORS preflight) may not use this service."
        origin = found.get(b"origin")
        if origin is not None and not _is_own(origin.lower(), host.lower(), scheme):
            return f"A page of another site (Origin {_shown(origin)}) may not use this service."
        site = found.get(b"sec-fetch-site", b"none").lower()
        link = (found.get(b"sec-fetch-mode"), found.get(b"sec-fetch-dest")) == LINK
        if site in OWN_SITE or (page and link):
            return None
        return f"A page of another site (Sec-Fetch-Site {_shown(site)}) may not use this service."

    def _accept(self, host: bytes) -> bool:
        text = host.decode("latin-1").lower()
        name, colon, port = text.rpartition(":")
        if not colon or not port.isdecimal():
            name = text
        name = name.removeprefix("[").removesuffix("]").removesuffix(".")
        if not (is_loopback(name) or name.endswith(".localhost") or name in self._names):
            return False
        if len(self._hosts) < MOST_HOSTS:
            self._hosts.add(host)
        return True


def is_json(content_type: bytes | None) -> bool:
    """Whether a Content-Type is JSON in UTF-8, or absent.

    A page of another site can send forms and text without asking the service first, but no JSON.
    """
    if content_type is None or content_type == b"application/json":
        return True
    media, *parameters = [
        part.strip().lower() for part in content_type.decode("latin-1").split(";")
    ]
    kind, _, form = media.partition("/")
    charsets = [p.partition("=")[2].strip('" ') for p in parameters if p.startswith("charset")]
    known = media == "application/json" or (kind == "application" and form.endswith("+json"))
    return known and all(charset in {"utf-8", "utf8"} for charset in charsets)


def _is_own(origin: bytes, host: bytes, scheme: str) -> bool:
    """Whether an origin is this service's own. https counts, too: a proxy in front of it may add TLS."""
    return origin in {b"https://" + host, scheme.encode() + b"://" + host}


def _shown(value: bytes) -> str:
    text = value[:LONGEST_SHOWN].decode("latin-1")
    return "".join(c if c.isprintable() else "?" for c in text)
