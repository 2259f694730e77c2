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
    right = f"one line of 1 to {LONGEST_SECRET} bytes: the secret"
    return _read_lines(path, 1, 1, right)[0]


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Read the secrets that sign messages, one a line; all of them are valid.

    Raises:
        ConfigError: as ``read_secret`` does; or there are more than MOST_KEYS, or one is too short.
    """
    right = (
        f"the secret in one line of at least {SHORTEST_KEY} characters, or two such lines while it is"
        f" being changed, at most {LONGEST_SECRET} bytes"
    )
    return tuple(line.encode() for line in _read_lines(path, MOST_KEYS, SHORTEST_KEY, right))


def _read_lines(path: Path, most: int, shortest: int, right: str) -> list[str]:
    """Read a file of 1 to ``most`` lines; ``right`` describes it in an error."""
    try:
        content = read_regular(path, LONGEST_SECRET, trusted_link=True)
        lines = content.decode().rstrip("\r\n").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: must be text in UTF-8, and is not") from None
    fits = 1 <= len(lines) <= most and len(content) <= LONGEST_SECRET
    if not fits or not all(line.isprintable() and len(line) >= shortest for line in lines):
        raise ConfigError(f"{path}: must be {right}")
    return lines
