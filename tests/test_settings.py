"""Settings: which source counts, what is refused, and that each refusal says where and what is right."""

import os
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.timing import Budget
from agent.errors import ConfigError, ExitCode, TimingError
from agent.schema.addresses import Address, is_loopback
from agent.schema.coordinator_settings import CoordinatorSettings, default_data_dir
from agent.schema.fields import Settings, settings_of
from agent.schema.read import Sources, validate
from agent.schema.secret_files import read_secret
from agent.schema.settings import AgentSettings
from agent.schema.toml import to_toml
from tests.declarations import format_text, load, sample


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("FAILOVER_", "STATE_DIRECTORY", "XDG_STATE_HOME")):
            monkeypatch.delenv(name)


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def secret(tmp_path: Path, text: str = "hunter2\n", mode: int = 0o600) -> str:
    path = tmp_path / "secret"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def faults(
    model: type[Settings], flags: Mapping[str, Any] | None = None, path: Path | None = None
) -> tuple[list[str], ExitCode]:
    with pytest.raises(ConfigError) as caught:
        load(model, flags, path)
    return str(caught.value).split("\n"), caught.value.exit_code


# --- which source counts


def test_a_flag_goes_before_a_variable_before_the_file_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(tmp_path, 'group = "f"\nsession_id = "f"\nsession_name = "f"\n')
    monkeypatch.setenv("FAILOVER_AGENT_GROUP", "e")
    monkeypatch.setenv("FAILOVER_AGENT_SESSION_ID", "e")
    origin = Sources(AgentSettings, {"group": "x", "session_id": None}, path)
    settings = origin.load()
    keys = ("group", "session_id", "session_name", "failover_timeout")
    assert [getattr(settings, key) for key in keys] == ["x", "e", "f", 10.0]
    assert [origin.origin(key) for key in keys] == [
        "--group",
        "FAILOVER_AGENT_SESSION_ID",
        str(path),
        "default",
    ]


def test_construction_alone_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILOVER_AGENT_GROUP", "e")
    assert validate(AgentSettings, {}).group == ""


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        AgentSettings().group = "x"  # type: ignore[misc] # what is tested


def test_the_other_failover_variables_and_the_other_programs_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAILOVER_EVENT", "promote")
    monkeypatch.setenv("FAILOVER_COORDINATOR_TYPO", "1")
    load(AgentSettings)


# --- forms


@pytest.mark.parametrize(
    "given_value", [2.5, "2.5", " 2.5 ", "00:00:02.5", "0:00:02.5", "00:00:02.5000000", "PT2.5S"]
)
def test_a_duration_is_read_from_seconds_time_spans_and_iso_8601(given_value: object) -> None:
    assert validate(AgentSettings, {"beat": given_value}).beat == 2.5


@pytest.mark.parametrize(
    "given_value",
    ["", "soon", "P1Y", "nan", "inf", True, [1], 10**400, "1e999", None],
    ids=str,
)
def test_what_is_no_duration_is_refused_with_what_would_be_right(given_value: object) -> None:
    with pytest.raises(ConfigError, match=r"PT2\.5S"):
        validate(AgentSettings, {"hook_limit": given_value})


@given(st.floats(min_value=1e-3, max_value=24 * 86400))
def test_any_duration_survives_being_written_as_seconds(seconds: float) -> None:
    assert validate(AgentSettings, {"beat": repr(seconds)}).beat == seconds


@pytest.mark.parametrize(
    ("given_value", "right"),
    [
        ("/bin/a 'b c' d", ("/bin/a", "b c", "d")),
        ('["/bin/a", "b c"]', ("/bin/a", "b c")),
        (["/bin/a", ""], ("/bin/a", "")),
        (" http://127.0.0.1:9/x?a=b&c ", ("http://127.0.0.1:9/x?a=b&c",)),
        (["https://h/x"], ("https://h/x",)),
        ("", ()),
    ],
)
def test_a_hook_is_read_from_words_json_a_list_or_a_url(
    given_value: object, right: tuple[str, ...]
) -> None:
    assert load(AgentSettings, {"hook_primary": given_value}).hook_primary == right


@pytest.mark.parametrize(
    ("given_value", "why"),
    [
        ("bin/a", "absolute path"),
        ("/bin/a 'b", "shell splits"),
        ("[", "list in JSON"),
        ("[" * 100_000, "list in JSON"),
        ("[1]", "list of strings"),
        (5, "list of strings"),
        (["/bin/a\0"], "NUL"),
    ],
)
def test_what_is_no_command_is_refused(given_value: object, why: str) -> None:
    assert why in faults(AgentSettings, {"hook_primary": given_value})[0][0]


def test_endpoints_are_separated_by_commas_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "FAILOVER_AGENT_ENDPOINT", "http://a/clientfailover, https://b/clientfailover/"
    )
    right = ("http://a/clientfailover", "https://b/clientfailover")
    assert load(AgentSettings).endpoint == right
    monkeypatch.setenv("FAILOVER_AGENT_ENDPOINT", '["http://a/clientfailover"]')
    assert load(AgentSettings).endpoint == right[:1]


def test_the_scheme_of_a_url_is_kept_in_lower_case() -> None:
    """Whoever asks whether a connection is encrypted compares it: etcd by HTTP:// was not refused."""
    assert load(AgentSettings, {"endpoint": "HTTPS://A/Clientfailover"}).endpoint == (
        "https://A/Clientfailover",
    )
    plain = {"store": "etcd", "etcd_endpoint": "HTTP://etcd-1:2379", "advertise": "Https://b:1"}
    (told,), _ = faults(CoordinatorSettings, plain)
    assert "http://etcd-1:2379 carries roles and credentials unencrypted" in told


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://a/clientfailover", "must be http(s)://HOST"),
        ("http:///clientfailover", "must be http(s)://HOST"),
        ("http://a:0/clientfailover", "Port out of range 1-65535"),
        (
            "http://a/clientfailover,http://b",
            ": 'http://b' must be the base path up to clientfailover",
        ),
        ("http://a:99999/clientfailover", "Port"),
        ("http://[::1/clientfailover", "must be a URL"),
        ("http://a/clientfailover?x=1", "must be http(s)://HOST[:PORT][/PATH], and nothing else"),
        ("http://a", "up to clientfailover"),
        ("", "1 to 16"),
    ],
)
def test_what_is_no_endpoint_is_refused(url: str, why: str) -> None:
    assert why in faults(AgentSettings, {"endpoint": url})[0][0]


def test_the_values_of_a_repeated_flag_are_shown_as_they_were_given() -> None:
    told = faults(AgentSettings, {"endpoint": ("ftp://a/b", "http://c")})[0][0]
    assert told.startswith("--endpoint 'ftp://a/b' 'http://c': ")


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    told = faults(AgentSettings, {"endpoint": "http://u:hunter2@a/clientfailover"})[0][0]
    assert "password_file" in told
    assert "hunter2" not in told


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("127.0.0.1:0", Address("127.0.0.1", 0)),
        ("[::1]:80", Address("::1", 80)),
        ("localhost:65535", Address("localhost", 65535)),
        ("off", None),
    ],
)
def test_a_listening_address_is_read_and_written_back(text: str, right: Address | None) -> None:
    settings = validate(AgentSettings, {"probe_listen": text})
    assert settings.probe_listen == right
    assert (str(settings.probe_listen) if right else "off") == text


@pytest.mark.parametrize(
    "text", ["", "5470", ":5470", "::1:80", "a:65536", "[a]:1", "a:-1", "a:1\n"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        validate(AgentSettings, {"probe_listen": text})


@pytest.mark.parametrize("text", ["", "a/b", "a\n", "x" * 257, ".", "..", "a\x7f"])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        validate(AgentSettings, {"session_id": text})


@pytest.mark.parametrize("value", [True, "many", 1.5, 0, 10**9])
def test_what_is_no_count_is_refused(value: object) -> None:
    with pytest.raises(ConfigError):
        validate(CoordinatorSettings, {"max_sessions_per_group": value})


def test_log_levels_are_read_in_any_case() -> None:
    assert load(AgentSettings, {"log_level": "debug"}).log_level == "DEBUG"


# --- refusals


def test_each_fault_is_one_line_with_its_place_and_the_first_gives_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(tmp_path, "failover_score = 101\nhook_limit = 0\n")
    monkeypatch.setenv("FAILOVER_AGENT_COOLDOWN", "a\nb")
    told, code = faults(AgentSettings, {"beat": "soon"}, path)
    assert code is ExitCode.CONFIG_VALUE
    assert sorted(line.split(": ")[0] for line in told) == sorted(
        ["--beat 'soon'", r"FAILOVER_AGENT_COOLDOWN='a\nb'", str(path), str(path)]
    )
    assert any("failover_score = 101: must be less than or equal to 100" in line for line in told)


def test_an_unknown_key_is_named_with_the_setting_that_was_meant(tmp_path: Path) -> None:
    path = file(tmp_path, "falover_timeout = 3\nfailover_score = 101\n")
    told, code = faults(AgentSettings, path=path)
    assert code is ExitCode.CONFIG_UNKNOWN_KEY
    assert told[0] == (
        f"{path}: there is no setting 'falover_timeout': did you mean failover_timeout?"
    )
    assert len(told) == 2


def test_a_table_is_answered_with_where_settings_stand(tmp_path: Path) -> None:
    told, code = faults(AgentSettings, path=file(tmp_path, '[zzz]\ngroup = "x"\n'))
    assert code is ExitCode.CONFIG_UNKNOWN_KEY
    assert "top level" in told[0]


def test_an_unknown_variable_is_refused_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILOVER_AGENT_PASSWORD_FIL", "hunter2")
    told, code = faults(AgentSettings)
    assert code is ExitCode.CONFIG_UNKNOWN_KEY
    assert told == [
        "environment: there is no setting 'FAILOVER_AGENT_PASSWORD_FIL':"
        " did you mean FAILOVER_AGENT_PASSWORD_FILE?"
    ]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'group = "a"\nbeat = = 1\n', "line 2"),
        (b"group = '\xff'\n", "UTF-8 (byte 9)"),
        (b"a = " + b"[" * 10_000, "not TOML"),
        (b"#" * (1 << 20) + b"\n", "cannot be read: it has more than 1048576 bytes"),
    ],
)
def test_a_file_that_is_not_toml_is_refused_with_the_place(
    tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(content)
    told, code = faults(AgentSettings, path=path)
    assert code is ExitCode.CONFIG_FILE
    assert len(told) == 1
    assert str(path) in told[0]
    assert why in told[0]


def test_a_missing_file_or_a_directory_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        told, code = faults(AgentSettings, path=path)
        assert code is ExitCode.CONFIG_FILE
        assert len(told) == 1


def test_a_long_value_is_cut_in_its_error() -> None:
    told, _ = faults(AgentSettings, {"group": "x" * 10_000})
    assert len(told[0]) < 200


# --- relations


@pytest.mark.parametrize(
    ("flags", "key", "why"),
    [
        ({"username": "u"}, "--username", "needs password_file"),
        ({"client_id": "c"}, "--client-id", "needs client_secret_file"),
        ({"token_endpoint": "https://t"}, "--token-endpoint", "needs client_id"),
        ({"cooldown": 400}, "cooldown_limit (default)", "at least cooldown, which is 400 s"),
    ],
)
def test_settings_that_belong_together_are_asked_for_together(
    flags: dict[str, Any], key: str, why: str
) -> None:
    told, code = faults(AgentSettings, flags)
    assert code is ExitCode.CONFIG_VALUE
    assert len(told) == 1
    assert told[0].startswith(key)
    assert why in told[0]


def test_two_kinds_of_authentication_are_refused(tmp_path: Path) -> None:
    name = secret(tmp_path)
    flags = {"username": "u", "password_file": name, "client_id": "c", "client_secret_file": name}
    assert "keep one" in faults(AgentSettings, flags)[0][0]


def test_a_secret_goes_over_plain_http_only_on_this_machine(tmp_path: Path) -> None:
    flags = {"username": "u", "password_file": secret(tmp_path)}
    load(AgentSettings, flags)
    load(AgentSettings, {**flags, "endpoint": "https://a/clientfailover"})
    told, _ = faults(AgentSettings, {**flags, "endpoint": "http://a/clientfailover"})
    assert "unencrypted: use https" in told[0]
    client = {"client_id": "c", "client_secret_file": flags["password_file"]}
    told, _ = faults(AgentSettings, {**client, "token_endpoint": "http://a/token"})
    assert told[0].startswith("--token-endpoint")


def test_a_secret_that_others_can_read_or_that_is_missing_is_refused(tmp_path: Path) -> None:
    told, _ = faults(
        AgentSettings, {"password_file": secret(tmp_path, mode=0o644), "username": "u"}
    )
    assert "its mode is 644, right is 600" in told[0]
    told, _ = faults(AgentSettings, {"password_file": str(tmp_path / "none"), "username": "u"})
    assert "exists" in told[0]
    load(AgentSettings, {"password_file": secret(tmp_path, mode=0o640), "username": "u"})


@pytest.mark.parametrize("key", ["ca_file", "hook_directory", "state_file", "hook_primary"])
@pytest.mark.parametrize("path", ["/" + "x" * 256, "/x" * 2048])
def test_a_path_that_is_too_long_for_linux_is_refused(key: str, path: str) -> None:
    """It ended as a fault of the program: the look whether there is such a file raised."""
    value = [path] if key == "hook_primary" else path
    [why], code = faults(AgentSettings, {"group": "g", key: value})
    assert why.endswith(": must have at most 4095 bytes, and 255 in each name")
    assert code is ExitCode.CONFIG_VALUE


def test_a_relative_path_is_made_absolute_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 14: the guard's working directory is another one, and the agent's may be removed."""
    monkeypatch.chdir(tmp_path)
    secret(tmp_path)
    relative = {"group": "g", "state_file": "s.json", "webhook_ca_file": "secret"}
    settings = validate(AgentSettings, {**relative, "webhook_secret_file": "secret"})
    assert settings.state_file == tmp_path / "s.json"
    assert settings.webhook_ca_file == settings.webhook_secret_file == tmp_path / "secret"


def test_a_relative_path_is_refused_without_a_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    [why], code = faults(AgentSettings, {"group": "g", "state_file": "s.json"})
    assert "must be an absolute path, as the working directory does not exist" in why
    assert code is ExitCode.CONFIG_VALUE


@pytest.mark.parametrize("text", ["", "\n", "a\nb\n", "x" * 5000, "a\0"])
def test_a_file_that_holds_no_secret_is_refused_without_repeating_it(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_secret(Path(secret(tmp_path, text)))
    assert str(caught.value).count("\n") == 0
    assert "xxx" not in str(caught.value)


def test_a_secret_is_read_without_the_end_of_its_line(tmp_path: Path) -> None:
    assert read_secret(Path(secret(tmp_path, "pass word\r\n"))) == "pass word"


def test_a_budget_that_breaks_r1_is_a_timing_error() -> None:
    settings = load(AgentSettings, {"failover_timeout": 2, "demote": 1, "renew": "1"})
    assert settings.budget == Budget(renew_s=1.0, demote_s=1.0)
    with pytest.raises(TimingError, match="R1") as caught:
        _ = settings.timing
    assert caught.value.smallest_lease_s > 2


# --- the coordinator's own


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"listen": "0.0.0.0:1"}, "without TLS (tls_certificate and tls_key) and authentication"),
        ({"listen": "[::]:1"}, "--insecure"),
        ({"tls_certificate": __file__}, "needs tls_key"),
        ({"token_keys_file": __file__}, "needs token_issuer and token_audience"),
    ],
)
def test_a_coordinator_that_is_open_to_others_is_refused(flags: dict[str, Any], why: str) -> None:
    assert why in faults(CoordinatorSettings, flags)[0][0]


def test_beyond_this_machine_a_coordinator_needs_tls_and_users_or_insecure(tmp_path: Path) -> None:
    name = secret(tmp_path)
    load(CoordinatorSettings, {"listen": "0.0.0.0:1", "insecure": True})
    full = {"listen": "0.0.0.0:1", "tls_certificate": name, "tls_key": name, "users_file": name}
    load(CoordinatorSettings, full)
    told, _ = faults(CoordinatorSettings, {**full, "users_file": None})
    assert "authentication" in told[0]
    assert "TLS" not in told[0]


def test_the_data_directory_is_systemds_then_the_systems_then_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environ = {"STATE_DIRECTORY": "/s/a:/s/b", "XDG_STATE_HOME": "/x"}
    assert default_data_dir(environ, root=True) == Path("/s/a")
    assert default_data_dir({}, root=True) == Path("/var/lib/failover-agent")
    assert default_data_dir({"XDG_STATE_HOME": "/x"}, root=False) == Path("/x/failover-agent")
    monkeypatch.setenv("HOME", "/h")
    right = Path("/h/.local/state/failover-agent")
    assert default_data_dir({"XDG_STATE_HOME": "relative"}, root=False) == right


def test_a_coordinator_without_a_data_directory_uses_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/unit")
    assert validate(CoordinatorSettings, {}).data_dir == Path("/var/lib/unit")


def test_what_is_this_machine_is_known_without_a_name_server() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "localhost.example", ""]))


# --- describing


@pytest.mark.parametrize("model", [AgentSettings, CoordinatorSettings])
def test_every_setting_is_described_with_a_form_and_a_flag(model: type[Settings]) -> None:
    settings = settings_of(model)
    assert [s.name for s in settings] == [f.name for f in fields(model)]  # type: ignore[arg-type] # a dataclass each
    assert all(format_text(s) and s.doc and (s.tables or sample(s) != "") for s in settings)


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (0.1, "0.1"), (("a", 'b"'), '["a", "b\\""]'), (Path("/x"), '"/x"')],
)
def test_a_value_is_written_as_toml(value: object, text: str) -> None:
    assert to_toml(value) == text


@pytest.mark.parametrize("proxy", [None, "http://127.0.0.1:3128", "https://proxy.example"])
def test_a_secret_leaves_this_machine_in_plain_http_by_no_proxy_either(
    tmp_path: Path, proxy: str | None
) -> None:
    flags = {"username": "u", "password_file": secret(tmp_path)}
    if proxy is not None:
        flags["proxy"] = proxy
    if proxy == "https://proxy.example":
        told, _ = faults(AgentSettings, flags)
        assert "unencrypted: use https" in told[0]
    else:
        load(AgentSettings, flags)


@pytest.mark.parametrize(
    ("flags", "right"),
    [
        ({"proxy": "http://user:hunter2@proxy:3128"}, "use proxy_username and proxy_password_file"),
        ({"proxy": "http://proxy:3128/path"}, "must be http(s)://HOST[:PORT], and nothing else"),
        ({"proxy": "socks5://proxy:1080"}, "must be http(s)://HOST[:PORT]"),
        ({"proxy_username": "u", "proxy_password_file": "{secret}"}, "needs proxy too"),
        ({"proxy": "http://proxy:3128", "proxy_username": "u"}, "needs proxy_password_file too"),
        ({"client_key": "{secret}"}, "needs client_certificate too"),
        ({"probe_tls_key": "{secret}"}, "needs probe_tls_certificate too"),
        ({"probe_username": "u"}, "needs probe_password_file too"),
        (
            {"probe_username": "u", "probe_password_file": "{secret}", "probe_listen": "off"},
            "cannot be off",
        ),
    ],
)
def test_settings_of_proxy_and_probe_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, flags: dict[str, str], right: str
) -> None:
    given = {name: value.format(secret=secret(tmp_path)) for name, value in flags.items()}
    (told, *_), _ = faults(AgentSettings, given)
    assert right in told
    assert "hunter2" not in told


FAILSAFE = {"failsafe_listen": "192.0.2.1:5480", "failsafe_secret_file": "{secret}"}
TLS = {"failsafe_certificate": "{secret}", "failsafe_key": "{secret}"}


@pytest.mark.parametrize(
    ("flags", "right"),
    [
        ({"failsafe_listen": "192.0.2.1:5480"}, "needs failsafe_secret_file too"),
        ({"failsafe_secret_file": "{secret}"}, "needs failsafe_listen too"),
        ({"failsafe_url": "http://a:1"}, "needs failsafe_listen and failsafe_secret_file too"),
        (TLS, "needs failsafe_listen and failsafe_secret_file too"),
        ({**FAILSAFE, "failsafe_key": "{secret}"}, "needs failsafe_certificate too"),
        ({**FAILSAFE, "failsafe_ca_file": "{secret}"}, "needs failsafe_certificate and"),
        ({**FAILSAFE, "failsafe_listen": "0.0.0.0:5480"}, "set failsafe_url too"),
        ({**FAILSAFE, "failsafe_listen": "[::]:5480"}, "set failsafe_url too"),
        ({**FAILSAFE, "failsafe_listen": "localhost:5480"}, "set failsafe_url too"),
        ({**FAILSAFE, "failsafe_listen": "192.0.2.1:0"}, "set failsafe_url too"),
        ({**FAILSAFE, "failsafe_url": "https://a:1"}, "must be http://"),
        ({**FAILSAFE, **TLS, "failsafe_url": "http://a:1"}, "must be https://"),
        ({**FAILSAFE, "failsafe_url": "http://a"}, "http(s)://HOST:PORT"),
        ({**FAILSAFE, "failsafe_url": "http://a:1/path"}, "http(s)://HOST:PORT"),
        ({**FAILSAFE, "failsafe_url": "http://u:hunter2@a:1"}, "use failsafe_secret_file"),
        ({**FAILSAFE, "failsafe_url": f"http://{'a' * 250}:1"}, "at most 256 characters"),
    ],
)
def test_settings_of_failsafe_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, flags: dict[str, str], right: str
) -> None:
    given = {name: value.format(secret=secret(tmp_path)) for name, value in flags.items()}
    told, _ = faults(AgentSettings, given)
    assert any(right in one for one in told)
    assert not any("hunter2" in one for one in told)


@pytest.mark.parametrize(
    ("flags", "url"),
    [
        ({}, None),
        (FAILSAFE, "http://192.0.2.1:5480"),
        ({**FAILSAFE, "failsafe_listen": "[2001:db8::1]:5480"}, "http://[2001:db8::1]:5480"),
        ({**FAILSAFE, **TLS}, "https://192.0.2.1:5480"),
        ({**FAILSAFE, "failsafe_url": "http://a.example:1/"}, "http://a.example:1"),
        (
            {**FAILSAFE, "failsafe_listen": "0.0.0.0:0", "failsafe_url": "http://a:1"},
            "http://a:1",
        ),
    ],
)
def test_other_members_reach_failsafe_by_one_url(
    tmp_path: Path, flags: dict[str, str], url: str | None
) -> None:
    given = {name: value.format(secret=secret(tmp_path)) for name, value in flags.items()}
    settings = load(AgentSettings, given)
    assert settings.member_url == url
    assert settings.timing.failsafe is (url is not None)


@pytest.mark.parametrize("names", ["a:80", "a b", "http://a", "-a", "a." * 200, ",".join("a" * 17)])
def test_what_is_no_list_of_host_names_is_refused(names: str) -> None:
    (told, *_), _ = faults(CoordinatorSettings, {"host_names": names})
    assert "a name of a host" in told or "at most 16 names of hosts" in told


def test_host_names_are_separated_by_commas() -> None:
    read = load(CoordinatorSettings, {"host_names": "a, b.example,10.0.0.1"})
    assert read.host_names == ("a", "b.example", "10.0.0.1")


def test_a_text_that_is_not_utf_8_is_refused_where_it_was_given() -> None:
    """It could not be sent: the join would fail for ever."""
    texts = [setting.name for setting in settings_of(AgentSettings) if setting.value_type is str]
    assert {"group", "session_name"} <= set(texts)
    for name in texts:
        lines, code = faults(AgentSettings, {name: "x\udcff"})
        assert "\\udcff': must be a" in lines[0], lines
        assert code == ExitCode.CONFIG_VALUE


def test_a_list_that_may_be_empty_has_no_least_number() -> None:
    given = {"etcd_endpoint": tuple(f"http://h{number}:2379" for number in range(17))}
    lines, _ = faults(CoordinatorSettings, given)
    assert lines[0].endswith(": must be at most 16 URLs")


@pytest.mark.parametrize("password", ["zwei/drei", "zwei drei", "zwei@drei", "zwei'drei", "zwei"])
@pytest.mark.parametrize("host", ["h", "h:80", "h℀x", "[::1"])
@pytest.mark.parametrize("name", ["endpoint", "proxy", "token_endpoint", "hook_lost", "group"])
def test_no_refusal_repeats_the_password_of_a_url(name: str, host: str, password: str) -> None:
    """Not even one that makes the URL invalid, whose error would quote a part of it."""
    lines, _ = faults(AgentSettings, {name: f"https://u:{password}@{host}/clientfailover"})
    assert "***@" in lines[0]
    assert not any(part in lines[0] for part in ("zwei", "drei"))
