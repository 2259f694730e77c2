"""No secret is ever shown: not in a log at any level, a metric, a state, a hook, nor an argument.

Everything that has a secret is in use at once, works and fails: TLS and users at the coordinator, Basic
and client credentials, signed webhooks, a broker with a password.
"""

import base64
import http.client
import json
import signal
import ssl
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from agent.errors import ExitCode
from tests.mosquitto import PASSWORD as BROKER_PASSWORD
from tests.mosquitto import Authority, a_broker

from .resting import (
    PASSWORD,
    WEBHOOK_SECRET,
    Resting,
    everything,
    resting,
    secret_file,
    secure_coordinator,
)
from .stage import Coordinator, Stage, environment, until
from .workloads import start

CLIENT_SECRET, WRONG = "the secret of a client", "a wrong password of the test"
WRONG_BROKER_PASSWORD = "what the broker does not know"
PLAIN_PASSWORD = "a password where its hash should be"
ACCESS_TOKEN = "an-access-token-of-the-test"
TOP = """
group = "g"
username = "agent"
password_file = "{folder}/agent-password"
webhook_secret_file = "{folder}/webhook-secret"
"""
TIMING = ["--failover-timeout=3", "--demote=0.8", "--margin=0.6"]
EVENTS = ("primary", "secondary")


def test_the_query_of_a_webhook_is_in_no_log_and_no_state(
    stage: Stage, coordinator: Coordinator
) -> None:
    """It may be a token; the state file, which everybody can read, had it as the command to stop a workload."""
    url = "http://127.0.0.1:1/stop?token="
    words = [f"--hook-secondary={url}{ACCESS_TOKEN}", "--demote=0.5", "--hook-limit=0.5"]
    agent = start(stage, "host-a", coordinator, flags=[*words, "--log-level=debug"])
    assert agent.wait() == ExitCode.DEMOTION_FAILED
    state = agent.state_file.read_text()
    again = start(stage, "host-a", coordinator, flags=[*words, "--state-file=/no/such/file"])
    assert again.wait() == ExitCode.STATE_FILE
    assert "may still be active" in again.said()
    for text in (state, agent.said(), again.said()):
        assert ACCESS_TOKEN not in text
    assert "http://127.0.0.1:1/stop?" in state


def forms(secret: str, user: str) -> Iterator[str]:
    """A secret as it is, and as it goes over the wire."""
    yield secret
    yield urllib.parse.quote(secret)
    yield urllib.parse.quote_plus(secret)
    for text in (secret, f"{user}:{secret}"):
        yield base64.b64encode(text.encode()).decode().rstrip("=")
        yield base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


SECRETS = {
    form
    for secret, user in [
        (PASSWORD, "agent"),
        (WRONG, "agent"),
        (PLAIN_PASSWORD, "agent"),
        (WEBHOOK_SECRET, ""),
        (BROKER_PASSWORD, "failover"),
        (WRONG_BROKER_PASSWORD, "failover"),
        (CLIENT_SECRET, "client"),
        (ACCESS_TOKEN, ""),
    ]
    for form in forms(secret, user)
}


WITNESSES = (
    "must be one line",  # of a secret's file
    "must not be readable or writable by others",
    "is not NAME:scrypt",
    "configuration not changed",
    "401",
    "hook started",
    "hook ended",
    "webhook",
    "Not authorized",  # by the broker
    "role is not announced by MQTT",
    "provider asked /token",
    "invalid_client",
    "demoted by the guard",
    "failover_coordinator_tenures_ended_total",
    "failover_agent_role",
    "FAILOVER_EPOCH",
    "coordinator stopped",
)
"""Each is told where a secret could be: without these, nothing was looked for."""


def identity_provider(stage: Stage) -> str:
    """One that gives everybody the same token, which no coordinator takes.

    At another path than /token it refuses, and repeats what it was asked, as some do.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            stage.note("provider", "asked", self.path)
            if self.path == "/token":
                self.answer(200, {"access_token": ACCESS_TOKEN, "expires_in": 3600})
            else:
                told = f"{urllib.parse.unquote_plus(asked)} {asked}"
                self.answer(401, {"error": "invalid_client", "error_description": told})

        def answer(self, status: int, document: dict[str, object]) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    stage.later(server.server_close)
    stage.later(server.shutdown)
    return f"http://127.0.0.1:{server.server_address[1]}"


def run(*words: str) -> str:
    """All that a command of ours says, whatever comes of it."""
    done = subprocess.run(
        [sys.executable, "-m", "agent", *words],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.stdout + done.stderr


def arguments(pid: int) -> str:
    """What anybody on the host may read of a process, and what its user may."""
    return "".join(Path(f"/proc/{pid}/{file}").read_text() for file in ("cmdline", "environ"))


def told_by(coordinator: Coordinator, authority: Authority, path: str) -> str:
    """What a coordinator answers to somebody who may ask."""
    port = int(coordinator.endpoint.split(":")[2].partition("/")[0])
    trust = ssl.create_default_context(cafile=authority.file)
    user = base64.b64encode(f"agent:{PASSWORD}".encode()).decode()
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=trust)
    with closing(connection):
        connection.request("GET", path, headers={"Authorization": f"Basic {user}"})
        answer = connection.getresponse()
        assert answer.status == 200
        return f"{answer.headers}{answer.read().decode()}"


def broken(stage: Stage, config: Path, form: str) -> Iterator[str]:
    """What is said of files that hold a secret, and not as they should."""
    yield run("check-config", "--config", str(config))
    yield run("check-config", "--json", "--config", str(config))
    two = secret_file(stage, "two-lines", f"{PASSWORD}\n{WRONG}")
    long = secret_file(stage, "long", PASSWORD * 1000)
    everybodys = secret_file(stage, "everybodys", PASSWORD)
    everybodys.chmod(0o644)
    debug = ("--log-level=DEBUG", f"--log-format={form}")
    for file in (two, long, everybodys):
        for command in ("check-config", "run"):
            words = ("--config", str(config), f"--password-file={file}", *debug)
            yield run(command, *words, "--endpoint=https://127.0.0.1:1/api/v1/clientfailover")
    users = secret_file(stage, "plain-users", f"agent:{PLAIN_PASSWORD}")
    certificate, key = (stage.directory / f"coordinator.{kind}" for kind in ("crt", "key"))
    tls = (f"--tls-certificate={certificate}", f"--tls-key={key}")
    yield run("serve", "--listen=127.0.0.1:0", "--store=memory", *tls, f"--users-file={users}")


def reloaded(agent: Resting, folder: Path) -> None:
    """A reload with a secret that is gone, one of two lines, and one that is right again."""
    secret = folder / "webhook-secret"
    right = secret.read_text()
    secret.rename(folder / "moved")
    for refusals in (1, 2):
        agent.process.send_signal(signal.SIGHUP)
        until(
            lambda n=refusals: agent.log.read_text().count("configuration not changed") == n,  # type: ignore[misc] # of the loop's number
            "a refusal",
        )
        (folder / "moved").rename(secret) if refusals == 1 else None
        secret.write_text(f"{right}{WRONG}\n")
    secret.write_text(right)
    agent.process.send_signal(signal.SIGHUP)
    until(lambda: "configuration read again" in agent.log.read_text(), "a reload")


def refused(stage: Stage, words: list[str]) -> Iterator[str]:
    """What agents say that the coordinator or the identity provider refuses."""
    wrong = secret_file(stage, "wrong", WRONG)
    again = [word for word in words if not word.startswith("--password-file")]
    yield run("run", *again, f"--password-file={wrong}")
    client = [word for word in again if not word.startswith("--username")]
    client += ["--client-id=client"]
    client += [f"--client-secret-file={secret_file(stage, 'client', CLIENT_SECRET)}"]
    provider = identity_provider(stage)
    for path in ("token", "refuses"):
        yield run("run", *client, f"--token-endpoint={provider}/{path}")


def own(stage: Stage, name: str) -> list[str]:
    """What one of two agents does not share with the other."""
    hooks = [f"--hook-{event}={stage.hook(name, event)}" for event in EVENTS]
    return [f"--session-id={name}", *hooks]


def seen(agent: Resting) -> list[str]:
    """What can be asked of a running agent and its guard."""
    pages = [agent.ask(path) for path in ("status", "metrics", "readyz")]
    return [*pages, json.dumps(agent.state), arguments(agent.pid), arguments(agent.guard)]


def key_lines(*folders: Path) -> set[str]:
    """The private keys, by line: one that is told may be folded."""
    keys = [file for folder in folders for file in folder.glob("*.key")]
    assert len(keys) >= len(folders)
    return {line for key in keys for line in key.read_text().splitlines() if "---" not in line}


def hashes(users: Path) -> set[str]:
    """What the passwords of a users file could be guessed by."""
    return {line.strip().split("$")[5].partition(":")[0] for line in users.read_text().splitlines()}


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_is_ever_shown(tmp_path: Path, form: str) -> None:
    with Stage(tmp_path, "plant") as stage, ExitStack() as stack:
        folder = tmp_path / "broker"
        folder.mkdir()
        broker = stack.enter_context(a_broker(folder))
        broker.secure()
        broker.start()
        authority = Authority(tmp_path)
        debug = ("--log-level=DEBUG", f"--log-format={form}")
        coordinator = secure_coordinator(stage, authority, *debug)
        both = [*everything(stage, coordinator, authority, broker), *TIMING, *debug]
        whole = tmp_path / "whole.toml"
        whole.write_text(
            f"{TOP.format(folder=tmp_path)}{(tmp_path / 'everything.toml').read_text()}"
        )
        told = list(broken(stage, whole, form))
        assert "timing (R1) holds" in told[0]
        words = {name: [*both, *own(stage, name)] for name in ("a", "b")}
        with resting(stage, "a", words["a"]) as one:
            until(lambda: one.state["role"] == "Primary", "a to be primary")
            until(lambda: "role is announced by MQTT" in one.log.read_text(), "an announcement")
            reloaded(one, tmp_path)
            told += seen(one)
            (folder / "password").write_text(WRONG_BROKER_PASSWORD)
            with resting(stage, "b", words["b"]) as other:
                until(lambda: "Not authorized" in other.log.read_text(), "b to be refused")
                broker.kill()
                until(lambda: "MQTT" in one.log.read_text().splitlines()[-1], "MQTT to fail")
                told += refused(stage, words["b"])
                one.process.kill()  # its guard tells, too
                one.process.wait()
                until(lambda: other.state["role"] == "Primary", "a takeover")
                until(lambda: "demoted by the guard" in one.log.read_text(), "the guard to act")
                told += seen(other)
            told.append(json.dumps(one.state))
        told.append(json.dumps(other.state))
        group = f"/api/v1/clientfailover/groups/{stage.group}"
        paths = ("/metrics", "/readyz", f"{group}/status", f"{group}/clientsessions")
        told += [told_by(coordinator, authority, path) for path in paths]
        told.append(arguments(coordinator.popen.pid))
        coordinator.end()
        logs = [one.log, other.log, coordinator.log, stage.events_file]
        logs += [stage.environment_file(name, event) for name in ("a", "b") for event in EVENTS]
        told += [log.read_text() for log in logs]
        private = key_lines(tmp_path, folder) | hashes(tmp_path / "users")
    everything_told = "\n".join(told)
    # What has to be there, so that it was looked for where it could be.
    level = " DEBUG " if form == "text" else '"DEBUG"'
    assert [text for text in (*WITNESSES, level) if text not in everything_told] == []
    assert [secret for secret in SECRETS | private if secret in everything_told] == []
