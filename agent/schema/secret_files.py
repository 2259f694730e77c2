"""Read files with secrets: a password, or the secret of a client, of webhooks or of a group's members."""

from pathlib import Path

from agent.errors import ConfigError
from agent.files import read_regular

LONGEST_SECRET = 4096
"""The longest file in bytes. A longer one is not a secret, but was named by mistake."""

READABLE_BY_OTHERS = 0o006
"""Permission bits that such a file must not have (its group may read it)."""

SHORTEST_KEY = 16
"""The fewest characters of a secret that signs messages: anybody who reads a message can try many secrets."""

MOST_KEYS = 2
"""The most secrets in a file: the current one, and a second while it is being changed."""


def read_secret(path: Path) -> str:
    """Read the secret in a file, without the end of its line.

    Raises:
        ConfigError: it cannot be read, is empty, too long or not text. The secret is not repeated.
    """
    text, size = _read_text(path)
    if not text or size > LONGEST_SECRET or not text.isprintable():
        raise ConfigError(f"{path}: must be one line of 1 to {LONGEST_SECRET} bytes: the secret")
    return text


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Read the secrets that sign messages, one a line; all of them are valid.

    Raises:
        ConfigError: as ``read_secret`` does; or there are more than MOST_KEYS, or one is too short.
    """
    text, size = _read_text(path)
    lines = text.splitlines()
    fits = 1 <= len(lines) <= MOST_KEYS and size <= LONGEST_SECRET
    if not fits or not all(line.isprintable() and len(line) >= SHORTEST_KEY for line in lines):
        raise ConfigError(
            f"{path}: must be the secret in one line of at least {SHORTEST_KEY} characters, or two such"
            f" lines while it is being changed, at most {LONGEST_SECRET} bytes"
        )
    return tuple(line.encode() for line in lines)


def _read_text(path: Path) -> tuple[str, int]:
    """Read a file; return its text without line ends at its end, and the bytes read."""
    try:
        content = read_regular(path, LONGEST_SECRET, trusted_link=True)
        return content.decode().rstrip("\r\n"), len(content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: must be text in UTF-8, and is not") from None
