"""Shared by every run of the suite: the closing table, the order of the files, and a check of which code is tested."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import is_hypothesis_test, settings

from tests.closing_table import ClosingTable
from tests.distribution import Distribution, computes

# Hypothesis counts an example that a busy machine delays as a failure of the code under test. Its
# other settings stay as it chose them, which differs in CI.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

SEARCHED = {"cluster", "simulation"}
"""Where searches run the whole of the product, over and over."""

LOWEST_PRIORITY = 19

# What takes longest comes first: begun last, it would keep one worker of `make test` busy while the
# others are done.
ORDER = ("simulation/test_promise.py", "integration/", "simulation/", "cluster/")

LONGEST_SEARCH_S = 900 * max(
    1.0, int(os.environ.get("FAILOVER_SIMULATION_EXAMPLES", "2000")) / 2000
)
"""With more schedules than usual it takes longer in proportion."""

# Two members active at once are never a matter of a busy machine.
NEVER_REPEATED = [
    "overlap",
    "[Tt]wo were active",
    "active beside",
    "epochs do not increase",
    "older epoch",
]


def pytest_configure(config: pytest.Config) -> None:
    refuse_the_checkout()
    config.pluginmanager.register(ClosingTable(ci=os.environ.get("CI") == "true"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Distribution | None:
    return Distribution(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests into ORDER, let the simulations search at full speed, and bear a busy machine.

    Being measured makes a search three times slower; what it runs is measured in the other tests
    of its folder, which follow single schedules. A test of processes and clocks that fails is run once
    more, and the summary shows it: beside three thousand of them, a busy machine delays one now and then.
    """
    items.sort(key=lambda item: place(item.path))
    for item in items:
        if computes(item.path):
            item.add_marker(pytest.mark.timeout(LONGEST_SEARCH_S))
        elif os.environ.get("FAILOVER_TEST_INSTALLED") == "1":
            item.add_marker(pytest.mark.flaky(reruns=1, rerun_except=NEVER_REPEATED))
        searches = isinstance(item, pytest.Function) and (
            is_hypothesis_test(item.obj) or re.search("_finds?_a_", item.name) is not None
        )
        if searches and not SEARCHED.isdisjoint(item.path.parts):
            item.add_marker(pytest.mark.no_cover)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let a worker that computes give way to the others, which measure time.

    Only root can raise the priority again, for the files that the same worker takes afterwards.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and os.geteuid() == 0:
        os.setpriority(os.PRIO_PROCESS, 0, LOWEST_PRIORITY if computes(item.path) else 0)


def place(path: Path) -> int:
    """The place of a test file in ORDER; all that are not in it come last."""
    return next((n for n, part in enumerate(ORDER) if f"/tests/{part}" in str(path)), len(ORDER))


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
