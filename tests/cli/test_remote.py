"""status and groups: against a real coordinator, and against a server that has only plain v1."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from agent.cli.remote import cell
from agent.drivers.rest import RestClient
from agent.errors import ExitCode
from agent.model import SessionConfig

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def at(endpoint: str) -> str:
    return f"--endpoint={endpoint}"


@pytest.fixture
def dead_endpoint() -> str:
    """Where nothing listens: a port that was just given back."""
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}/clientfailover"


def become_primary(endpoint: str, group: str, session: str) -> None:
    async def beat() -> None:
        client = RestClient([endpoint])
        try:
            await client.join(group, SessionConfig(session, "Host A"), timeout_s=10)
            for _ in range(2):  # chosen, then confirmed
                await client.heartbeat(
                    group,
                    session,
                    score=75,
                    last_data=None,
                    instance="i",
                    seen_epoch=None,
                    timeout_s=10,
                )
        finally:
            await client.aclose()

    asyncio.run(beat())


def test_a_group_is_made_listed_shown_and_deleted(cli: Cli, at: str) -> None:
    words = ("--failover-timeout", "00:01:00", "--name", "Line 7", "--description", "[b]all[/b]")
    assert cli("groups", "create", "life", at, *words) == (
        0,
        "group life exists, failover timeout 60 s\n",
        "",
    )
    code, out, _ = cli("groups", "list", at)
    assert code == 0
    assert [line.split() for line in out.splitlines() if line.startswith("life ")] == [
        ["life", "Line", "7", "60", "s", "[b]all[/b]"]
    ]
    code, out, _ = cli("groups", "show", "life", at)
    assert code == 0
    assert "failover timeout  60 s" in out
    assert cli("groups", "delete", "life", at) == (0, "group life is deleted\n", "")
    assert cli("groups", "show", "life", at)[0] == ExitCode.REFUSED


def test_json_has_the_same_facts(cli: Cli, at: str) -> None:
    right = {"Id": "json", "FailoverTimeout": "00:00:10"}
    assert json.loads(cli("groups", "create", "json", at, "--json")[1]) == right
    assert right in json.loads(cli("groups", "list", at, "--json")[1])
    shown = json.loads(cli("groups", "show", "json", at, "--json")[1])
    assert shown["Group"] == right
    assert (shown["Sessions"], shown["History"]) == ([], [])
    assert json.loads(cli("groups", "delete", "json", at, "--json")[1]) == {"Deleted": "json"}


def test_the_primary_is_shown_with_its_tenure(cli: Cli, at: str, endpoint: str) -> None:
    cli("groups", "create", "led", at)
    become_primary(endpoint, "led", "host-a")
    code, out, _ = cli("status", "led", at)
    assert code == 0
    facts = dict(line.rsplit(maxsplit=1) for line in out.split("\n\n")[0].splitlines())
    assert facts["group"] == "led"
    assert (facts["primary"], facts["pending primary"], facts["epoch"]) == ("host-a", "-", "1")
    row = out.splitlines()[-1].split()
    assert row[:5] == ["host-a", "Host", "A", "Primary", "75"]
    told = json.loads(cli("status", "led", at, "--json")[1])
    assert told["Status"]["Primary"] == "host-a"
    assert told["Sessions"][0]["Role"] == "Primary"
    shown = cli("groups", "show", "led", at)[1]
    assert "why it began" in shown
    assert shown.splitlines()[-1].split()[:2] == ["1", "host-a"]


def test_a_group_that_exists_with_another_configuration_is_refused(cli: Cli, at: str) -> None:
    assert cli("groups", "create", "twice", at)[0] == 0
    assert cli("groups", "create", "twice", at)[0] == 0
    code, out, err = cli("groups", "create", "twice", at, "--failover-timeout", "3")
    assert (code, out) == (ExitCode.REFUSED, "")
    assert "409" in err


def test_a_group_that_is_not_there_is_named(cli: Cli, at: str) -> None:
    for words in (("status", "none"), ("groups", "show", "none"), ("groups", "delete", "none")):
        code, _, err = cli(*words, at)
        assert code == ExitCode.REFUSED
        assert "none" in err
        assert err.count("\n") == 1


def test_the_next_endpoint_is_asked_if_one_is_dead(cli: Cli, at: str, dead_endpoint: str) -> None:
    assert cli("groups", "list", f"--endpoint={dead_endpoint}", at)[0] == 0
    assert cli("groups", "list", f"--endpoint={dead_endpoint}")[0] == ExitCode.UNREACHABLE


def test_the_endpoint_is_found_in_the_agents_own_file(
    cli: Cli, tmp_path: Path, endpoint: str
) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'endpoint = ["{endpoint}"]\ngroup = "g"\nhook_primary = ["/not/there"]\n')
    assert cli("groups", "list", "--config", str(path))[0] == 0


def test_a_ca_file_without_certificates_is_named(cli: Cli, at: str, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("no certificate\n")
    code, _, err = cli("groups", "list", at, "--ca-file", str(path))
    assert code == ExitCode.CONFIG_VALUE
    assert str(path) in err


# --- a server that has only plain v1

PLAIN = {
    "/clientfailover/groups/g": {"Id": "g", "FailoverTimeout": "00:01:00"},
    "/clientfailover/groups/g/status": {"Primary": "a\x1b[31m"},
    "/clientfailover/groups/g/clientsessions": [],
}


@pytest.fixture
def plain() -> Iterator[tuple[str, list[str | None]]]:
    """A plain v1 server's endpoint, and the Authorization of each request it got."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            body = PLAIN.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            if body is not None:
                self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/clientfailover", seen
        server.shutdown()
        thread.join()


def test_a_server_without_history_is_shown_without_it(
    cli: Cli, plain: tuple[str, list[str | None]]
) -> None:
    code, out, _ = cli("groups", "show", "g", f"--endpoint={plain[0]}")
    assert code == 0
    assert "why it began" not in out
    assert "History" not in json.loads(
        cli("groups", "show", "g", f"--endpoint={plain[0]}", "--json")[1]
    )


def test_the_password_of_the_file_is_sent(
    cli: Cli, plain: tuple[str, list[str | None]], tmp_path: Path
) -> None:
    path = tmp_path / "password"
    path.write_text("pa ss\n")
    path.chmod(0o600)
    words = (f"--endpoint={plain[0]}", "--username=u", f"--password-file={path}")
    assert cli("status", "g", *words)[0] == 0
    assert set(plain[1]) == {"Basic dTpwYSBzcw=="}


def test_text_of_a_server_cannot_control_the_terminal(
    cli: Cli, plain: tuple[str, list[str | None]]
) -> None:
    assert "a?[31m" in cli("status", "g", f"--endpoint={plain[0]}")[1]
    assert cell("a\x1b\n\u202eb") == "a???b"
