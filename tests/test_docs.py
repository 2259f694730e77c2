"""What the documents say is so: links, command lines, names, rule numbers, the calls of the API."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from agent.cli.main import Wishes, cli, main
from agent.cli.reader import commands
from agent.coordinator.calls import ROUTES
from agent.schema import access, codec
from agent.settings.describe import Described, describe
from agent.settings.models import AgentForm, CoordinatorSettings, Settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*sorted((ROOT / "agent").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
PREFIXES: Mapping[str, type[Settings]] = {
    "FAILOVER_AGENT_": AgentForm,
    "FAILOVER_COORDINATOR_": CoordinatorSettings,
}
SETTINGS: Mapping[str, Described] = {
    setting.key: setting for model in PREFIXES.values() for setting in describe(model)
}

FENCE = re.compile(r"^( *)```([\w-]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
NAME = re.compile(r"`[^`\n]*`")
COMMAND = re.compile(r"^(?:[$#] )?(?:[A-Z_]+=\S+ )*(?:\S*/)?failover-agent((?: .*)?)$")
AFTER_A_COMMAND = frozenset({"|", "||", "&", "&&", ";", ">", ">>", "2>", "2>&1", "<"})
RULES = {f"R{number}" for number in range(1, 20)}
OUTSIDE = {
    "a package registry": r"(pypi|pythonhosted|npmjs|docker|ghcr|quay|crates|golang)\.(org|io|com)\b",
    "somebody's own folder": r"(?<![\w.])/(home|Users|root|work|workspace)/\w|[A-Z]:\\Users|/tmp/tmp",
    "an index option": r"--(extra-)?index-url",
}


class Block(NamedTuple):
    """A fenced block."""

    page: str
    language: str
    text: str


def blocks() -> list[Block]:
    return [
        Block(page.name, language, text)
        for page in PAGES
        for _, language, text in FENCE.findall(page.read_text())
    ]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = HEADING.findall(prose(page.read_text()))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def command_lines(text: str) -> Iterator[list[str]]:
    """The arguments of each failover-agent in a block, up to what the shell does with it."""
    for line in text.replace("\\\n", " ").splitlines():
        found = COMMAND.match(line.strip().removeprefix("ExecStart="))
        if found is None:
            continue
        args: list[str] = []
        for arg in shlex.split(found[1], comments=True):
            if arg in AFTER_A_COMMAND:
                break
            args.append(arg)
        yield args


def parse(args: list[str]) -> None:
    """Let click read a command line; nothing is run. Raises click.UsageError."""
    command: click.Command = cli
    context: click.Context | None = None
    wishes = Wishes(own=commands(lambda _: 0))
    while True:
        try:
            context = command.make_context(command.name, list(args), parent=context, obj=wishes)
        except click.exceptions.Exit:
            return  # --help or --version
        if not isinstance(command, click.Group):
            return
        name, found, args = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert found is not None, name
        command = found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page.read_text())):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(linked), target


def test_every_command_line_in_the_documents_is_one() -> None:
    found = [(block, args) for block in blocks() for args in command_lines(block.text)]
    assert found
    wrong = []
    for block, args in found:
        try:
            parse(args)
        except click.UsageError as error:
            wrong.append(f"{block.page}: failover-agent {shlex.join(args)}: {error.message}")
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        "failover-agent serv",
        "$ failover-agent run --gruop x",
        "failover-agent status",
        "FAILOVER_AGENT_GROUP=x .venv/bin/failover-agent groups create | cat",
        "failover-agent explain-timing extra",
        "failover-agent run \\\n    --no-such-flag",
    ],
)
def test_a_command_line_that_is_wrong_is_found(line: str) -> None:
    (args,) = command_lines(line)
    with pytest.raises(click.UsageError):
        parse(args)


def test_the_pictures_of_a_budget_are_what_the_program_draws(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting in describe(AgentForm):
        monkeypatch.delenv(f"FAILOVER_AGENT_{setting.key.upper()}", raising=False)
    drawn = [b.text for b in blocks() if b.text.startswith("$ failover-agent explain-timing")]
    assert drawn
    for text in drawn:
        first, _, output = text.partition("\n")
        (args,) = command_lines(first)
        assert main(args) == 0
        assert capsys.readouterr().out == output, first


def in_backticks(pattern: str) -> set[tuple[str, str]]:
    """(page, name) of every name of that pattern that a page has in backticks or in a block."""
    return {
        (page.name, name)
        for page in PAGES
        for text in [*NAME.findall(prose(page.read_text())), *(m[2] for m in fenced(page))]
        for name in re.findall(pattern, text)
    }


def fenced(page: Path) -> list[tuple[str, str, str]]:
    return FENCE.findall(page.read_text())


def test_every_environment_variable_is_read_or_given_by_something() -> None:
    """A setting's variable has its setting; any other is in the code, the tests or the Makefile."""
    known = "\n".join(
        path.read_text() for path in [*SOURCES, ROOT / "Makefile"] if path != Path(__file__)
    )
    mentioned = in_backticks(r"\bFAILOVER_[A-Z_]*[A-Z]\b")
    assert mentioned
    for page, name in mentioned:
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is not None:
            key = name.removeprefix(prefix).lower()
            assert key in PREFIXES[prefix].model_fields, f"{page}: {name}"
        else:
            assert re.search(rf"\b{name}\b", known), f"{page}: {name}"


def test_every_name_with_the_projects_prefix_is_a_setting_or_in_the_code() -> None:
    """Settings and metrics: ``failover_timeout``, ``failover_..._total``.

    That the tables of metrics are right is seen to by test_metrics_docs.py.
    """
    tables = (ROOT / "docs/metrics.md").read_text()
    metrics = set(re.findall(r"^\| `(failover_\w+)` \|", tables, re.MULTILINE))
    assert metrics
    known = "\n".join(path.read_text() for path in SOURCES if path != Path(__file__))
    for page, name in in_backticks(r"\bfailover_[a-z_]*[a-z]\b"):
        if name in SETTINGS or name in metrics:
            continue
        assert re.search(rf'["\'{{ ]{name}["\'}} =:]', known), f"{page}: {name}"


def test_every_setting_in_a_sample_of_a_configuration_is_one() -> None:
    samples = [block for block in blocks() if block.language == "toml"]
    assert samples
    for block in samples:
        keys = set(SETTINGS)
        for line in block.text.splitlines():
            if header := re.match(r"^#?\[+([a-z_]+)\]+", line):
                assert header[1] in SETTINGS, f"{block.page}: {line}"
                keys = {key.key for table in SETTINGS[header[1]].tables for key in table.keys}
            elif key := re.match(r"^#?([a-z_]+) *=", line):
                assert key[1] in keys, f"{block.page}: {line}"


def test_every_flag_that_is_named_is_one_of_the_program() -> None:
    """Beside those of programs that a page names on the same line's backticks."""
    known = {"--help", "--version", "--debug", *flags(cli)}
    for page in PAGES:
        for name in NAME.findall(prose(page.read_text())):
            if re.match(r"`--[a-z]", name):
                flag = name.strip("`").partition("=")[0].split()[0]
                assert flag in known, f"{page.name}: {name}"


def flags(command: click.Command) -> Iterator[str]:
    for param in command.params:
        yield from (*param.opts, *param.secondary_opts)
    if isinstance(command, click.Group):
        context = click.Context(command, obj=Wishes(own=commands(lambda _: 0)))
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from flags(inner)


@pytest.mark.parametrize("what", OUTSIDE)
def test_nothing_of_outside_is_named(what: str) -> None:
    for page in PAGES:
        found = [match[0] for match in re.finditer(OUTSIDE[what], page.read_text())]
        assert not found, f"{page.name}: {what}"


def test_every_rule_that_is_cited_is_in_the_design() -> None:
    numbered = re.findall(
        r"^- \*\*(R\d+)\.\*\*", (ROOT / "docs/design.md").read_text(), re.MULTILINE
    )
    assert len(numbered) == len(RULES)
    assert set(numbered) == RULES
    for path in [*SOURCES, *PAGES]:
        if path != Path(__file__):
            cited = set(re.findall(r"(?<![\w/])R[0-9]+\b", path.read_text()))
            assert cited <= RULES, f"{path.relative_to(ROOT)}: {cited - RULES}"


def test_the_api_page_has_every_call_with_its_statuses() -> None:
    said = {}
    for line in (ROOT / "docs/api.md").read_text().splitlines():
        if re.match(r"\| `[A-Z]+ (/\S+)?` \|", line):
            head, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            method, _, path = head.strip("`").partition(" ")
            said[method, path] = rest
    routes = {(route.method, route.path): route for route in ROUTES if route.right is not None}
    assert set(said) == set(routes)
    for call, (body, success, refused, right) in said.items():
        route = routes[call]
        assert body == (route.body.__name__ if route.body else ""), call
        statuses = [int(n) for n in re.findall(r"\b[1-5]\d\d\b", success)]
        assert sorted(statuses) == sorted(result.status for result in route.results), call
        assert {int(n) for n in re.findall(r"\b[45]\d\d\b", refused)} == set(route.refusals), call
        assert route.right is not None
        expected = {"MANAGE": "ManageAccessControl"}.get(route.right.name or "", route.right.name)
        assert right.lower() == str(expected).lower(), call


def test_the_api_page_has_every_property() -> None:
    page = (ROOT / "docs/api.md").read_text()
    known: list[Any] = [
        *codec.REQUESTS,
        *codec.ANSWERS,
        access.Trustee,
        access.AccessControlEntry,
    ]
    for shape in known:
        for name in shape.__struct_encode_fields__:
            assert re.search(rf"\b{name}\b", page), f"{shape.__name__}.{name}"
