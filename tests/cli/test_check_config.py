"""check-config: what is in force and from where, or what is wrong; nothing is started."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.drivers.failsafe.access import load_failsafe_access
from agent.drivers.rest.configured import load_server_access
from agent.errors import ConfigError, ExitCode
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.settings import AgentSettings
from tests.declarations import load

Cli = Callable[..., tuple[int, str, str]]


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def test_what_it_prints_is_toml_that_means_the_same(cli: Cli, tmp_path: Path) -> None:
    path = config(
        tmp_path,
        'group = "g"\nhook_primary = ["/bin/true", "a \\"b\\""]\nbeat = 0.5\nprobe_listen = "off"\n',
    )
    code, out, _ = cli("check-config", "--config", str(path))
    again = config(tmp_path, out)
    assert code == 0
    assert load(AgentSettings, path=again) == AgentSettings(
        group="g", hook_primary=("/bin/true", 'a "b"'), beat=0.5, probe_listen=None
    )


def test_each_value_is_printed_with_its_origin(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(tmp_path, 'group = "g"\n')
    monkeypatch.setenv("FAILOVER_AGENT_BEAT", "PT1S")
    code, out, _ = cli("check-config", "--config", str(path), "--json")
    told = json.loads(out)
    assert code == 0
    assert told["settings"]["group"] == {"value": "g", "from": str(path)}
    assert told["settings"]["beat"] == {"value": 1.0, "from": "FAILOVER_AGENT_BEAT"}
    assert told["settings"]["demote"] == {"value": None, "from": "default"}
    assert told["timing"]["heartbeat_interval_s"] == 1.0
    assert told["timing"]["demote_s"] == 2.5


def test_the_coordinators_settings_are_checked_on_request(cli: Cli, tmp_path: Path) -> None:
    path = config(tmp_path, "max_groups = 5\n")
    code, out, _ = cli("check-config", "--coordinator", "--config", str(path))
    assert code == 0
    assert f"max_groups = 5  # from {path}" in out.splitlines()
    assert load(CoordinatorSettings, path=config(tmp_path, out)).max_groups == 5
    assert cli("check-config", "--config", str(path))[0] == ExitCode.CONFIG_UNKNOWN_KEY


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("group = ", ExitCode.CONFIG_FILE),
        ("grup = 1", ExitCode.CONFIG_UNKNOWN_KEY),
        ("", ExitCode.CONFIG_VALUE),
        ('group = "g"\nmargin = 0.01', ExitCode.TIMING),
        ('group = "g"\nhook_primary = ["/none"]', ExitCode.HOOK_MISSING),
        ('group = "g"\nhook_primary = ["/etc/passwd"]', ExitCode.HOOK_NOT_EXECUTABLE),
    ],
)
def test_what_is_wrong_is_one_line_with_its_own_code(
    cli: Cli, tmp_path: Path, text: str, right: ExitCode
) -> None:
    code, out, err = cli("check-config", "--config", str(config(tmp_path, text)))
    assert (code, out) == (right, "")
    assert err.count("\n") == 1


def test_a_failsafe_url_that_another_host_may_have_is_warned_of(cli: Cli, tmp_path: Path) -> None:
    (secret := tmp_path / "secret").write_text("c2VjcmV0" * 8)
    secret.chmod(0o600)
    text = f'group = "g"\nfailsafe_secret_file = "{secret}"\nfailsafe_listen = "127.0.0.1:5480"\n'
    code, _, err = cli("check-config", "--config", str(config(tmp_path, text)))
    assert (code, err) == (0, "")
    text += 'endpoint = ["http://192.0.2.1:8080/api/v1/clientfailover"]\n'
    code, _, err = cli("check-config", "--config", str(config(tmp_path, text)))
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("warning: failsafe_url: http://127.0.0.1:5480: 127.0.0.1 is a loopback")


LOGIN = 'username = "u"\npassword_file = "{file}"\n'
FAILSAFE = 'failsafe_listen = "127.0.0.1:5480"\nfailsafe_secret_file = "{file}"\n'
PROXY = 'proxy = "http://p:1"\nproxy_username = "u"\nproxy_password_file = "{file}"\n'
CLIENT = 'client_id = "c"\nclient_secret_file = "{file}"\n'


@pytest.mark.parametrize(
    ("text", "content", "load_at_start"),
    [
        (LOGIN, b"", load_server_access),
        (LOGIN, b"two\nlines\n", load_server_access),
        (CLIENT, b"\xff\n", load_server_access),
        (PROXY, b"x" * 5000, load_server_access),
        ('ca_file = "{file}"\n', b"no certificate\n", load_server_access),
        ('client_certificate = "{file}"\nclient_key = "{file}"\n', b"x\n", load_server_access),
        (FAILSAFE, b"too short\n", load_failsafe_access),
        (FAILSAFE, 3 * b"one line too many\n", load_failsafe_access),
    ],
)
def test_files_are_read_with_the_same_errors_as_at_the_start(
    cli: Cli,
    tmp_path: Path,
    text: str,
    content: bytes,
    load_at_start: Callable[[AgentSettings], object],
) -> None:
    file = tmp_path / "secret"
    file.touch(0o600)
    file.write_bytes(content)
    path = config(tmp_path, 'group = "g"\n' + text.format(file=file))
    with pytest.raises(ConfigError) as at_start:
        load_at_start(load(AgentSettings, path=path))
    code, out, err = cli("check-config", "--config", str(path))
    assert (code, out) == (at_start.value.exit_code, "")
    assert err.count("\n") == 1
    assert str(at_start.value) in err


@pytest.mark.parametrize("text", [LOGIN, FAILSAFE, PROXY, CLIENT])
@pytest.mark.parametrize(("mode", "why"), [(None, "a file that exists"), (0o604, "others")])
def test_a_secret_that_is_missing_or_readable_by_others_is_one_line(
    cli: Cli, tmp_path: Path, text: str, mode: int | None, why: str
) -> None:
    file = tmp_path / "secret"
    if mode is not None:
        file.write_text("c2VjcmV0" * 8)
        file.chmod(mode)
    path = config(tmp_path, 'group = "g"\n' + text.format(file=file))
    code, out, err = cli("check-config", "--config", str(path))
    assert (code, out) == (ExitCode.CONFIG_VALUE, "")
    assert err.count("\n") == 1
    assert "_file = " in err or str(file) in err, "a long path is cut"
    assert why in err


@pytest.mark.parametrize(
    "text",
    [
        'users_file = "{file}"\n',
        'tls_certificate = "{file}"\ntls_key = "{file}"\n',
        'store = "etcd"\nadvertise = "http://127.0.0.1:1"\netcd_endpoint = ["http://127.0.0.1:2379"]\netcd_username = "u"\netcd_password_file = "{file}"\n',
    ],
)
def test_the_coordinators_files_are_read(cli: Cli, tmp_path: Path, text: str) -> None:
    file = tmp_path / "secret"
    file.touch(0o600)
    path = config(tmp_path, text.format(file=file))
    code, out, err = cli("check-config", "--coordinator", "--config", str(path))
    assert (code, out) == (ExitCode.CONFIG_VALUE, "")
    assert err.count("\n") == 1
    assert str(file) in err


def test_the_command_of_a_check_is_checked_as_a_hook_is(cli: Cli, tmp_path: Path) -> None:
    table = '[[check]]\nname = "{0}"\ntype = "exec"\ncommand = ["{1}"]\n'
    tables = table.format("good", "/bin/true") + table.format("disk", "/no/such/program")
    path = config(tmp_path, f'group = "g"\n{tables}')
    code, _, err = cli("check-config", "--config", str(path))
    assert code == ExitCode.HOOK_MISSING
    assert "check disk: /no/such/program cannot be found" in err
    assert "good" not in err
    assert f"check: {path}" in err


def test_checks_are_printed_as_toml_that_means_the_same(cli: Cli, tmp_path: Path) -> None:
    text = 'group = "g"\n[[check]]\nname = "a"\ntype = "http"\nurl = "http://h/"\nstatus = 204\n'
    path = config(tmp_path, text)
    before = load(AgentSettings, path=path)
    code, out, _ = cli("check-config", "--config", str(path))
    assert code == 0
    assert load(AgentSettings, path=config(tmp_path, out)) == before
