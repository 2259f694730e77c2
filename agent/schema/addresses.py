"""Addresses to listen on or to connect to, and which of them only this machine can reach."""

import ipaddress
from typing import NamedTuple
from urllib.parse import urlsplit


class Address(NamedTuple):
    """An address to listen on or to connect to. Port 0: the kernel chooses a free port."""

    host: str
    port: int

    def __str__(self) -> str:
        """HOST:PORT, with an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_loopback(self.host)

    @property
    def is_one_place(self) -> bool:
        """Whether this is a single IP address and a port, rather than a wildcard, so that others can connect to it."""
        parsed = parse_ip(self.host)
        return self.port != 0 and parsed is not None and not parsed.is_unspecified


def is_link_local(host: str) -> bool:
    """Whether a host is a link-local address: other hosts on other links may have the same one."""
    parsed = parse_ip(host)
    return parsed is not None and parsed.is_link_local


def is_exposed(url: str) -> bool:
    """Whether what is sent to an http or mqtt URL leaves this machine unencrypted."""
    parts = urlsplit(url)
    return not parts.scheme.endswith("s") and not is_loopback(parts.hostname or "")


def is_loopback(host: str) -> bool:
    """Whether a host, by address or as ``localhost``, is this machine only. Resolves no names."""
    parsed = parse_ip(host)
    return host.lower() == "localhost" if parsed is None else parsed.is_loopback


def parse_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a host is; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
