"""The pages are true: links, citations, command lines, names, rule numbers, the calls of the API."""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

import click
import pytest

from agent.cli.command_line import cli
from agent.cli.main import main
from agent.cli.settings_reader import commands
from agent.coordinator.route_table import ROUTES
from agent.schema import codec
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.fields import Setting, Settings, settings_of
from agent.schema.settings import AgentSettings
from tests.reference import tables_of
from tests.test_metrics_docs import exported

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*sorted((ROOT / "agent").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
PREFIXES: Mapping[str, type[Settings]] = {
    "FAILOVER_AGENT_": AgentSettings,
    "FAILOVER_COORDINATOR_": CoordinatorSettings,
}
SETTINGS: Mapping[str, Setting] = {
    setting.name: setting for model in PREFIXES.values() for setting in settings_of(model)
}

FENCE = re.compile(r"^( *)```([\w-]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
NAME = re.compile(r"`[^`\n]*`")
COMMAND = re.compile(r"^(?:[$#] )?(?:[A-Z_]+=\S+ )*(?:\S*/)?failover-agent((?: .*)?)$")
CITATION = re.compile(
    r"(?<![\w./%*<-])(?:docs/)?((?:README|CHANGELOG|[a-z][a-z-]*)\.md)(?!\w)"
    r"(?:#([\w-]+))?(?:,? \(?(?:\"([^\"]+)\"|'([^']+)')|(?:, | \(|,? part )([A-Z](?:\.\d+)?)(?![\w']))?"
)
SECTION_OF = re.compile(
    r"[Ss]ection (?P<quote>[\"'])(?P<section>[^\"']+)(?P=quote) (?:of|in) (?:docs/)?(?P<page>[a-z-]+\.md)"
)
BENCHMARK = re.compile(r"\bpython (?:-m tests\.bench\.|tests/bench/)(\w+)(?:\.py)?([^\n]*)")
LOG_LINE = re.compile(r"^(?:\S+Z )?(?:INFO|WARNING|ERROR) ([^=\n]+?)(?: \w+=.*)?$", re.MULTILINE)
PHRASE = re.compile(r"`([a-z][a-z'-]*(?: [a-z',-]+)+)`")
PROGRAM = re.compile(
    r"(buildah|chown|consul|cp|curl|docker|env|etcdctl|failover-agent|git|journalctl|kubectl|make|ss|su|systemctl) "
)
"""The first word of a phrase in backticks that is a command, and so not a phrase of the code."""

READ = frozenset({"", ".conf", ".md", ".py", ".service", ".sh", ".toml", ".txt", ".yaml", ".yml"})
GENERATED = {"settings.md", "roles.md", "CHANGELOG.md"}
"""Made from code, or a list."""

READERS = (
    "authors",
    "readers",
    "those",
    "operators",
    "SREs",
    "people",
    "somebody",
    "developers",
    "scripts",
    "reviewers",
)
SVG = "{http://www.w3.org/2000/svg}"
AFTER_A_COMMAND = re.compile(r"\|\|?|&&?|;|\d*(>>?|<).*")
RULES = {f"R{number}" for number in range(1, 21)}
FAILSAFE_RULES = {f"R{number}" for number in range(21, 36)}
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
    """The anchors that GitHub makes from headings."""
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
            if AFTER_A_COMMAND.fullmatch(arg):
                break
            args.append(arg)
        yield args


def parse(args: list[str]) -> None:
    """Let click read a command line; nothing is run. Raises click.UsageError."""
    command: click.Command = cli
    context: click.Context | None = None
    options = commands(lambda _: 0)
    while True:
        try:
            context = command.make_context(command.name, list(args), parent=context, obj=options)
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


def test_every_command_line_in_a_page_is_valid() -> None:
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
def test_a_wrong_command_line_is_found(line: str) -> None:
    (args,) = command_lines(line)
    with pytest.raises(click.UsageError):
        parse(args)


def test_the_diagrams_of_explain_timing_are_the_programs_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting in settings_of(AgentSettings):
        monkeypatch.delenv(f"FAILOVER_AGENT_{setting.name.upper()}", raising=False)
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


def test_every_environment_variable_in_a_page_exists() -> None:
    """A setting's variable belongs to a setting; any other is in the code, the tests or the Makefile."""
    known = "\n".join(
        path.read_text() for path in [*SOURCES, ROOT / "Makefile"] if path != Path(__file__)
    )
    mentioned = in_backticks(r"\bFAILOVER_[A-Z_]*[A-Z]\b")
    assert mentioned
    for page, name in mentioned:
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is not None:
            assert name.removeprefix(prefix) in {
                s.name.upper() for s in settings_of(PREFIXES[prefix])
            }, f"{page}: {name}"
        else:
            assert re.search(rf"\b{name}\b", known), f"{page}: {name}"


def test_every_setting_and_metric_named_in_a_page_exists() -> None:
    """Settings and metrics: ``failover_timeout``, ``failover_..._total``."""
    metrics = exported()
    known = "\n".join(path.read_text() for path in SOURCES if path != Path(__file__))
    for page, name in in_backticks(r"\bfailover_[a-z_]*[a-z]\b"):
        if name in SETTINGS or name in metrics:
            continue
        assert re.search(rf'["\'{{ ]{name}["\'}} =:]', known), f"{page}: {name}"


def test_every_key_in_a_sample_configuration_is_a_setting() -> None:
    samples = [block for block in blocks() if block.language == "toml"]
    assert samples
    for block in samples:
        keys = set(SETTINGS)
        for line in block.text.splitlines():
            if header := re.match(r"^#?\[+([a-z_]+)\]+", line):
                assert header[1] in SETTINGS, f"{block.page}: {line}"
                tables = tables_of(SETTINGS[header[1]]).values()
                keys = {key.name for table in tables for key in settings_of(table)}
            elif key := re.match(r"^#?([a-z_]+) *=", line):
                assert key[1] in keys, f"{block.page}: {line}"


def test_every_flag_in_a_page_is_one_of_the_program() -> None:
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
        context = click.Context(command, obj=commands(lambda _: 0))
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from flags(inner)


def test_every_benchmark_is_in_a_page_with_flags_that_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used: dict[str, set[str]] = {
        path.stem: set() for path in (ROOT / "tests/bench").glob("[!_]*.py")
    }
    shown = set()
    for block in blocks():
        for name, rest in BENCHMARK.findall(block.text):
            shown.add(name)
            used[name] |= set(re.findall(r"--[a-z-]+", rest))
    assert shown == set(used)
    for name, flags in used.items():
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as ended:
            import_module(f"tests.bench.{name}").main()
        assert ended.value.code == 0
        assert flags <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out)), name


def test_every_phrase_and_log_line_in_a_page_is_in_the_code() -> None:
    """A reader searches the code for phrases in backticks (commands apart) and for the log lines that a page shows."""
    sources = "\n".join(path.read_text() for path in (ROOT / "agent").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", sources)
    found = set()
    for page in PAGES:
        text = page.read_text()
        found |= {(page.name, line) for line in LOG_LINE.findall(text)}
        found |= {(page.name, phrase) for phrase in PHRASE.findall(prose(text))}
    assert len(found) > 50
    ours = set(sub_commands(cli))
    unknown = {one for one in found if one[1] not in code and one[1] not in ours}
    assert {one for one in unknown if not PROGRAM.match(one[1])} == set()


def sub_commands(group: click.Group) -> Iterator[str]:
    context = click.Context(group, obj=commands(lambda _: 0))
    for name in group.list_commands(context):
        inner = group.get_command(context, name)
        if isinstance(inner, click.Group):
            yield from (f"{name} {one}" for one in inner.list_commands(context))


def test_every_make_target_in_a_page_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*?##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = in_backticks(r"\bmake ([a-z-]+)")
    assert {name for _, name in named} > {"demo", "test"}
    assert {one for one in named if one[1] not in targets} == set()


@pytest.mark.parametrize("what", OUTSIDE)
def test_no_page_names_a_registry_or_a_private_folder(what: str) -> None:
    for page in PAGES:
        found = [match[0] for match in re.finditer(OUTSIDE[what], page.read_text())]
        assert not found, f"{page.name}: {what}"


def test_every_cited_rule_is_in_the_design() -> None:
    numbered = re.findall(
        r"^- \*\*(R\d+)\.\*\*", (ROOT / "docs/design.md").read_text(), re.MULTILINE
    )
    assert len(numbered) == len(RULES)
    assert set(numbered) == RULES
    text = (ROOT / "docs/failsafe.md").read_text()
    assert set(re.findall(r"^- \*\*(R\d+)\.\*\*", text, re.MULTILINE)) == FAILSAFE_RULES
    for path in [*SOURCES, *PAGES]:
        if path != Path(__file__):
            cited = set(re.findall(r"(?<![\w/])R[0-9]+\b", path.read_text()))
            unknown = cited - RULES - FAILSAFE_RULES
            assert not unknown, f"{path.relative_to(ROOT)}: {unknown}"


def texts() -> list[Path]:
    """Every file that people read: code, pages, samples, units and tests."""
    folders = ("agent", "config", "docs", "requirements", "systemd", "tests", ".ci")
    named = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    at_the_top = [ROOT / name for name in ("README.md", "CHANGELOG.md", "Dockerfile", "Makefile")]
    return [path for path in [*at_the_top, *named] if path.suffix in READ and path.is_file()]


def citations(text: str) -> Iterator[tuple[str, str, str]]:
    """(page, section or "", anchor or "") of each mention of a page, over the ends of lines."""
    flowing = re.sub(r"\s*\n[ \t]*(?:#+ |# ?|//|\* )?", " ", text)
    for found in CITATION.finditer(flowing):
        page, anchor, *sections, letter = found.groups(default="")
        yield page, next(filter(None, sections), "") or letter, anchor
    for found in SECTION_OF.finditer(flowing):
        yield found["page"], found["section"], ""


def dangling(text: str) -> list[str]:
    """The citations in a text whose page, section or anchor is not there."""
    wrong = []
    for name, section, anchor in citations(text):
        page = ROOT / name if name in {"README.md", "CHANGELOG.md"} else ROOT / "docs" / name
        there = page.exists()
        titles = HEADING.findall(prose(page.read_text())) if there else []
        there = there and (not section or section in titles)
        if not (there and (not anchor or anchor in anchors(page))):
            wrong.append(", ".join(filter(None, (name, section, anchor))))
    return wrong


def test_every_citation_of_a_page_or_a_section_leads_somewhere() -> None:
    cited = {path: dangling(path.read_text()) for path in texts() if path != Path(__file__)}
    assert not {str(path.relative_to(ROOT)): wrong for path, wrong in cited.items() if wrong}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_section_that_is_said_to_be_below_is_there(page: Path) -> None:
    text = prose(page.read_text())
    cited = re.findall(r"[\"']([A-Z][^\"'\n]+)[\"'],? (?:above|below)\b", text)
    assert set(cited) <= set(HEADING.findall(text))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("see docs/guard.md", []),
        ("see docs/guards.md", ["guards.md"]),
        ('(docs/hooks.md, "What a demotion ends")', []),
        ("(hooks.md, 'What a demotion ends')", []),
        ('(docs/hooks.md, "What a\n    # demotion ends")', []),
        ('(docs/hooks.md, "What a demotion is")', ["hooks.md, What a demotion is"]),
        ("as api.md, B.4 has it", ["api.md, B.4"]),
        ("as api.md (B) has it", ["api.md, B"]),
        ("as api.md, part C, has it", ["api.md, C"]),
        ('the section "History" of docs/api.md', []),
        ('section "Story" of docs/api.md', ["api.md, Story"]),
        ("runbook: docs/runbooks.md#failoverunfit", []),
        ("runbook: docs/runbooks.md#unfit", ["runbooks.md, unfit"]),
    ],
)
def test_a_citation_that_dangles_is_found(text: str, wrong: list[str]) -> None:
    assert dangling(text) == wrong


INCLUDED = re.compile(r"^<!-- (config/\S+) -->\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_recipe_is_shown_as_it_is() -> None:
    shown = dict(INCLUDED.findall((ROOT / "docs/recipes.md").read_text()))
    recipes = (path for path in (ROOT / "config/recipes").iterdir() if path.is_file())
    assert shown == {str(path.relative_to(ROOT)): path.read_text() for path in recipes}


@pytest.mark.parametrize("name", sorted({page.name for page in PAGES} - GENERATED))
def test_a_page_says_in_its_first_lines_for_whom_it_is(name: str) -> None:
    page = next(page for page in PAGES if page.name == name)
    introduction = re.split(r"^## ", page.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    readers = "|".join(READERS)
    assert re.search(rf"\b[Ff]or ({readers})\b", " ".join(introduction.split()))


def test_the_picture_is_well_formed_and_names_what_it_shows() -> None:
    root = ET.parse(ROOT / "docs/overview.svg").getroot()
    words = " ".join(text for text in root.itertext() if "{" not in text)
    assert root.tag == f"{SVG}svg"
    for shown in (
        "host-a",
        "host-b",
        "coordinator",
        "agent",
        "guard",
        "hooks",
        "heartbeat",
        "epoch",
    ):
        assert re.search(rf"\b{shown}\b", words), shown
    assert root.find(f"{SVG}title") is not None
    assert root.find(f"{SVG}desc") is not None


def test_the_picture_has_colours_for_light_and_dark() -> None:
    style = ET.parse(ROOT / "docs/overview.svg").getroot().findtext(f"{SVG}style")
    assert style is not None
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    drawn = set(re.findall(r"(\.?\w+) \{", light))
    assert drawn - set(re.findall(r"(\.?\w+) \{", dark)) == {".name"}, "a weight, no colour"


def test_the_api_page_has_every_call_with_its_statuses() -> None:
    documented = {}
    for line in (ROOT / "docs/api.md").read_text().splitlines():
        if re.match(r"\| `[A-Z]+ (/\S+)?` \|", line):
            head, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            method, _, path = head.strip("`").partition(" ")
            documented[method, path] = rest
    routes = {(route.method, route.path): route for route in ROUTES if route.right is not None}
    assert set(documented) == set(routes)
    for call, (body, success, refused, right) in documented.items():
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
    for shape in codec.SHAPES:
        for name in shape.__struct_encode_fields__:
            assert re.search(rf"\b{name}\b", page), f"{shape.__name__}.{name}"


def test_the_readme_shows_the_demonstrations_own_sentences() -> None:
    source = (ROOT / "agent/cli/demo.py").read_text()
    sentences = re.findall(r"^ok +0  \w+: (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(sentences) == 6
    assert [text for text in sentences if text not in source] == []
