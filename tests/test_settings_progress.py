"""The [progress] table: what is taken, and that each refusal names the key and what is right."""

import json
from pathlib import Path
from typing import Any

import pytest

from agent.drivers.progress.file import FileTimeProgress
from agent.drivers.progress.metric import MetricProgress
from agent.drivers.progress.mqtt import MqttProgress
from agent.drivers.progress.unix_socket import SocketProgress
from agent.errors import ConfigError, ExitCode
from agent.schema.addresses import Address
from agent.schema.kinds import DEFAULT_MAX_FUTURE_S, PROGRESS
from agent.schema.mqtt import MQTT_PORT, MQTTS_PORT
from agent.schema.read import validate
from agent.schema.settings import AgentSettings
from agent.schema.toml import to_json
from tests.declarations import load
from tests.reference import sample


@pytest.fixture
def secret(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.write_text("hunter2\n")
    path.chmod(0o600)
    return str(path)


def read(tmp_path: Path, text: str) -> AgentSettings:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return load(AgentSettings, path=path)


def refusal(table: object) -> tuple[str, ExitCode]:
    with pytest.raises(ConfigError) as caught:
        load(AgentSettings, {"progress": json.dumps(table)})
    return str(caught.value), caught.value.exit_code


def test_without_a_table_there_is_no_source() -> None:
    assert load(AgentSettings).progress is None


def test_a_table_of_a_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    table = '[progress]\ntype = "file_time"\npath = "/a"\ninterval = "PT2S"\n'
    assert read(tmp_path, table).progress == FileTimeProgress(
        path=Path("/a"), interval=2.0, limit=1.0, max_future=DEFAULT_MAX_FUTURE_S
    )


def test_a_flag_or_a_variable_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILOVER_AGENT_PROGRESS", '{"type": "socket", "path": "/run/s"}')
    progress = load(AgentSettings).progress
    assert isinstance(progress, SocketProgress)
    assert (progress.path, progress.mode, progress.datagram) == (Path("/run/s"), "0660", False)


def test_what_was_read_is_written_so_that_it_reads_the_same(secret: str) -> None:
    for kind in PROGRESS.kinds:
        example = PROGRESS.load(kind).EXAMPLE
        table = {**example, **{key: secret for key in example if key.endswith("_file")}}
        settings = validate(AgentSettings, {"progress": table})
        again = validate(AgentSettings, {"progress": to_json(settings.progress)})
        assert again.progress == settings.progress
        assert settings.progress is not None


def test_there_is_an_example_of_each_type_in_the_sample(tmp_path: Path, secret: str) -> None:
    parts = sample("run", AgentSettings).split("[progress]\n")[-len(PROGRESS.kinds) :]
    for kind, part in zip(PROGRESS.kinds, parts, strict=True):
        lines = [line.lstrip("# ") for line in part.split("\n\n")[0].splitlines()]
        lines = [f'{x.split(" =")[0]} = "{secret}"' if "_file =" in x else x for x in lines]
        progress = read(tmp_path, "\n".join(["[progress]", *lines])).progress
        assert isinstance(progress, PROGRESS.load(kind))


@pytest.mark.parametrize(
    ("broker", "host", "port", "tls"),
    [
        ("mqtt://h:1", "h", 1, False),
        ("mqtt://h", "h", MQTT_PORT, False),
        ("mqtts://[::1]", "::1", MQTTS_PORT, True),
    ],
)
def test_a_broker_has_an_address(broker: str, host: str, port: int, *, tls: bool) -> None:
    settings = MqttProgress(broker=broker, topic="t")
    assert (settings.address, settings.tls) == (Address(host, port), tls)


def test_a_password_goes_in_clear_to_this_machine_only(secret: str) -> None:
    table = {"type": "mqtt", "topic": "t", "username": "u", "password_file": secret}
    for good in ("mqtt://127.0.0.1", "mqtts://broker.example"):
        settings = validate(AgentSettings, {"progress": {**table, "broker": good}})
        assert isinstance(settings.progress, MqttProgress)
    text, _ = refusal({**table, "broker": "mqtt://broker.example"})
    assert "broker: mqtt://broker.example would carry the password unencrypted" in text


def test_labels_are_strings_and_none_by_default() -> None:
    table = {"type": "metric", "url": "http://127.0.0.1:1/m?x=1", "metric": "a:b_c"}
    settings = validate(MetricProgress, table)
    assert (settings.labels, settings.url) == ({}, "http://127.0.0.1:1/m?x=1")
    assert "labels" in refusal({**table, "labels": {"a": 1}})[0]


FILE = {"type": "file", "path": "/a"}
SOCKET = {"type": "socket", "path": "/a"}
METRIC = {"type": "metric", "url": "http://127.0.0.1:1", "metric": "m"}
MQTT = {"type": "mqtt", "broker": "mqtt://h", "topic": "t"}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("x", "must be a table, under [progress]"),
        ([], "must be a table, under [progress]"),
        ({}, "progress: type: must be one of socket, file_time, file, metric, mqtt, command"),
        ({"type": "fiel"}, "progress: type = 'fiel': must be one of"),
        ({"type": ["file"]}, "progress: type = ['file']: must be one of"),
        ({"type": "file"}, "progress: path: is missing, and a source of type file needs it"),
        ({**FILE, "path": 1}, "progress: path = 1: must be a path"),
        ({**FILE, "interval": 0.01}, "progress: interval = 0.01: must be greater"),
        ({**FILE, "limit": 0}, "progress: limit = 0: must be greater"),
        ({**FILE, "max_future": -1}, "progress: max_future = -1: must be greater"),
        ({**FILE, "key": "a..b"}, "progress: key = 'a..b': must be names"),
        ({**SOCKET, "path": "relative"}, "must be an absolute path"),
        ({**SOCKET, "path": "/" + "x" * 107}, "at most 107 bytes"),
        ({**SOCKET, "mode": 660}, "progress: mode = 660: must be permissions in octal"),
        ({**SOCKET, "mode": "4777"}, 'like "0660"'),
        ({**METRIC, "url": "ftp://h"}, "must be http(s)://HOST[:PORT][/PATH][?QUERY]"),
        ({**METRIC, "metric": "a b"}, "progress: metric = 'a b'"),
        ({**MQTT, "topic": "a/#"}, "without the wildcards"),
        ({**MQTT, "topic": ""}, "progress: topic = ''"),
        ({**MQTT, "broker": "http://h"}, "must be mqtt(s)://HOST[:PORT]"),
        ({**MQTT, "broker": "mqtt://h:99999"}, "must be a URL"),
        ({**MQTT, "broker": "mqtt://h/path"}, "must be mqtt(s)://HOST[:PORT], and nothing else"),
        ({**MQTT, "password_file": __file__}, "must not be readable or writable by others"),
        ({**MQTT, "ca_file": __file__}, "ca_file: is for a broker with TLS"),
        ({"type": "command", "command": []}, "must be a list that begins with a program"),
        ({"type": "command", "command": ["ls"]}, "must start with an absolute path"),
    ],
)
def test_a_wrong_table_is_refused_with_its_key_and_what_is_right(table: Any, says: str) -> None:
    text, code = refusal(table)
    assert says in text
    assert code is ExitCode.CONFIG_VALUE
    assert "--progress" in text


def test_a_password_without_a_user_is_refused(secret: str) -> None:
    assert "password_file: needs username too" in refusal({**MQTT, "password_file": secret})[0]


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    text, _ = refusal({**MQTT, "broker": "mqtt://u:hunter2@h"})
    assert "use username and password_file" in text
    assert "hunter2" not in text


def test_a_misspelt_key_is_named_with_the_right_one_and_has_its_own_exit_code() -> None:
    text, code = refusal({**FILE, "intervall": 1})
    assert "a source of type file has no key 'intervall': did you mean interval?" in text
    assert code is ExitCode.CONFIG_UNKNOWN_KEY


def test_json_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a table in JSON, but"):
        load(AgentSettings, {"progress": "{type: file}"})
