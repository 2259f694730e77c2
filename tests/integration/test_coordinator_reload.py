"""SIGHUP to a real coordinator: certificates, users and the log level change, and no connection ends."""

import base64
import contextlib
import http.client
import signal
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from agent.coordinator.auth import hash_password
from tests.mosquitto import Authority

from .stage import PATIENCE_S, Stage, free_port

GROUPS = "/api/v1/clientfailover/groups"


class Site:
    """A coordinator with TLS and users, by a file that a test can change."""

    def __init__(self, stage: Stage) -> None:
        self.folder = stage.directory
        self.authority = Authority(self.folder)
        self.port = free_port()
        self.certify("first")
        self.users(ann="one")
        self.configure()
        words = ("serve", f"--config={self.folder / 'coordinator.toml'}")
        self.process = stage.process("coordinator", *words)
        self.process.until_said("coordinator listening")

    def configure(self, **changed: object) -> None:
        settings: dict[str, object] = {
            "listen": f"127.0.0.1:{self.port}",
            "store": "memory",
            "tls_certificate": str(self.folder / "tls.crt"),
            "tls_key": str(self.folder / "tls.key"),
            "users_file": str(self.folder / "users"),
            **changed,
        }
        lines = [f"{key} = {value!r}\n" for key, value in settings.items() if value is not None]
        (self.folder / "coordinator.toml").write_text("".join(lines))

    def certify(self, name: str) -> None:
        for made, used in zip(self.authority.issue(name), ("tls.crt", "tls.key"), strict=True):
            made.rename(self.folder / used)

    def users(self, **passwords: str) -> None:
        text = "".join(f"{name}:{hash_password(word)}\n" for name, word in passwords.items())
        made = self.folder / "users.new"
        made.touch(0o600)
        made.write_text(text)
        made.rename(self.folder / "users")

    def reload(self, says: str = "configuration read again") -> str:
        after = len(self.process.said())
        self.process.send(signal.SIGHUP)
        self.process.until_said(says, after)
        return self.process.said()[after:]

    def connect(self) -> http.client.HTTPSConnection:
        trust = ssl.create_default_context(cafile=self.authority.file)
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=PATIENCE_S, context=trust
        )


def status(
    connection: http.client.HTTPSConnection,
    user: str,
    password: str,
    method: str = "GET",
    path: str = GROUPS,
) -> int:
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    connection.request(method, path, headers={"Authorization": f"Basic {token}"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


def metrics(connection: http.client.HTTPSConnection) -> str:
    connection.request("GET", "/metrics")
    return connection.getresponse().read().decode()


def name_of(connection: http.client.HTTPSConnection) -> str:
    """The common name in the certificate of the server."""
    connection.connect()
    assert isinstance(connection.sock, ssl.SSLSocket)
    der = connection.sock.getpeercert(binary_form=True)
    assert der is not None
    subject = x509.load_der_x509_certificate(der).subject
    return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


@pytest.fixture
def site(stage: Stage) -> Site:
    return Site(stage)


def test_certificates_users_and_log_level_change_without_dropping_a_connection(site: Site) -> None:
    """Fault 22: SIGHUP ended the coordinator."""
    kept = site.connect()
    assert name_of(kept) == "first"
    socket = kept.sock
    assert status(kept, "ann", "one") == 200
    assert status(kept, "ben", "two") == 401
    site.certify("second")
    site.users(ben="two")
    site.configure(log_level="DEBUG")
    assert "changed=log_level" in site.reload()
    assert (status(kept, "ann", "one"), status(kept, "ben", "two")) == (401, 200)
    assert kept.sock is socket
    with contextlib.closing(site.connect()) as new:
        assert name_of(new) == "second"
    site.users(ben="three")
    site.reload()
    assert (status(kept, "ben", "two"), status(kept, "ben", "three")) == (401, 200)
    assert kept.sock is socket
    kept.close()
    assert site.process.end() == 0


@pytest.mark.parametrize("file", ["tls.crt", "tls.key", "users", "coordinator.toml"])
def test_an_invalid_file_changes_nothing_and_logs_one_error(site: Site, file: str) -> None:
    site.certify("second")
    site.users(ben="two")
    site.configure(log_level="DEBUG")
    (site.folder / file).write_text("nothing that anybody can use")
    said = site.reload("configuration not changed")
    assert len([line for line in said.splitlines() if " ERROR " in line]) == 1
    assert file in said
    with contextlib.closing(site.connect()) as connection:
        assert name_of(connection) == "first"
        assert status(connection, "ann", "one") == 200
    assert site.process.end() == 0


def test_settings_that_cannot_change_are_refused_by_name_and_the_others_applied(site: Site) -> None:
    site.users(ben="two")
    site.configure(
        listen=f"127.0.0.1:{free_port()}", max_groups=5, tls_certificate=None, tls_key=None
    )
    said = site.reload()
    assert "settings not changed refused=listen,max_groups,tls_certificate,tls_key" in said
    with contextlib.closing(site.connect()) as connection:
        assert status(connection, "ben", "two") == 200
    assert site.process.end() == 0


def test_a_certificate_with_another_key_is_not_loaded(site: Site) -> None:
    certificate, _ = site.authority.issue("second")
    certificate.rename(site.folder / "tls.crt")
    site.reload("configuration not changed")
    with contextlib.closing(site.connect()) as connection:
        assert name_of(connection) == "first"


def test_files_that_change_are_taken_over_without_a_signal(site: Site) -> None:
    """All of them, on the connections that are open; one that is half written changes nothing."""
    kept = site.connect()
    assert name_of(kept) == "first"
    socket = kept.sock
    after = len(site.process.said())
    (site.folder / "users").write_text("ben:scrypt$15$8$1$half of a li")
    site.process.until_said("configuration not changed", after)
    assert status(kept, "ann", "one") == 200
    assert "last_reload_successful 0.0" in metrics(kept)
    after = len(site.process.said())
    site.certify("second")
    site.users(ben="two")
    site.process.until_said("configuration read again", after)
    assert (status(kept, "ann", "one"), status(kept, "ben", "two")) == (401, 200)
    assert "last_reload_successful 1.0" in metrics(kept)
    assert kept.sock is socket
    with contextlib.closing(site.connect()) as new:
        assert name_of(new) == "second"
    said = site.process.said()
    assert len([line for line in said.splitlines() if " ERROR " in line]) == 1
    kept.close()
    assert site.process.end() == 0


def test_administrators_change_by_a_reload(site: Site) -> None:
    """Who may manage access is in force at once, and named if nobody has the name."""
    lists = "/api/v1/tenants/default/namespaces/default/accesscontrol/clientfailover/groups"
    site.users(ann="one")
    with contextlib.closing(site.connect()) as connection:
        assert status(connection, "ann", "one", "DELETE", lists) == 403
        site.configure(administrator=["user:ann"])
        assert "changed=administrator" in site.reload()
        assert status(connection, "ann", "one", "DELETE", lists) == 204
        site.configure(administrator=["user:bob", "role:ops"])
        said = site.reload()
        assert "administrator does not exist administrator=role:ops,user:bob" in said
        assert status(connection, "ann", "one", "DELETE", lists) == 403


def test_a_key_with_a_pass_phrase_causes_no_prompt(site: Site, tmp_path: Path) -> None:
    (tmp_path / "tls.key").write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIB\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    site.reload("configuration not changed")
    assert site.process.end() == 0
