"""The pages of running programs as OpenMetrics, read by the strict parser of Prometheus' own library."""

from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as classic

from .stage import Agent, Coordinator, Stage, until

ACCEPT = (
    "application/openmetrics-text;version=1.0.0;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
"""The Accept header of a Prometheus with default settings."""

CHECK = '[{"name": "a_check", "type": "exec", "command": ["/bin/true"]}]'
GROUP = 'a "group" of ü'


def page(url: str, accept: str) -> str:
    with urlopen(Request(f"{url}/metrics", headers={"Accept": accept}), timeout=30) as answer:
        kind = "application/openmetrics-text" if accept else "text/plain"
        assert answer.headers["Content-Type"].startswith(f"{kind}; version=")
        return str(answer.read().decode())


def told(families: list[Metric]) -> set[tuple[str, ...]]:
    """Every series, by name and labels."""
    return {
        (sample.name, *map(str, sorted(sample.labels.items())))
        for family in families
        for sample in family.samples
        if "_created" not in sample.name and not family.name.endswith("_created")
    }


def both(url: str) -> list[Metric]:
    """What the page tells, which is the same series in both forms."""
    page(url, "")  # it counts itself from its second time on
    families = list(openmetrics(page(url, ACCEPT)))  # type: ignore[no-untyped-call] # theirs

    def agree() -> bool:
        return told(families) == told(list(classic(page(url, ""))))

    until(agree, "the same series in both forms")  # a page is kept for a second
    return families


def primary(stage: Stage, coordinator: Coordinator) -> Agent:
    flags = [f"--check={CHECK}", "--no-guard"]
    agent = stage.run("host-a", coordinator, flags=flags)
    agent.until_role("Primary")
    other = stage.run("host-b", coordinator, flags=flags)
    other.until_said("joined")
    stage.kill(agent)
    other.until_role("Primary")
    stage.until_event("host-b", "end", "primary")
    return other


@pytest.mark.parametrize("sessions", [False, True], ids=["sums", "sessions"])
def test_the_pages_of_a_coordinator_and_of_an_agent_are_openmetrics(
    stage: Stage, *, sessions: bool
) -> None:
    """After a takeover, in a group with a strange name."""
    stage.group = GROUP
    coordinator = stage.serve(*(["--session-metrics"] if sessions else []))
    agent = primary(stage, coordinator)
    parts = urlsplit(coordinator.endpoint)
    families = both(f"{parts.scheme}://{parts.netloc}")
    ended = next(f for f in families if f.name == "failover_coordinator_tenures_ended")
    expired = {"reason": "expired"}
    assert [s.value for s in ended.samples if s.labels == expired] == [1]
    scores = [f for f in families if f.name == "failover_coordinator_session_score"]
    assert len(scores) == sessions
    probe = agent.state["probe"]
    until(lambda: 'check="a_check"' in page(probe, ""), "the check to have run")
    names = {family.name for family in both(probe)}
    assert {"failover_agent_role", "failover_agent_role_changes"} <= names
