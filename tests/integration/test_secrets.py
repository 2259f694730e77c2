"""No secret is ever told: not in a log at any level, a metric, a state, a hook, nor an argument.

Everything that has a secret is in use at once, works and fails: TLS and users at the coordinator, Basic
and client credentials, signed webhooks, a broker with a password.
"""

import base64
import json
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.mosquitto import PASSWORD as BROKER_PASSWORD
from tests.mosquitto import Authority, Broker, a_broker

from .resting import (
    PASSWORD,
    WEBHOOK_SECRET,
    Resting,
    everything,
    resting,
    secret_file,
    secure_coordinator,
)
from .stage import Stage, environment, until

CLIENT_SECRET, WRONG = "the secret of a client", "a wrong password of the test"
ACCESS_TOKEN = "an-access-token-of-the-test"
TOP = """
group = "g"
username = "agent"
password_file = "{folder}/agent-password"
webhook_secret_file = "{folder}/webhook-secret"
"""
TIMING = ["--failover-timeout=3", "--demote=0.8", "--margin=0.6"]


def forms(secret: str, user: str) -> Iterator[str]:
    """A secret as it is, and as it goes over the wire."""
    yield secret
    yield urllib.parse.quote(secret)
    yield urllib.parse.quote_plus(secret)
    for text in (secret, f"{user}:{secret}"):
        yield base64.b64encode(text.encode()).decode().rstrip("=")


SECRETS = {
    form
    for secret, user in [
        (PASSWORD, "agent"),
        (WRONG, "agent"),
        (WEBHOOK_SECRET, ""),
        (BROKER_PASSWORD, "failover"),
        (CLIENT_SECRET, "client"),
        (ACCESS_TOKEN, ""),
    ]
    for form in forms(secret, user)
}


class _Tokens(BaseHTTPRequestHandler):
    """An identity provider that gives everybody the same token, which no coordinator takes."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"access_token": ACCESS_TOKEN, "expires_in": 3600}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def token_endpoint(stage: Stage) -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Tokens)
    Thread(target=server.serve_forever, daemon=True).start()
    stage.later(server.server_close)
    stage.later(server.shutdown)
    return f"http://127.0.0.1:{server.server_address[1]}/token"


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


def lived_through(agent: Resting, folder: Path, broker: Broker) -> Iterator[str]:
    """What an agent tells while it works, is refused a reload, loses its broker and is killed."""
    until(lambda: agent.state["role"] == "Primary", "a to be primary")
    yield from (agent.ask(path) for path in ("status", "metrics", "readyz"))
    yield Path(f"/proc/{agent.pid}/cmdline").read_text()
    yield Path(f"/proc/{agent.guard}/cmdline").read_text()
    yield Path(f"/proc/{agent.guard}/environ").read_text()
    # A reload with a secret that is gone, and one that is back.
    secret = folder / "agent-password"
    secret.rename(folder / "moved")
    agent.process.send_signal(signal.SIGHUP)
    until(lambda: "configuration not changed" in agent.log.read_text(), "a refusal")
    (folder / "moved").rename(secret)
    agent.process.send_signal(signal.SIGHUP)
    until(lambda: "configuration read again" in agent.log.read_text(), "a reload")
    broker.kill()
    until(lambda: "role is not announced by MQTT" in agent.log.read_text(), "MQTT to fail")
    # Killed: its guard tells, too.
    agent.process.kill()
    agent.process.wait()
    until(lambda: "demoted by the guard" in agent.log.read_text(), "the guard to act")
    yield agent.log.read_text()


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_is_ever_told(tmp_path: Path, form: str) -> None:
    with Stage(tmp_path) as stage, ExitStack() as stack:
        folder = tmp_path / "broker"
        folder.mkdir()
        broker = stack.enter_context(a_broker(folder))
        broker.secure()
        broker.start()
        authority = Authority(tmp_path)
        coordinator = secure_coordinator(
            stage, authority, "--log-level=DEBUG", f"--log-format={form}"
        )
        hooks = [f"--hook-{event}={stage.hook('a', event)}" for event in ("primary", "secondary")]
        words = everything(stage, coordinator, authority, broker)
        words += [*TIMING, *hooks, "--log-level=DEBUG", f"--log-format={form}"]
        whole = tmp_path / "whole.toml"
        whole.write_text(
            f"{TOP.format(folder=tmp_path)}{(tmp_path / 'everything.toml').read_text()}"
        )
        told = [run("check-config", *kind, "--config", str(whole)) for kind in ([], ["--json"])]
        assert "timing (R1) holds" in told[0]
        with resting(stage, "a", words) as agent:
            told += lived_through(agent, tmp_path, broker)
        wrong = secret_file(stage, "wrong", WRONG)
        again = [w for w in words if not w.startswith("--password-file")]
        told.append(run("run", *again, f"--password-file={wrong}"))
        client = [w for w in again if not w.startswith("--username")]
        client += ["--client-id=client", f"--token-endpoint={token_endpoint(stage)}"]
        client += [f"--client-secret-file={secret_file(stage, 'client', CLIENT_SECRET)}"]
        told.append(run("run", *client))
        broker.start()
        with resting(stage, "b", words) as agent:
            until(lambda: agent.state["role"] == "Primary", "b to be primary")
            time.sleep(1)
            told += [json.dumps(agent.state)]
        logs = [agent.log, coordinator.log, stage.events_file]
        logs += [stage.environment_file("a", event) for event in ("primary", "secondary")]
        told += [log.read_text() for log in logs]
        everything_told = "\n".join(told)
    # What has to be there, so that it was looked for where it could be.
    for text in ("DEBUG", "401", "hook started", "role is not announced", "hook ended", "token"):
        assert text in everything_told
    assert not [secret for secret in SECRETS if secret in everything_told]
