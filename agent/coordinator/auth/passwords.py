"""The users file: names, password hashes and roles.

One user a line (``#`` begins a comment)::

    name:scrypt$15$8$1$<salt>$<hash>[:role,role...]

with the cost as log2(n), r and p of scrypt (RFC 7914), salt and 32-byte hash in Base64.
``hash_password`` makes the part after the name. A name holds no colon (RFC 7617).
"""

import base64
import binascii
import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path

from agent.errors import ConfigError

LOG2_N, BLOCK, PARALLEL = 15, 8, 1
"""32 MiB and some 60 ms for each guess. OWASP's minimum is n 2**15 with p 3, or 2**17 with p 1; this cost is lower,
so that a service that verifies hundreds of agents after a restart stays usable."""

MOST_LOG2_N = 20
"""1 GiB for one check; a line that asks for more is a mistake."""

SALT_BYTES, HASH_BYTES = 16, 32


@dataclass(frozen=True, slots=True)
class Password:
    """The entry of one user in the users file."""

    log2_n: int
    block: int
    parallel: int
    salt: bytes
    hash: bytes
    roles: tuple[str, ...] = ()

    def fits(self, password: bytes) -> bool:
        """Whether this is the password. Slow on purpose, so do not call it on the event loop."""
        made = _scrypt(password, self.salt, self.log2_n, self.block, self.parallel)
        return hmac.compare_digest(made, self.hash)


def dummy_password() -> Password:
    """The entry that an unknown user is checked against, so that it takes as long to refuse."""
    return Password(LOG2_N, BLOCK, PARALLEL, b"\0" * SALT_BYTES, b"\0" * HASH_BYTES)


def hash_password(password: str, roles: tuple[str, ...] = ()) -> str:
    """The part of a line of the users file that follows ``name:``. Takes some 60 ms."""
    salt = os.urandom(SALT_BYTES)
    made = _scrypt(password.encode(), salt, LOG2_N, BLOCK, PARALLEL)
    cost = f"scrypt${LOG2_N}${BLOCK}${PARALLEL}"
    line = f"{cost}${base64.b64encode(salt).decode()}${base64.b64encode(made).decode()}"
    return f"{line}:{','.join(roles)}" if roles else line


def _scrypt(password: bytes, salt: bytes, log2_n: int, block: int, parallel: int) -> bytes:
    memory = 128 * block * (2**log2_n + parallel) + 2**20
    return hashlib.scrypt(
        password, salt=salt, n=2**log2_n, r=block, p=parallel, maxmem=memory, dklen=HASH_BYTES
    )


def read_users(path: Path) -> dict[str, Password]:
    """Read a users file.

    Raises:
        ConfigError: the file cannot be read, or a line does not have the right form.
    """
    users: dict[str, Password] = {}
    for number, line in enumerate(read_text(path, "users_file").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, rest = line.strip().partition(":")
        try:
            users[name] = _password(name, rest)
        except (ValueError, binascii.Error):
            raise ConfigError(
                f"users_file {path}, line {number} is not NAME:scrypt$LOG2N$R$P$SALT$HASH[:ROLES]"
            ) from None
    if not users:
        raise ConfigError(f"users_file {path} has no user: nobody could call; add a line")
    return users


def _password(name: str, rest: str) -> Password:
    stored, _, roles = rest.partition(":")
    scheme, log2_n, block, parallel, salt, made = stored.split("$")
    password = Password(
        int(log2_n),
        int(block),
        int(parallel),
        base64.b64decode(salt, validate=True),
        base64.b64decode(made, validate=True),
        tuple(role.strip() for role in roles.split(",") if role.strip()),
    )
    if (
        not name
        or scheme != "scrypt"
        or not 1 <= password.log2_n <= MOST_LOG2_N
        or not 1 <= password.block <= 32  # noqa: PLR2004 - RFC 7914 speaks of 8
        or not 1 <= password.parallel <= 16  # noqa: PLR2004 - and of 1
        or len(password.hash) != HASH_BYTES
    ):
        raise ValueError(rest)
    return password


def read_text(path: Path, setting: str) -> str:
    """The text of a file that a setting names. Raises ConfigError."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting} {path} cannot be read: {error}") from None
