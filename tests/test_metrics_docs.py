"""Names of metrics in rules, dashboard and documents are those of the agent; promtool finds no fault."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from agent.daemon import metrics
from tests.daemon.test_metrics import snapshot

ROOT = Path(__file__).parents[1]
RULES = ROOT / "config/prometheus/rules.yml"
RULES_TEST = ROOT / "config/prometheus/rules_test.yml"
DASHBOARD = ROOT / "config/grafana/dashboard.json"
PAGE = ROOT / "docs/metrics.md"
RUNBOOKS = ROOT / "docs/runbooks.md"

NAME = re.compile(r"(?<![\w:])failover_agent_\w+")
ALERT = re.compile(r"^ +- alert: (\w+)$", re.MULTILINE)
BEGIN, END = "<!-- begin of the table -->\n", "<!-- end of the table -->\n"
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
            [self._path, *words], input=page, cwd=where, capture_output=True, check=False
        )
        return done.returncode, (done.stdout + done.stderr).decode()


@pytest.fixture
def promtool() -> Promtool:
    return Promtool()


def families() -> list[Metric]:
    registry = CollectorRegistry()
    metrics.register(registry, snapshot)
    return [family for family in registry.collect() if family.name.startswith("failover_agent_")]


def test_every_metric_that_is_named_is_one_of_the_agent() -> None:
    known = {sample.name for family in families() for sample in family.samples}
    known |= {family.name for family in families() if family.type == "histogram"}
    for path in (RULES, RULES_TEST, DASHBOARD, PAGE, RUNBOOKS):
        named = set(NAME.findall(path.read_text()))
        assert named, path.name
        assert named <= known, path.name


def test_the_page_has_every_metric_with_its_labels() -> None:
    """``REWRITE=1`` writes it anew."""
    lines = ["| metric | type | labels | meaning |\n|---|---|---|---|\n"]
    for family in families():
        labels = sorted({label for s in family.samples for label in s.labels} - {"le"})
        name = f"{family.name}_total" if family.type == "counter" else family.name
        cells = (f"`{name}`", family.type, ", ".join(labels), family.documentation)
        lines.append(f"| {' | '.join(cells)} |\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = before + BEGIN + "".join(lines) + END + after
    if os.environ.get("REWRITE") == "1":
        PAGE.write_text(wanted)
    assert PAGE.read_text() == wanted


def test_every_alert_has_its_chapter_and_every_chapter_its_alert() -> None:
    text = RULES.read_text()
    alerts = ALERT.findall(text)
    chapters = re.findall(r"^## (\w+)$", RUNBOOKS.read_text(), re.MULTILINE)
    assert len(alerts) == len(set(alerts))
    assert sorted(alerts) == sorted(chapters)
    anchors = re.findall(r"runbook: docs/runbooks\.md#(\w+)$", text, re.MULTILINE)
    assert anchors == [alert.lower() for alert in alerts]


def test_the_dashboard_has_no_panel_twice_and_names_no_data_source() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}
    assert len(places) == len({p["id"] for p in panels}) == len(panels)
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}


def test_promtool_finds_no_fault_with_the_names(promtool: Promtool) -> None:
    registry = CollectorRegistry()
    metrics.register(registry, snapshot)
    page, _ = metrics.page_of(registry, "")
    assert page.count(b"\n") > 100
    assert promtool("check", "metrics", page=page) == (0, "")


def test_promtool_accepts_the_sample_of_a_configuration(promtool: Promtool) -> None:
    code, said = promtool("check", "config", str(ROOT / "config/prometheus/prometheus.yml"))
    assert code == 0, said


def test_the_rules_pass_their_tests(promtool: Promtool) -> None:
    code, said = promtool("test", "rules", str(RULES_TEST))
    assert code == 0, said


@pytest.mark.parametrize("alert", ALERT.findall(RULES.read_text()))
def test_the_tests_of_the_rules_would_miss_an_alert_that_never_fires(
    promtool: Promtool, tmp_path: Path, alert: str
) -> None:
    text = RULES.read_text()
    begin = text.index("expr:", text.index(f"alert: {alert}\n"))
    end = text.index("labels:", begin)
    (tmp_path / "rules.yml").write_text(f"{text[:begin]}expr: vector(1) > 2\n        {text[end:]}")
    (tmp_path / "rules_test.yml").write_text(RULES_TEST.read_text())
    code, said = promtool("test", "rules", "rules_test.yml", where=tmp_path)
    assert code != 0
    assert alert in said
