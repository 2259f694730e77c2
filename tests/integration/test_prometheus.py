"""A real Prometheus scrapes real agents and coordinators through faults; rules and dashboard are asked of it."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
import yaml  # type: ignore[import-untyped] # nothing else here would use its stubs

from agent.coordinator.auth import hash_password
from tests.mosquitto import Authority

from .stage import (
    PATIENCE_S,
    Agent,
    Coordinator,
    Said,
    Stage,
    ask,
    environment,
    free_port,
    until,
)

NEEDS = "needs: prometheus: apt-get install prometheus"

CONFIG = Path(__file__).parents[2] / "config"
SCRAPE = "1s"

VARIABLES = {"$__rate_interval": "1m", "$instance": ".*", "$group": ".*", "$coordinator": ".*"}
"""What Grafana puts in."""

CHECK = '[{"name": "here", "type": "exec", "command": ["/bin/true"]}]'


def sample(secured: str = "") -> dict[str, dict[str, Any]]:
    """The jobs of config/prometheus/prometheus.yml by name; or the one in a comment for TLS."""
    text = (CONFIG / "prometheus/prometheus.yml").read_text()
    if secured:
        begin = text.index(f"#  - job_name: {secured}")
        lines = text[begin : text.index("\n\n", begin)].splitlines()
        text = "\n".join(["scrape_configs:", *(line.removeprefix("#") for line in lines)])
    return {job["job_name"]: job for job in yaml.safe_load(text)["scrape_configs"]}


class Prometheus:
    """A server of our own, with the rules and the jobs of config/prometheus."""

    def __init__(
        self,
        stage: Stage,
        coordinator: Coordinator,
        *agents: Agent,
        job: dict[str, Any] | None = None,
    ) -> None:
        program = shutil.which("prometheus")
        if program is None:
            pytest.skip(NEEDS)
        directory = stage.directory / "prometheus"
        directory.mkdir()
        jobs = sample()
        if job is not None:
            jobs[job["job_name"]] = job
        probes = [urlsplit(agent.state["probe"]).netloc for agent in agents]
        jobs["failover-agent"]["static_configs"] = [{"targets": probes}]
        target = urlsplit(coordinator.endpoint).netloc
        jobs["failover-coordinator"]["static_configs"] = [{"targets": [target]}]
        rules = (CONFIG / "prometheus/rules.yml").read_text()
        (directory / "rules.yml").write_text(rules)
        (directory / "prometheus.yml").write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": SCRAPE, "evaluation_interval": SCRAPE},
                    "rule_files": ["rules.yml"],
                    "scrape_configs": list(jobs.values()),
                }
            )
        )
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    program,
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        stage.later(process.wait)
        stage.later(process.kill)
        until(self.is_ready, "Prometheus to start")

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=PATIENCE_S):
                return True
        except OSError:  # nothing listens yet, or 503
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The vector that it is now."""
        said = self.get(f"query?{urlencode({'query': expression})}")
        assert said.status == 200, (expression, said.body)
        return list(said.body["data"]["result"])

    def get(self, path: str) -> Said:
        return ask("GET", f"{self.url}/api/v1/{path}")

    def until(self, expression: str) -> list[dict[str, Any]]:
        """What an expression is, once it is something."""
        return until(lambda: self.query(expression), f"Prometheus to know {expression}")


def queries() -> list[str]:
    panels = json.loads((CONFIG / "grafana/dashboard.json").read_text())["panels"]
    found = [t["expr"] for p in panels if p["type"] != "row" for t in p["targets"]]
    for name, value in VARIABLES.items():
        found = [expression.replace(name, value) for expression in found]
    return found


def verdicts(agent: Agent) -> dict[str, int]:
    base = agent.state["probe"]
    return {
        path: ask("GET", f"{base}/{path}").status
        for path in ("livez", "readyz", "primary", "secondary")
    }


def page(agent: Agent) -> bytes:
    with urllib.request.urlopen(f"{agent.state['probe']}/metrics", timeout=PATIENCE_S) as answer:
        return bytes(answer.read())


PRIMARY = {"livez": 200, "readyz": 200, "primary": 200, "secondary": 503}
SECONDARY = {"livez": 200, "readyz": 200, "primary": 503, "secondary": 200}


def test_dashboard_and_rules_are_right_through_two_takeovers(stage: Stage) -> None:
    """The first by an override, so that the one that demotes is there to tell; then by SIGKILL."""
    coordinator = stage.serve(store="sqlite")
    one, other, epoch = stage.pair(coordinator, f"--check={CHECK}")
    prometheus = Prometheus(stage, coordinator, one, other)
    for agent in (one, other):
        now = datetime.now(UTC).isoformat()
        assert ask("POST", f"{agent.state['probe']}/data-processed", {"time": now}).status == 200
    prometheus.until(
        "group:failover_agent_primaries:sum == 1 and on () sum(failover_agent_ready) == 2"
    )
    assert (verdicts(one), verdicts(other)) == (PRIMARY, SECONDARY)
    prometheus.until(
        'failover_coordinator_groups{state="primary"} == 1'
        " and on () failover_coordinator_groups_without_primary == 0"
        " and on () failover_coordinator_blocked_readers == 2"
    )
    assert coordinator.ask("GET", "groups/another").status == HTTPStatus.NOT_FOUND

    path = f"groups/{stage.group}/clientsessions/{other.name}/roleoverride"
    assert coordinator.ask("POST", path, {"Value": 1}).status < 300
    epoch = other.until_role("Primary", after_epoch=epoch)["epoch"]
    until(lambda: (verdicts(one), verdicts(other)) == (SECONDARY, PRIMARY), "the probes to agree")
    now = datetime.now(UTC).isoformat()
    assert ask("POST", f"{other.state['probe']}/data-processed", {"time": now}).status == 200
    prometheus.until(
        'failover_agent_role_changes_total{from="Primary", to="Secondary", cause="revoked"} == 1'
    )
    (slack,) = prometheus.until("failover_agent_demotion_slack_seconds")
    assert 0 < float(slack["value"][1]) < 2

    stage.kill(other)
    epoch = one.until_role("Primary", after_epoch=epoch)["epoch"]
    prometheus.until(f"max(failover_agent_epoch) == {epoch}")
    prometheus.until("group:failover_agent_primaries:sum == 1 and on () min(up) == 0")
    prometheus.until('ALERTS{alertname="FailoverAgentDown"}')
    # Its guard has released the role.
    prometheus.until('failover_coordinator_tenures_ended_total{reason="released"} == 2')

    report = {"time": datetime.now(UTC).isoformat()}
    assert ask("POST", f"{one.state['probe']}/data-processed", report).status == 200
    for expression in queries():
        if "_failsafe_" in expression:  # these agents have none, so only its form is checked
            prometheus.query(expression)
        else:
            prometheus.until(expression)
    groups = prometheus.get("rules").body["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    for rule in rules:
        if rule["type"] == "recording":
            prometheus.until(rule["name"])
    assert not prometheus.query('ALERTS{alertname="FailoverTwoPrimaries", alertstate="firing"}')
    unwell = "FailoverCoordinator(Down|Fault|StoreFails|DataOld)"
    assert not prometheus.query(f'ALERTS{{alertname=~"{unwell}"}}')


def test_alerts_fire_for_a_failed_store_and_for_a_dead_coordinator(stage: Stage) -> None:
    coordinator = stage.serve(store="sqlite")
    prometheus = Prometheus(stage, coordinator)
    prometheus.until("failover_coordinator_store_commit_failures_total == 0")
    for number in range(3):  # so that the file grows beyond the limit, which the log stays below
        group = {"Id": f"g{number}", "FailoverTimeout": "00:01:00"}
        assert coordinator.ask("POST", "groups", group).status == HTTPStatus.CREATED
    limit = resource.RLIMIT_FSIZE
    before = resource.prlimit(coordinator.popen.pid, limit)
    resource.prlimit(coordinator.popen.pid, limit, (8192, before[1]))
    for number in range(
        3
    ):  # the counter of an answer begins with the first one, so a second grows it
        said = coordinator.ask("POST", "groups", {"Id": "h", "FailoverTimeout": "00:01:00"})
        assert said.status == HTTPStatus.SERVICE_UNAVAILABLE
        prometheus.until(
            'failover_coordinator_requests_total{route="create_group", code="503"}'
            f" == {number + 1}"
        )
    prometheus.until("failover_coordinator_store_commit_failures_total == 3")
    prometheus.until("instance:failover_coordinator_requests_failed:ratio_rate5m > 0.01")
    prometheus.until('ALERTS{alertname="FailoverCoordinatorRefuses"}')
    prometheus.until('ALERTS{alertname="FailoverCoordinatorStoreFails", alertstate="firing"}')
    assert not prometheus.query('ALERTS{alertname="FailoverCoordinatorDown"}')

    resource.prlimit(coordinator.popen.pid, limit, before)
    assert coordinator.ask("POST", "groups", group | {"Id": "h"}).status == HTTPStatus.CREATED
    coordinator.end(signal.SIGKILL)
    prometheus.until('ALERTS{alertname="FailoverCoordinatorDown"}')


def test_a_coordinator_with_tls_and_users_is_scraped_with_the_sample_configuration(
    stage: Stage,
) -> None:
    """By the job in its comment, with nothing but our own file of certificates."""
    key, certificate, users = (stage.directory / name for name in ("key", "ca.pem", "users"))
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-subj", "/CN=localhost", "-days", "2", "-keyout", str(key)]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    users.write_text(f"somebody:{hash_password('secret')}\n")
    users.chmod(0o600)
    coordinator = stage.serve(
        f"--tls-certificate={certificate}", f"--tls-key={key}", f"--users-file={users}"
    )
    job = sample("failover-coordinator")["failover-coordinator"]
    job["tls_config"]["ca_file"] = str(stage.directory / job["tls_config"]["ca_file"])
    prometheus = Prometheus(stage, coordinator, job=job)
    prometheus.until('up{job="failover-coordinator"} == 1')
    prometheus.until('failover_coordinator_build_info{job="failover-coordinator"}')


def test_agents_with_tls_and_a_password_are_scraped_with_the_sample_configuration(
    stage: Stage, coordinator: Coordinator
) -> None:
    """By the job in its comment, and by that of docs/metrics.md, which are one."""
    certificate, key = Authority(stage.directory).issue("probe")
    password = stage.directory / "probe-password"
    password.touch(0o600)
    password.write_text("secret\n")
    agent = stage.run(
        "host-a",
        coordinator,
        flags=[
            "--probe-listen=127.0.0.1:0",
            f"--probe-tls-certificate={certificate}",
            f"--probe-tls-key={key}",
            "--probe-username=monitoring",
            f"--probe-password-file={password}",
        ],
    )
    agent.until_role("Primary")
    job = sample("failover-agent")["failover-agent"]
    documented = (CONFIG.parent / "docs/metrics.md").read_text()
    (block,) = (b for b in documented.split("```yaml\n")[1:] if "basic_auth" in b)
    assert yaml.safe_load(block.partition("```")[0])["scrape_configs"] == [job]
    for name, keys in (("ca_file", job["tls_config"]), ("password_file", job["basic_auth"])):
        keys[name] = str(stage.directory / keys[name])
    prometheus = Prometheus(stage, coordinator, agent, job=job)
    prometheus.until('up{job="failover-agent"} == 1')
    prometheus.until('failover_agent_role{role="Primary"} == 1')


def test_promtool_accepts_the_metrics_of_an_agent(stage: Stage, coordinator: Coordinator) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(NEEDS)
    agent = stage.run("host-a", coordinator, flags=[f"--check={CHECK}"])
    agent.until_role("Primary")
    text = page(agent)
    assert b'failover_agent_role{role="Primary"} 1.0' in text
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_member_without_a_coordinator_is_live_and_neither_ready_nor_primary(
    stage: Stage,
) -> None:
    coordinator = stage.serve()
    agent = stage.run("host-a", coordinator)
    agent.until_role("Primary")
    coordinator.end(signal.SIGKILL)
    agent.until_role("Secondary")
    until(lambda: verdicts(agent)["readyz"] == 503, "it not to be ready")
    assert verdicts(agent) == SECONDARY | {"readyz": 503}
    failures = re.findall(rb'heartbeat_failures_total{reason="unreachable"} (\S+)', page(agent))
    assert float(failures[0]) > 0
    done = subprocess.run(
        [sys.executable, "-m", "agent", "healthcheck", "readyz", "--probe", agent.state_file],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "no heartbeat was answered" in done.stderr) == (1, True)


def test_a_restarted_agent_reports_that_its_guard_ended_the_previous_one(
    stage: Stage, coordinator: Coordinator
) -> None:
    agent = stage.run("host-a", coordinator)
    agent.until_role("Primary")
    assert b"failover_agent_guard_fired 0.0" in page(agent)
    agent.end(signal.SIGKILL)
    until(lambda: agent.state["role"] == "Secondary", "the guard to demote")
    again = stage.run("host-a", coordinator)
    again.until_role("Primary")
    assert b"failover_agent_guard_fired 1.0" in page(again)
