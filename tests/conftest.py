"""What every run of the suite has: the closing table, and the certainty of what it tests."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hypothesis import is_hypothesis_test, settings

from tests.closing_table import ClosingTable

# Hypothesis counts an example that a busy machine delays as a failure of the code under test. Its
# other settings stay as it chose them, which differs in CI.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


def pytest_configure(config: pytest.Config) -> None:
    refuse_the_checkout()
    config.pluginmanager.register(ClosingTable(ci=os.environ.get("CI") == "true"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the simulation search at full speed: being measured makes it three times slower.

    What it runs is measured in its other tests, which follow single schedules.
    """
    for item in items:
        searches = isinstance(item, pytest.Function) and (
            is_hypothesis_test(item.obj) or "a_search_finds" in item.name
        )
        if searches and "simulation" in item.path.parts:
            item.add_marker(pytest.mark.no_cover)


def refuse_the_checkout() -> None:
    """Stop a run that is meant for the installed wheel and would import something else."""
    if os.environ.get("FAILOVER_TEST_INSTALLED") != "1":
        return
    spec = importlib.util.find_spec("agent")
    if spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(sys.prefix):
        raise pytest.UsageError(
            f"FAILOVER_TEST_INSTALLED=1 asks for the wheel that is installed in {sys.prefix},"
            f" but agent would be imported from {spec and spec.origin}: run `make test`"
        )
