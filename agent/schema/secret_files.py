"""Files with one secret: a password, or the secret of a client or of webhooks."""

from pathlib import Path

from agent.errors import ConfigError
from agent.files import read_regular

LONGEST_SECRET = 4096
"""Bytes. A longer file is another one, named by mistake."""

READABLE_BY_OTHERS = 0o006
"""Permission bits that such a file must not have (its group may read it)."""


def read_secret(path: Path) -> str:
    """The secret in a file, without the end of its line.

    Raises:
        ConfigError: it cannot be read, is empty, too long or not text. The secret is not repeated.
    """
    try:
        secret = read_regular(path, LONGEST_SECRET, trusted_link=True)
        text = secret.decode().rstrip("\r\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: must be text in UTF-8, and is not") from None
    if not text or len(secret) > LONGEST_SECRET or not text.isprintable():
        raise ConfigError(f"{path}: must be one line of 1 to {LONGEST_SECRET} bytes: the secret")
    return text
