"""healthcheck: asks a probe over a real socket, and exits with 0 or 1."""

import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from agent.cli import healthcheck
from tests.mosquitto import Authority

Cli = Callable[..., tuple[int, str, str]]
NAMES = (
    "RUNTIME_DIRECTORY",
    "FAILOVER_AGENT_STATE_FILE",
    "FAILOVER_AGENT_PROBE_LISTEN",
    "FAILOVER_COORDINATOR_LISTEN",
    "FAILOVER_COORDINATOR_TLS_CERTIFICATE",
    "FAILOVER_AGENT_PROBE_TLS_CERTIFICATE",
    "FAILOVER_AGENT_PROBE_USERNAME",
    "FAILOVER_AGENT_PROBE_PASSWORD_FILE",
)
LOGIN = "Basic bW9uaXRvcmluZzpzZWNyZXQ="  # monitoring:secret


class Handler(BaseHTTPRequestHandler):
    login: str | None = None

    def do_GET(self) -> None:
        if self.login is not None and self.headers["Authorization"] != self.login:
            self.send_error(401)
            return
        self.send_response(200 if self.path in {"/livez", "/healthz"} else 503)
        self.end_headers()
        self.wfile.write(f'{{"asked": "{self.path}"}}'.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    """A probe that is live, and nothing else."""
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def secure(authority: Authority) -> Iterator[tuple[int, Path]]:
    """The port of a probe over TLS, and its certificate, which is for 127.0.0.1."""
    certificate, key = authority.issue("coordinator")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_address[1], certificate
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    return tmp_path


def state(path: Path, probe: object) -> str:
    path.write_text(json.dumps({"role": "Secondary", "probe": probe}))
    return str(path)


def test_an_answer_of_yes_exits_with_0_and_is_printed(cli: Cli, url: str) -> None:
    assert cli("healthcheck", "--probe", url) == (0, '{"asked": "/livez"}\n', "")


@pytest.mark.parametrize("question", ["readyz", "primary", "secondary"])
def test_an_answer_of_no_exits_with_1_and_prints_the_reason(
    cli: Cli, url: str, question: str
) -> None:
    code, _, err = cli("healthcheck", question, "--probe", url)
    assert code == 1
    assert f"{url} answers 503" in err
    assert f"/{question}" in err


def test_a_url_with_a_path_is_asked_as_it_is(cli: Cli, url: str) -> None:
    assert cli("healthcheck", "--probe", f"{url}/healthz")[:2] == (0, '{"asked": "/healthz"}\n')


def test_a_state_file_names_the_probe(cli: Cli, url: str, tmp_path: Path) -> None:
    path = state(tmp_path / "elsewhere.state", url)
    assert cli("healthcheck", "--probe", path)[0] == 0


def test_without_a_flag_the_one_state_file_of_the_host_is_taken(
    cli: Cli, url: str, directory: Path
) -> None:
    state(directory / "line.a.json", url)
    assert cli("healthcheck")[0] == 0
    state(directory / "line.b.json", url)
    code, _, err = cli("healthcheck")
    assert (code, "2 state files" in err) == (1, True)


@pytest.mark.parametrize("name", ["FAILOVER_AGENT_STATE_FILE", "FAILOVER_AGENT_PROBE_LISTEN"])
def test_the_agents_own_variables_name_the_probe(
    cli: Cli, url: str, directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    listen = url.removeprefix("http://")
    value = listen if "LISTEN" in name else state(directory / "state", url)
    monkeypatch.setenv(name, value)
    assert cli("healthcheck")[0] == 0


def test_where_no_agent_is_a_coordinator_is_asked(
    cli: Cli, url: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILOVER_COORDINATOR_LISTEN", url.removeprefix("http://"))
    assert cli("healthcheck")[:2] == (0, '{"asked": "/healthz"}\n')
    state(directory / "line.a.json", "http://127.0.0.1:1")
    assert cli("healthcheck")[0] == 1


def test_a_coordinator_with_tls_has_to_show_its_own_certificate(
    cli: Cli,
    secure: tuple[int, Path],
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever name it is for: 0.0.0.0 is where a container's listens."""
    port, certificate = secure
    monkeypatch.setenv("FAILOVER_COORDINATOR_LISTEN", f"0.0.0.0:{port}")
    monkeypatch.setenv("FAILOVER_COORDINATOR_TLS_CERTIFICATE", str(certificate))
    assert cli("healthcheck")[:2] == (0, '{"asked": "/healthz"}\n')
    monkeypatch.setenv("FAILOVER_COORDINATOR_TLS_CERTIFICATE", str(authority.issue("another")[0]))
    code, _, err = cli("healthcheck")
    assert (code, "certificate" in err) == (1, True)


def test_an_https_address_is_trusted_by_a_ca_file(
    cli: Cli, secure: tuple[int, Path], authority: Authority
) -> None:
    url = f"https://127.0.0.1:{secure[0]}/healthz"
    assert cli("healthcheck", "--probe", url, "--ca-file", str(authority.file))[0] == 0
    code, _, err = cli("healthcheck", "--probe", url)
    assert (code, "certificate" in err) == (1, True)
    code, _, err = cli("healthcheck", "--probe", url, "--ca-file", "/etc/passwd")
    assert (code, "certificates in PEM" in err) == (1, True)


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file with the password that probes then ask for."""
    monkeypatch.setattr(Handler, "login", LOGIN)
    path = tmp_path / "password"
    path.touch(0o600)
    path.write_text("secret\n")
    return path


def test_a_probe_with_a_password_is_asked_with_it(
    cli: Cli, url: str, login: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = cli("healthcheck", "--probe", url)
    assert (code, "401" in err) == (1, True)
    words = ("healthcheck", "--probe", url, "--username", "monitoring")
    assert cli(*words, "--password-file", str(login))[0] == 0
    code, _, err = cli(*words)
    assert (code, "needed together" in err) == (1, True)
    code, _, err = cli(*words, "--password-file", str(login.with_name("none")))
    assert (code, "cannot be read" in err, "Traceback" in err) == (1, True, False)
    monkeypatch.setenv("FAILOVER_AGENT_PROBE_USERNAME", "monitoring")
    monkeypatch.setenv("FAILOVER_AGENT_PROBE_PASSWORD_FILE", str(login))
    assert cli("healthcheck", "--probe", url)[0] == 0
    login.write_text("another")
    code, _, err = cli("healthcheck", "--probe", url)
    assert (code, "401" in err, "another" in err) == (1, True, False)


@pytest.mark.parametrize("by", ["variables", "flags"])
def test_a_probe_with_tls_has_to_show_its_own_certificate_whatever_its_name(
    cli: Cli,
    secure: tuple[int, Path],
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
) -> None:
    port, certificate = secure
    flags: tuple[str, ...] = ()
    if by == "variables":
        monkeypatch.setenv("FAILOVER_AGENT_PROBE_LISTEN", f"0.0.0.0:{port}")
        monkeypatch.setenv("FAILOVER_AGENT_PROBE_TLS_CERTIFICATE", str(certificate))
    else:
        state(authority.directory / "line.a.json", f"https://[::ffff:127.0.0.1]:{port}")
        flags = ("--ca-file", str(certificate))
    assert cli("healthcheck", *flags)[:2] == (0, '{"asked": "/livez"}\n')
    another = str(authority.issue("another")[0])
    if by == "variables":
        monkeypatch.setenv("FAILOVER_AGENT_PROBE_TLS_CERTIFICATE", another)
    else:
        flags = ("--ca-file", another)
    code, _, err = cli("healthcheck", *flags)
    assert (code, "certificate" in err) == (1, True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "names no probe"),
        ('{"probe": null}', "probe_listen is off"),
        ('{"probe": "http://127.0.0.1:1"}', "gives no answer"),
        ('{"probe": "http://127.0.0.1:x"}', "gives no answer"),
        ('{"probe": "http://[::1"}', "http://[::1 gives no answer"),
    ],
)
def test_a_probe_that_cannot_be_asked_is_exit_code_1_and_one_line(
    cli: Cli, tmp_path: Path, content: str | None, said: str
) -> None:
    path = tmp_path / "state"
    if content is not None:
        path.write_text(content)
    code, out, err = cli("healthcheck", "--probe", str(path))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert said in err


def test_an_empty_variable_names_no_state_file(
    cli: Cli, url: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state(directory / "line.a.json", url)
    monkeypatch.setenv("FAILOVER_AGENT_STATE_FILE", "")
    assert cli("healthcheck")[0] == 0


def test_a_url_that_is_not_http_is_1_without_a_request(cli: Cli) -> None:
    code, _, err = cli("healthcheck", "--probe", "ftp://127.0.0.1/readyz")
    assert (code, "must be an http:// or https:// URL" in err) == (1, True)


def test_a_probe_that_never_answers_is_1(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(healthcheck, "TIMEOUT_S", 0.05)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:  # it listens and does not serve
        code, _, err = cli("healthcheck", "--probe", f"http://127.0.0.1:{server.server_address[1]}")
    assert (code, "timed out" in err) == (1, True)


def test_it_starts_without_slow_imports() -> None:
    code = (
        "import sys, agent.cli.healthcheck;"
        "print([m for m in ('pydantic', 'httpx2', 'asyncio', 'prometheus_client', 'rich')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
