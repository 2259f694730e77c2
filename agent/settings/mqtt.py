"""The ``[mqtt]`` table: where role changes are announced; and what any connection to a broker needs.

Owns what a broker's address, credentials and topics may be. Refuses to know how they are used
(ops/mqtt.py, drivers/mqtt.py).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PlainSerializer, PlainValidator

from agent.settings import values
from agent.settings.forms import (
    NUMBER,
    Duration,
    InputFile,
    Kind,
    SecretFile,
    Text,
)
from agent.settings.tables import Table, as_table, read_table
from agent.settings.values import is_loopback

LONGEST_TOPIC = 1024
"""Characters; MQTT's own limit is 65535 bytes."""


def broker_url(value: str) -> str:
    """The same URL. Raises ValueError."""
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"must be a URL: {error}") from None
    if parts.scheme not in {"mqtt", "mqtts"} or not parts.hostname or port == 0:
        raise ValueError("must be mqtt://HOST:PORT or mqtts://HOST:PORT")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not have credentials in it: use username and password_file")
    if parts.path.strip("/") or parts.query or parts.fragment or not value.isprintable():
        raise ValueError("must have nothing after the port")
    return value


def topic_name(value: str) -> str:
    """The same topic. Raises ValueError."""
    if re.search(r"[+#\0]", value):
        raise ValueError("must be one topic, without the wildcards + and #")
    return value


def _prefix(value: str) -> str:
    if topic_name(value).startswith("$") or not all(value.split("/")) or not value.isprintable():
        raise ValueError(
            "must be names with / between, and must not begin with $, the broker's own"
        )
    return value


def _host_id(value: str) -> str:
    if re.search(r"[+#/\0]", value) or not value.isprintable():
        raise ValueError("must be printable, without +, # and /")
    return value


Topic = Annotated[
    str,
    Field(min_length=1, max_length=LONGEST_TOPIC),
    AfterValidator(topic_name),
    Kind("TOPIC", "topic"),
]
Protocol = Annotated[values.Protocol, Kind("VERSION", '"5" or "3.1.1", in quotes')]
Seconds = Annotated[int, NUMBER, Field(ge=1, le=65535), Kind("SECONDS", "whole seconds to 65535")]


class BrokerForm(Table):
    """What a connection to a broker needs. Durations are seconds."""

    broker: Annotated[str, AfterValidator(broker_url), Kind("URL", "mqtt or mqtts URL")] = Field(
        description="mqtt://HOST:PORT, or mqtts:// for TLS. Without PORT: 1883, with TLS 8883."
    )
    limit: Annotated[Duration, Kind("DURATION", "duration, more than 0 s to 24 d")] = Field(
        5.0, description="How long the broker may take to answer. It may be far away, and busy."
    )
    keepalive: Seconds = Field(
        10,
        description="Between pings of an idle connection: a dead broker is noticed, and by the"
        " broker a dead client, within 1.5 times this.",
    )
    protocol: Protocol = Field(
        "5", description="Version of MQTT. 3.1.1 is for brokers that know no other."
    )
    username: Text | None = Field(None, description="User name. Not set: none.")
    password_file: SecretFile | None = Field(
        None, description="File with that user's password. Not set: none."
    )
    ca_file: InputFile | None = Field(
        None, description="Certificates (PEM) to trust the broker by. Not set: the system's."
    )
    certificate: InputFile | None = Field(
        None,
        description="Client certificate (PEM) with, after it, what leads to its authority, and its"
        " private key if that has no file of its own. Not set: none.",
    )

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        tls, host = values.is_tls(self.broker), values.broker_address(self.broker).host
        if self.password_file is not None and self.username is None:
            yield "password_file", "needs username too"
        for key in ("ca_file", "certificate"):
            if getattr(self, key) is not None and not tls:
                yield key, "is for a broker with TLS: use mqtts://, or leave it out"
        if self.password_file is not None and not tls and not is_loopback(host):
            yield "broker", f"{self.broker} would carry the password unencrypted: use mqtts://"


class MqttForm(BrokerForm):
    """Announces role and epoch to a broker."""

    plain: ClassVar = values.Mqtt

    key: SecretFile | None = Field(
        None, description="That certificate's private key (PEM). Not set: it is in certificate."
    )
    client_id: Text | None = Field(
        None,
        description="MQTT client id; no two clients of a broker may have the same. Not set: made of"
        " group and session id, always the same, 23 letters and digits.",
    )
    payload: Annotated[values.Payload, Kind("json|sparkplug", "json or sparkplug")] = Field(
        "json",
        description="What is announced: json, each session and the group's primary; sparkplug, the"
        " STATE of a Sparkplug B 3.0 host application, online while a member is primary.",
    )
    topic_prefix: Annotated[
        str,
        Field(min_length=1, max_length=LONGEST_TOPIC),
        AfterValidator(_prefix),
        Kind("TOPIC", "topic"),
    ] = Field("failover", description="What the topics of payload json begin with.")
    sparkplug_host_id: (
        Annotated[
            str,
            Field(min_length=1, max_length=256),
            AfterValidator(_host_id),
            Kind("ID", "1 to 256 characters, no '+', '#' and '/'"),
        ]
        | None
    ) = Field(
        None,
        description="Host id in the topic of payload sparkplug; the same for all members, and what"
        " edge nodes have as their primary host. Not set: the group's id.",
    )

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        yield from super()._contradictions()
        if self.key is not None and self.certificate is None:
            yield "key", "needs certificate too"
        if self.sparkplug_host_id is not None and self.payload != "sparkplug":
            yield "sparkplug_host_id", 'is for payload = "sparkplug": say that, or leave it out'


EXAMPLE: Mapping[str, Any] = {
    "broker": "mqtts://broker.example:8883",
    "topic_prefix": "plant/failover",
    "username": "failover",
    "password_file": "/etc/failover-agent/mqtt-password",
    "ca_file": "/etc/failover-agent/mqtt-ca.pem",
}


def _read(value: object) -> MqttForm | None:
    if value is None or isinstance(value, MqttForm):
        return value
    table: MqttForm = read_table(as_table(value, "mqtt"), MqttForm, "mqtt", "the table [mqtt]")
    return table


def _dump(table: MqttForm | None) -> dict[str, Any] | None:
    return None if table is None else table.model_dump(mode="json", exclude_none=True)


MqttTable = Annotated[
    MqttForm | None,
    PlainValidator(_read),
    PlainSerializer(_dump),
    Kind("JSON", "table [mqtt]"),
]
