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
        try:
            return self.port != 0 and not ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False


def is_link_local(host: str) -> bool:
    """Whether a host is a link-local address: other hosts on other links may have the same one."""
    try:
        return ipaddress.ip_address(host).is_link_local
    except ValueError:
        return False


def is_exposed(url: str) -> bool:
    """Whether what is sent to an http or mqtt URL leaves this machine unencrypted."""
    parts = urlsplit(url)
    return not parts.scheme.endswith("s") and not is_loopback(parts.hostname or "")


def is_loopback(host: str) -> bool:
    """Whether a host, by address or as ``localhost``, is this machine only. Resolves no names."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
