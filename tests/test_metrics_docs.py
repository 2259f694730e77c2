"""Names of metrics in rules, dashboard and documents are those of the programs; promtool finds no fault."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml  # type: ignore[import-untyped] # nothing else here would use its stubs
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from agent.coordinator.cluster_metrics import ClusterMetrics
from agent.coordinator.leadership import Leadership
from agent.coordinator.metrics import Metrics, SessionLines
from agent.coordinator.route_table import ROUTES
from agent.coordinator.server import MOST_CONNECTIONS, SPARE_FILES
from agent.coordinator.service import MAX_READERS, Coordinator
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import Etcd
from agent.coordinator.store.etcd_layout import Layout, Meta
from agent.coordinator.store.memory import MemoryStore
from agent.daemon import metrics
from agent.ops.clock import Clock
from tests.daemon.test_metrics import snapshot

ROOT = Path(__file__).parents[1]
RULES = ROOT / "config/prometheus/rules.yml"
RULES_TEST = ROOT / "config/prometheus/rules_test.yml"
DASHBOARD = ROOT / "config/grafana/dashboard.json"
PAGE = ROOT / "docs/metrics.md"
RUNBOOKS = ROOT / "docs/runbooks.md"

NAME = re.compile(r"(?<![\w:])failover_(?:agent|coordinator)_\w+")
RECORDED = re.compile(r"\b(?:group|instance):failover_\w+:\w+")
ROUTE = re.compile(r'route(?:=|!=|=~|!~)\\?"([^"\\]+)')
ALERT = re.compile(r"^ +- alert: (\w+)$", re.MULTILINE)
BEGIN, END = "<!-- begin of the table of the {} -->\n", "<!-- end of the table of the {} -->\n"
HINT = "needs: prometheus: apt-get install prometheus"


class Promtool:
    """What it says, and whether it found a fault."""

    def __init__(self) -> None:
        found = shutil.which("promtool")
        if found is None:
            pytest.skip(HINT)
        self._path = found

    def __call__(
        self, *words: str, page: bytes = b"", where: Path | None = None
    ) -> tuple[int, str]:
        done = subprocess.run(
            [self._path, *words],
            input=page,
            cwd=where,
            env={**os.environ, "GOGC": "400"},  # of its time, a quarter was collecting garbage
            capture_output=True,
            check=False,
        )
        return done.returncode, (done.stdout + done.stderr).decode()


@pytest.fixture
def promtool() -> Promtool:
    return Promtool()


def of_an_agent() -> CollectorRegistry:
    registry = CollectorRegistry()
    metrics.register(registry, snapshot)
    return registry


def of_a_cluster() -> ClusterMetrics:
    """The metrics that only a coordinator on etcd has; this one has no session with etcd yet."""
    cluster = EtcdCluster(Etcd(cast("Any", None), 1.0), Layout("/f", 8), Meta("id", 8, None, 0))
    leadership = Leadership(cluster, cast("Any", None), time.monotonic, ttl_s=3.0, url="http://a")
    return ClusterMetrics(leadership, cast("Any", SimpleNamespace(forwarded=0, failed=0)))


def of_a_coordinator() -> CollectorRegistry:
    """One that has answered a request and was scraped: then every label has a value."""

    async def scraped() -> CollectorRegistry:
        its, now = Metrics(), Clock().now
        its.answered("post_heartbeat", 200, 0.001)
        its.registry.register(of_a_cluster())
        await its.page(Coordinator(MemoryStore(), now), now(), "")
        return its.registry

    return asyncio.run(scraped())


PAGES_OF = {"agent": of_an_agent, "coordinator": of_a_coordinator}


def families(who: str) -> list[Metric]:
    return [f for f in PAGES_OF[who]().collect() if f.name.startswith(f"failover_{who}_")]


def exported() -> set[str]:
    """The names of all samples of both programs, and of their histograms."""
    every = [family for who in PAGES_OF for family in families(who)]
    known = {sample.name for family in every for sample in family.samples}
    known |= {family.name for family in every if family.type == "histogram"}
    return known | {name for name, _ in SessionLines.FAMILIES}


def test_the_page_has_what_is_there_for_each_session() -> None:
    rows = re.findall(r"(?m)^\| `(failover_coordinator_session_\w+)` \|", PAGE.read_text())
    assert rows == [name for name, _ in SessionLines.FAMILIES]


def test_every_metric_that_is_named_is_one_of_the_programs() -> None:
    known = exported()
    for path in (RULES, RULES_TEST, DASHBOARD, PAGE, RUNBOOKS):
        named = set(NAME.findall(path.read_text()))
        assert {name.split("_")[1] for name in named} == set(PAGES_OF), path.name
        assert named <= known, path.name


def test_every_recorded_metric_that_is_named_is_recorded() -> None:
    recorded = set(re.findall(r"- record: (\S+)", RULES.read_text()))
    for path in (RULES, RULES_TEST, DASHBOARD):
        named = set(RECORDED.findall(path.read_text()))
        assert named, path.name
        assert named <= recorded, path.name


def test_every_route_that_is_named_is_one_of_the_api() -> None:
    known = {route.name for route in ROUTES}
    for path in (RULES, RULES_TEST, DASHBOARD):
        named = {name for names in ROUTE.findall(path.read_text()) for name in names.split("|")}
        assert named, path.name
        assert named <= known, path.name


@pytest.mark.parametrize("who", PAGES_OF)
def test_the_page_has_every_metric_with_its_labels(who: str) -> None:
    """``REWRITE=1`` writes it anew."""
    lines = ["| metric | type | labels | meaning |\n|---|---|---|---|\n"]
    for family in families(who):
        labels = sorted({label for s in family.samples for label in s.labels} - {"le"})
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        kind = "gauge" if family.type == "info" else family.type  # so the classic text says
        cells = (f"`{family.name}{suffix}`", kind, ", ".join(labels), family.documentation)
        lines.append(f"| {' | '.join(cells)} |\n")
    begin, end = BEGIN.format(who), END.format(who)
    before, _, rest = PAGE.read_text().partition(begin)
    _, _, after = rest.partition(end)
    wanted = before + begin + "".join(lines) + end + after
    if os.environ.get("REWRITE") == "1":
        PAGE.write_text(wanted)
    assert PAGE.read_text() == wanted


def test_the_bounds_that_rules_name_are_those_of_the_coordinator() -> None:
    """The rules repeat them as numbers, since the coordinator exports no metric for them."""
    text = RULES.read_text()
    files = f"0.8 * clamp_max(process_max_fds - {SPARE_FILES}, {MOST_CONNECTIONS})"
    for said in (f"failover_coordinator_blocked_readers > {MAX_READERS * 0.8:.0f}\n", files):
        assert text.count(said) == 1
    assert f"of {MAX_READERS} at most" in text


def test_every_alert_has_its_chapter_and_every_chapter_its_alert() -> None:
    text = RULES.read_text()
    alerts = ALERT.findall(text)
    chapters = re.findall(r"^## (\w+)$", RUNBOOKS.read_text(), re.MULTILINE)
    assert len(alerts) == len(set(alerts))
    assert sorted(alerts) == sorted(chapters)
    anchors = re.findall(r"runbook: docs/runbooks\.md#(\w+)$", text, re.MULTILINE)
    assert anchors == [alert.lower() for alert in alerts]


def test_the_dashboard_has_no_panel_twice_and_names_no_data_source() -> None:
    every = json.loads(DASHBOARD.read_text())["panels"]
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in every}
    assert len(places) == len({p["id"] for p in every}) == len(every)
    panels = [panel for panel in every if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}


def test_promtool_finds_no_fault_with_the_names(promtool: Promtool) -> None:
    page, _ = metrics.build_page(of_an_agent(), "")
    assert page.count(b"\n") > 100
    assert promtool("check", "metrics", page=page) == (0, "")


@pytest.mark.parametrize("name", ["prometheus", "compose"])
def test_promtool_accepts_the_sample_of_a_configuration(promtool: Promtool, name: str) -> None:
    code, said = promtool("check", "config", str(ROOT / f"config/prometheus/{name}.yml"))
    assert code == 0, said


def test_the_rules_pass_their_tests(promtool: Promtool) -> None:
    code, said = promtool("test", "rules", str(RULES_TEST))
    assert code == 0, said


@pytest.mark.parametrize("alert", ALERT.findall(RULES.read_text()))
def test_the_tests_of_the_rules_would_miss_an_alert_that_never_fires(
    promtool: Promtool, tmp_path: Path, alert: str
) -> None:
    head, *tests = re.split(r"^(?=  - name: )", RULES_TEST.read_text(), flags=re.MULTILINE)
    text = "".join([head, *(test for test in tests if f"alertname: {alert}\n" in test)])
    rules = yaml.safe_load(RULES.read_text())
    for group in rules["groups"]:  # what these tests are not about takes long
        kept = {None, *re.findall(r"alertname: (\w+)\n", text)}
        group["rules"] = [rule for rule in group["rules"] if rule.get("alert") in kept]
        for rule in group["rules"]:
            if rule.get("alert") == alert:
                rule["expr"] = "vector(1) > 2"
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "rules_test.yml").write_text(text)
    code, said = promtool("test", "rules", "rules_test.yml", where=tmp_path)
    assert code != 0
    assert alert in said
