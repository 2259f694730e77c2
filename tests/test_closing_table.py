"""Nothing is skipped silently: the plugin at work in small runs of pytest of its own."""

from pathlib import Path

import pytest

from tests.closing_table import ClosingTable, Need, parse_need

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
RUNS = "import pytest\ndef test_runs(): pass\n"
LACKS = 'def test_{name}(): pytest.skip("needs: {component}: apt-get install {component}")\n'


def run(pytester: pytest.Pytester, source: str, *, ci: bool = False) -> pytest.RunResult:
    pytester.makepyfile(RUNS + source)
    return pytester.runpytest_inprocess("-ra", "-p", "no:asyncio", plugins=[ClosingTable(ci=ci)])


def test_table_counts_the_tests_of_each_component(pytester: pytest.Pytester) -> None:
    """The table stands after pytest's summary and before its closing line; the run succeeds."""
    lacking = [("a", "mosquitto"), ("b", "etcd-server"), ("c", "mosquitto")]
    source = "".join(LACKS.format(name=name, component=component) for name, component in lacking)
    result = run(pytester, source)
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines(
        [
            "*= short test summary info =*",
            "*= Not run here =*",
            "component    tests  how to get it",
            "etcd-server      1  apt-get install etcd-server",
            "mosquitto        2  apt-get install mosquitto",
            "*= 1 passed, 3 skipped in *",
        ],
        consecutive=False,
    )


def test_no_table_when_everything_ran(pytester: pytest.Pytester) -> None:
    result = run(pytester, "")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("*Not run here*")


def test_in_ci_a_missing_component_fails_the_run(pytester: pytest.Pytester) -> None:
    """The table is printed all the same."""
    result = run(pytester, LACKS.format(name="a", component="etcd-server"), ci=True)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*with CI=true every test has to run*", "etcd-server      1  *"])


@pytest.mark.parametrize(
    ("source", "outcomes"),
    [
        pytest.param('def test_a(): pytest.skip("slow")', {"failed": 1}, id="in-the-test"),
        pytest.param('def test_a(): pytest.skip("needs: etcd")', {"failed": 1}, id="no-how"),
        pytest.param("def test_a(): pytest.importorskip('nonsense')", {"failed": 1}, id="import"),
        pytest.param(
            "@pytest.mark.skipif(True, reason='not here')\ndef test_a(): pass",
            {"errors": 1},
            id="mark",
        ),
        pytest.param(
            "@pytest.fixture\ndef lost(): pytest.skip('tired')\ndef test_a(lost): pass",
            {"errors": 1},
            id="fixture",
        ),
    ],
)
def test_any_other_reason_fails_the_run(
    pytester: pytest.Pytester, source: str, outcomes: dict[str, int]
) -> None:
    result = run(pytester, source)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, **outcomes)
    result.stdout.fnmatch_lines(["*nothing is skipped silently*"])


def test_a_whole_file_is_not_skipped(pytester: pytest.Pytester) -> None:
    """Its tests could not be counted, whatever the reason."""
    result = run(pytester, 'pytest.skip("needs: etcd: apt-get", allow_module_level=True)')
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*needs: etcd: apt-get; a whole file is not skipped*"])


def test_expected_failures_are_no_skips(pytester: pytest.Pytester) -> None:
    result = run(pytester, "@pytest.mark.xfail(strict=True)\ndef test_a(): assert False")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1, xfailed=1)


@pytest.mark.parametrize(
    ("reason", "need"),
    [
        ("needs: etcd: apt-get install etcd", Need("etcd", "apt-get install etcd")),
        ("needs: a: b: c", Need("a", "b: c")),
        ("needs: etcd:", None),
        ("needs: : apt-get install etcd", None),
        ("etcd: apt-get install etcd", None),
    ],
)
def test_a_need_states_component_and_remedy(reason: str, need: Need | None) -> None:
    assert parse_need(reason) == need


def test_workers_report_what_they_lack(pytester: pytest.Pytester) -> None:
    """As in `make test`: the tests run in other processes, and the table stands where they report."""
    pytester.makeconftest(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.closing_table import ClosingTable\n"
        "def pytest_configure(config):\n"
        "    config.pluginmanager.register(ClosingTable(ci=False))\n"
    )
    pytester.makepyfile(RUNS + LACKS.format(name="a", component="etcd-server"))
    result = pytester.runpytest_inprocess("-n2", "-p", "no:asyncio")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*= Not run here =*", "etcd-server      1  *"])
