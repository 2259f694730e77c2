"""The closing table: which tests did not run here, and what they need. Nothing is skipped silently.

A test may be skipped for one reason only, a real component that this machine lacks, and says so by
``pytest.skip("needs: <component>: <how to get it>")``. Any other skip is made a failure; with
``ci=True`` this one is too, for there everything has to run. Knows no component by name.
"""

from collections import Counter
from collections.abc import Generator
from typing import NamedTuple

import pytest

SKIP_PREFIX = "needs: "
PROPERTY = "need"


class Need(NamedTuple):
    """What a skipped test lacks."""

    component: str
    how: str


def parse_need(reason: str) -> Need | None:
    """The need that a skip's reason states, or None if it states none."""
    component, _, how = reason.removeprefix(SKIP_PREFIX).partition(": ")
    stated = reason.startswith(SKIP_PREFIX) and component.strip() and how.strip()
    return Need(component.strip(), how.strip()) if stated else None


class ClosingTable:
    """A pytest plugin. Register it in ``pytest_configure``, with pytest-xdist in each process.

    A report carries the need of its test, because a worker has no terminal to print the table on.
    """

    def __init__(self, *, ci: bool) -> None:
        self._ci = ci
        self._lacking: Counter[Need] = Counter()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if not report.skipped or hasattr(report, "wasxfail") or call.excinfo is None:
            return report
        reason = str(call.excinfo.value)
        need = parse_need(reason)
        if need is not None:
            item.user_properties.append(
                (PROPERTY, tuple(need))
            )  # a tuple: execnet, which connects the workers, cannot send a Need
            if not self._ci:
                report.user_properties = item.user_properties
                return report
        why = "with CI=true every test has to run" if need else "nothing is skipped silently"
        failure = pytest.fail.Exception(
            f"skipped: {reason!r}; {why}: the one reason allowed, and only outside CI,"
            f" is '{SKIP_PREFIX}<component>: <how to get it>'",
            pytrace=False,
        )
        call.excinfo = pytest.ExceptionInfo.from_exception(failure.with_traceback(call.excinfo.tb))
        return pytest.TestReport.from_item_and_call(item, call)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        stated = dict(report.user_properties).get(PROPERTY) if report.when != "teardown" else None
        if stated is not None:
            assert isinstance(stated, tuple | list)  # execnet makes it a list
            self._lacking[Need(*stated)] += 1

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_make_collect_report(
        self,
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        report = yield
        if report.skipped:
            assert isinstance(report.longrepr, tuple)
            report.outcome = "failed"
            report.longrepr = (
                f"{report.longrepr[2]}; a whole file is not skipped, since its tests could not be"
                f" counted: skip each of them, for '{SKIP_PREFIX}<component>: <how to get it>'"
            )
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Generator[None]:
        yield
        if not self._lacking:
            return
        rows = [("component", "tests", "how to get it")]
        rows += [
            (need.component, str(count), need.how) for need, count in sorted(self._lacking.items())
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        terminalreporter.section("Not run here")
        for component, count, how in rows:
            terminalreporter.line(f"{component:<{widths[0]}}  {count:>{widths[1]}}  {how}")
