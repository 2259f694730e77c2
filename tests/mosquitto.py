"""A real mosquitto for tests, with TLS, a password and client certificates; and a client that records its messages.

Owns the process, its files in one folder, and its port. Knows nothing of what is right.
"""

import ipaddress
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion

PATIENCE_S = 30.0
"""For what takes milliseconds, on a busy machine."""

NAME, PASSWORD = "failover", "a secret of the test"


def waited(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of ``condition``; fails with ``what``."""
    end_at = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < end_at, f"waited in vain for {what}"
        time.sleep(0.01)
    return value


class Authority:
    """A CA of the test's own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        self.file = directory / "ca.pem"
        ca = self._signed(self._name, self._key.public_key(), authority=True)
        self.file.write_bytes(ca.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str) -> tuple[Path, Path]:
        """A certificate, for 127.0.0.1 too, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        paths = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        made = self._signed(subject, key.public_key(), authority=False)
        paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
        paths[1].touch(0o600)
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return paths

    def _signed(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, authority: bool
    ) -> x509.Certificate:
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )


class Broker:
    """One mosquitto. ``secure`` before the start gives it TLS, a password and client certificates."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines = ["allow_anonymous true"]
        self.authority: Authority | None = None
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self.port: int = unused.getsockname()[1]

    def secure(self) -> None:
        """Let in only NAME with PASSWORD and a certificate of the authority."""
        self.authority = Authority(self.directory)
        public, private = self.authority.issue("broker")
        accounts = self.directory / "accounts"
        subprocess.run(["mosquitto_passwd", "-b", "-c", accounts, NAME, PASSWORD], check=True)
        accounts.chmod(0o644)
        self.lines = [
            "allow_anonymous false",
            f"password_file {accounts}",
            f"cafile {self.authority.file}",
            f"certfile {public}",
            f"keyfile {private}",
            "require_certificate true",
        ]

    def table(self, password: str = PASSWORD, **keys: Any) -> dict[str, Any]:
        """What an agent's table needs to be let in; ``limit`` is a busy machine's."""
        table: dict[str, Any] = {"broker": f"mqtt://127.0.0.1:{self.port}", **keys}
        if self.authority is not None:
            certificate, key = self.authority.issue("agent")
            secret = self.directory / "password"
            secret.touch(0o600)
            secret.write_text(password + "\n")
            table |= {
                "broker": f"mqtts://127.0.0.1:{self.port}",
                "username": NAME,
                "password_file": str(secret),
                "ca_file": str(self.authority.file),
                "certificate": str(certificate),
                "key": str(key),
            }
        return table

    def start(self) -> None:
        config = self.directory / "mosquitto.conf"
        user = "root" if os.geteuid() == 0 else "mosquitto"
        head = [f"listener {self.port} 127.0.0.1", f"user {user}", "log_dest none"]
        config.write_text("\n".join([*head, *self.lines, ""]))
        self.process = subprocess.Popen(
            [str(mosquitto()), "-c", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        waited(self._listens, "mosquitto to listen")

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "mosquitto has ended"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Heard:
    """One message."""

    topic: str
    payload: bytes
    retained: bool

    @property
    def content(self) -> Any:
        return json.loads(self.payload)


class Watcher:
    """Subscribes to every topic in a thread of its own, and reconnects to a restarted broker."""

    def __init__(self, broker: Broker) -> None:
        self.heard: list[Heard] = []
        self._subscribed = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        if broker.authority is not None:
            context = ssl.create_default_context(cafile=broker.authority.file)
            context.load_cert_chain(*broker.authority.issue("watcher"))
            self._client.tls_set_context(context)
            self._client.username_pw_set(NAME, PASSWORD)
        self._client.on_connect = lambda client, *_: client.subscribe("#", qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = lambda _client, _data, message: self.heard.append(
            Heard(message.topic, bytes(message.payload), message.retain)
        )
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", broker.port)
        self._client.loop_start()
        assert self._subscribed.wait(PATIENCE_S)

    def publish(self, topic: str, payload: bytes, *, retain: bool = True) -> None:
        self._client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(PATIENCE_S)

    def of(self, topic: str) -> list[Heard]:
        return [heard for heard in self.heard if heard.topic == topic]

    def last(self, topic: str) -> Any:
        """What was heard last there, from JSON; {} for nothing and for what is not JSON."""
        try:
            return self.of(topic)[-1].content
        except (IndexError, ValueError, RecursionError):
            return {}

    def until(self, topic: str, **fields: Any) -> Any:
        """What the topic tells once it tells this."""

        def fits() -> Any:
            last = self.last(topic)
            return isinstance(last, dict) and fields.items() <= last.items() and last

        try:
            return waited(fits, f"{fields} on {topic}")
        except AssertionError as error:
            raise AssertionError(f"{error}; heard: {self.heard}") from None

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def mosquitto() -> str | None:
    return shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@contextmanager
def a_broker(directory: Path) -> Iterator[Broker]:
    """A broker that is to be started, and is ended; skips the test where there is no mosquitto."""
    if mosquitto() is None:
        pytest.skip("needs: mosquitto: apt-get install mosquitto")
    broker = Broker(directory)
    yield broker
    broker.kill()


@contextmanager
def watching(broker: Broker) -> Iterator[Watcher]:
    watcher = Watcher(broker)
    yield watcher
    watcher.close()
