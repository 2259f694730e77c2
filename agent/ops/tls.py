"""Make TLS contexts from files that are read once, so that the checked contents are the ones in use.

Owns reading certificates and keys with a bound, and putting them into a context. Knows no setting.
"""

import os
import ssl
from contextlib import ExitStack
from pathlib import Path

from agent.errors import ConfigError
from agent.files import read_regular

LONGEST_PEM = 2 * 1024 * 1024
"""The largest file with certificates; the bundles of distributions have some 250 KiB."""


def server_context(what: str, certificate: Path, key: Path) -> ssl.SSLContext:
    """A context for a listener, with a certificate chain and its private key.

    Raises:
        ConfigError: the files cannot be used; ``what`` names their settings.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # which OpenSSL 1.1.1 grants without limit
    load_pair(context, what, certificate, key)
    return context


def client_context(what: str, authorities: Path | None) -> ssl.SSLContext:
    """A context that verifies servers by these authorities, or by those of this host. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if authorities is None:
        context.load_default_certs()
    else:
        load_authorities(context, what, authorities)
    return context


def load_pair(context: ssl.SSLContext, what: str, certificate: Path, key: Path) -> None:
    """Put a certificate chain and its private key into a context. Raises ConfigError."""
    try:
        use_pair(context, _read(certificate), _read(key))
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"{what}: {certificate} and {key} must be a certificate chain and its private key in PEM,"
            f" without a pass phrase: {_reason(error)}"
        ) from None


def use_pair(context: ssl.SSLContext, chain: bytes, key: bytes) -> None:
    """Put the contents of a certificate chain and a key into a context. Raises OSError or ValueError."""
    with ExitStack() as stack:
        certificate, private = (_in_memory(stack, content) for content in (chain, key))
        # An empty password makes an encrypted key fail; without one, OpenSSL prompts on the terminal.
        context.load_cert_chain(certificate, private, password=lambda: b"")


def load_authorities(context: ssl.SSLContext, what: str, path: Path) -> None:
    """Add certificates to those that a context trusts. Raises ConfigError."""
    try:
        context.load_verify_locations(cadata=_read(path).decode("ascii"))
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"{what} {path} must have certificates in PEM: {_reason(error)}"
        ) from None


def _read(path: Path) -> bytes:
    content = read_regular(path, LONGEST_PEM, trusted_link=True)
    if len(content) > LONGEST_PEM:
        raise ValueError(f"{path} has more than {LONGEST_PEM >> 10} KiB")
    return content


def _reason(error: Exception) -> str:
    """The reason of an error, without any byte of the file, which may be secret."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not text"
    return str(getattr(error, "strerror", None) or error)


def _in_memory(stack: ExitStack, content: bytes) -> Path:
    """A file in memory with this content, while the stack is open."""
    file = stack.enter_context(os.fdopen(os.memfd_create("pem"), "wb"))
    file.write(content)
    file.flush()
    return Path(f"/proc/self/fd/{file.fileno()}")
