"""The documents that are made from the code are what is in the repository. REWRITE=1 renews them."""

import os
import re
import tomllib
from pathlib import Path

import pytest

from agent.cli.reference import PROGRAMS, sample, settings_page
from agent.errors import ExitCode
from agent.settings.checks import TYPES
from agent.settings.describe import describe
from agent.settings.models import AgentForm, CoordinatorSettings, Settings
from agent.settings.sources import load

ROOT = Path(__file__).parents[2]
SAMPLES = {
    AgentForm: ROOT / "config/agent.toml",
    CoordinatorSettings: ROOT / "config/coordinator.toml",
}
MODELS = [model for _, model in PROGRAMS]
COMMENTED = re.compile(r"^#(\[+[a-z_]+\]+|[a-z_]+ = .*)$", re.MULTILINE)


def same(path: Path, text: str) -> None:
    if os.environ.get("REWRITE"):
        path.write_text(text)
    assert path.read_text() == text, f"stale: REWRITE=1 pytest {Path(__file__).name} renews it"


def test_the_settings_page_is_up_to_date() -> None:
    same(ROOT / "docs/settings.md", settings_page())


@pytest.mark.parametrize(("program", "model"), PROGRAMS)
def test_the_samples_are_up_to_date(program: str, model: type[Settings]) -> None:
    same(SAMPLES[model], sample(program, model))


@pytest.mark.parametrize("model", MODELS)
def test_a_sample_loads_and_changes_nothing_but_the_group(model: type[Settings]) -> None:
    loaded = load(model, path=SAMPLES[model]).model_dump()
    if model is AgentForm:
        assert loaded.pop("group") == "demo"
    assert loaded.items() <= model().model_dump().items()


@pytest.mark.parametrize("model", MODELS)
def test_a_sample_names_every_setting_with_its_default(model: type[Settings]) -> None:
    shown = tomllib.loads(COMMENTED.sub(r"\1", SAMPLES[model].read_text()))
    assert set(shown) == set(model.model_fields)
    defaults = {d.key: shown[d.key] for d in describe(model) if d.default is not None}
    assert model(**defaults) == model()


@pytest.mark.parametrize("model", MODELS)
def test_every_setting_that_is_not_set_by_default_says_what_happens_then(
    model: type[Settings],
) -> None:
    silent = [
        d.key
        for d in describe(model)
        if d.default is None and "Not set:" not in d.meaning and d.key != "group"
    ]
    assert not silent
    assert all(d.meaning.endswith(".") for d in describe(model))


def test_the_sample_has_a_table_of_each_type_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(COMMENTED.sub(r"\1", SAMPLES[AgentForm].read_text()))
    shown = tomllib.loads(path.read_text())["check"]
    checks = AgentForm.model_validate({"check": shown}).check
    assert [check.type for check in checks] == list(TYPES)
    assert len({check.name for check in checks}) == len(TYPES)


def test_the_settings_page_explains_every_key_of_every_table() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    tables = [t for model in MODELS for setting in describe(model) for t in setting.tables]
    assert [t.type for t in tables if t.header == "[[check]]"] == list(TYPES)
    for table in tables:
        for key in (key for key in table.keys if key.key != "type"):
            assert page.count(f"| `{key.key}` | {key.kind} |"), key
            assert key.meaning.endswith("."), key
            assert key.required or key.default is not None or "Not set:" in key.meaning, key


def test_the_exit_codes_page_has_every_code_once_under_its_name() -> None:
    rows = re.findall(
        r"^\| (\d+) \| ([A-Z_]+) \| \S.*\. \|$",
        (ROOT / "docs/exit-codes.md").read_text(),
        re.MULTILINE,
    )
    assert [(int(code), name) for code, name in rows] == [(c.value, c.name) for c in ExitCode]
