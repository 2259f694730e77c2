"""Valid files with secrets and certificates, in place of those that samples name."""

from pathlib import Path

from agent.coordinator.auth import hash_password
from tests.mosquitto import Authority


def fill(path: Path, name: str) -> None:
    """Write the file that a sample names so, in a directory in which ``path`` may be made."""
    made = path.parent / "authority"
    if not made.exists():
        made.mkdir()
        Authority(made).issue("tls")
    match name:
        case "tls.crt" | "tls.key":
            content = (made / name).read_text()
        case "users":
            content = f"agent:{hash_password('a password')}\n"
        case _ if name.endswith(("ca.crt", "ca.pem")):
            content = (made / "ca.pem").read_text()
        case _:
            content = f"{'secret' * 4}\n"
    path.touch(0o600)
    path.write_text(content)
