"""The ``[mqtt]`` table, which announces role changes; and the keys of any connection to a broker.

Owns the forms of a broker's address, credentials and topics. Knows nothing of their use (ops/mqtt.py,
drivers/mqtt.py). Durations are seconds.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from agent.schema.addresses import Address, is_exposed
from agent.schema.fields import Format, Range, Table
from agent.schema.formats import (
    NUMBER,
    USE_FILE,
    Duration,
    InputFile,
    SecretFile,
    Text,
    matches,
    must,
    sized,
    url_like,
)

MQTT_PORT = 1883
MQTTS_PORT = 8883

LONGEST_TOPIC = 1024
"""The most characters of a topic; MQTT's own limit is 65535 bytes."""

_check_topic = must(
    "be one topic, without the wildcards + and #",
    matches(r"[^+#\0]*"),
    first=sized(1, LONGEST_TOPIC),
)
_check_prefix = must(
    "be names with / between, and must not begin with $, the broker's own",
    lambda topic: topic.isprintable() and topic[:1] != "$" and all(topic.split("/")),
    first=_check_topic,
)
_check_host_id: Callable[[str], str] = must(
    "be printable, without +, # and /",
    lambda name: name.isprintable() and set(name).isdisjoint("+#/"),
    first=sized(1, 256),
)

Topic = Annotated[str, Format("TOPIC", "topic", check=_check_topic)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker(Table):
    """A connection to a broker."""

    broker: Annotated[
        str,
        Format("URL", "mqtt or mqtts URL", check=url_like("mqtt(s)://HOST[:PORT]", USE_FILE)),
    ]
    """mqtt://HOST:PORT, or mqtts:// for TLS. Without PORT: 1883, with TLS 8883."""
    limit: Duration = 5.0
    """How long the broker may take to answer. It may be far away, and busy."""
    keepalive: Annotated[
        int, Format("SECONDS", "whole seconds", parse=NUMBER.parse), Range(1, 65535)
    ] = 10
    """Interval of pings on an idle connection: the agent notices a dead broker, and
    the broker a dead agent, within 1.5 times this."""
    protocol: Annotated[Literal["5", "3.1.1"], Format("VERSION", '"5" or "3.1.1", in quotes')] = "5"
    """Version of MQTT. 3.1.1 is for brokers that know no other."""
    username: Text | None = None
    """User name. Not set: none."""
    password_file: SecretFile | None = None
    """File with that user's password. Not set: none."""
    ca_file: InputFile | None = None
    """Certificates (PEM) to trust the broker by. Not set: the system's."""
    certificate: InputFile | None = None
    """Client certificate (PEM), followed by its intermediate certificates, and by its private key if
    that has no file of its own. Not set: none."""

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return urlsplit(self.broker).scheme == "mqtts"

    @property
    def address(self) -> Address:
        """Where the broker is."""
        parts = urlsplit(self.broker)
        return Address(parts.hostname or "", parts.port or (MQTTS_PORT if self.tls else MQTT_PORT))

    @property
    def private_key(self) -> Path | None:
        """The file of the certificate's private key; None if it is in the certificate's own."""
        return None

    def contradictions(self) -> Iterator[tuple[str, str]]:
        yield from self.needs("password_file", "username")
        for key in ("ca_file", "certificate"):
            if getattr(self, key) is not None and not self.tls:
                yield key, "is for a broker with TLS: use mqtts://, or leave it out"
        if self.password_file is not None and is_exposed(self.broker):
            yield "broker", f"{self.broker} would carry the password unencrypted: use mqtts://"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mqtt(Broker):
    """Announces role and epoch to a broker."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "broker": "mqtts://broker.example:8883",
        "topic_prefix": "plant/failover",
        "username": "failover",
        "password_file": "/etc/failover-agent/mqtt-password",
        "ca_file": "/etc/failover-agent/mqtt-ca.pem",
    }

    key: SecretFile | None = None
    """That certificate's private key (PEM). Not set: it is in certificate."""
    client_id: Text | None = None
    """MQTT client id; no two clients of a broker may have the same. Not set: made of group and
    session id, always the same, 23 letters and digits."""
    payload: Literal["json", "sparkplug"] = "json"
    """What is announced: json, each session and the group's primary; sparkplug, the STATE of a
    Sparkplug B 3.0 host application, online while a member is primary."""
    topic_prefix: Annotated[str, Format("TOPIC", "topic", check=_check_prefix)] = "failover"
    """Prefix of the topics of payload json."""
    sparkplug_host_id: Annotated[
        str | None,
        Format("ID", "1 to 256 characters, no '+', '#' and '/'", check=_check_host_id),
    ] = None
    """Host id in the topic of payload sparkplug; the same for all members, and what edge nodes
    have as their primary host. Not set: the group's id."""

    @property
    def private_key(self) -> Path | None:
        return self.key

    def contradictions(self) -> Iterator[tuple[str, str]]:
        yield from Broker.contradictions(self)
        yield from self.needs("key", "certificate")
        if self.sparkplug_host_id is not None and self.payload != "sparkplug":
            yield "sparkplug_host_id", 'is for payload = "sparkplug": set that, or leave it out'
