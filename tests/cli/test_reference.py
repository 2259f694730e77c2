"""The documents that are made from the code are what is in the repository. REWRITE=1 renews them."""

import os
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import ExitCode
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.fields import Settings, settings_of
from agent.schema.kinds import CHECKS
from agent.schema.read import validate
from agent.schema.settings import AgentSettings
from tests.declarations import format_text, load
from tests.reference import PROGRAMS, sample, settings_page, tables_of

ROOT = Path(__file__).parents[2]
SAMPLES = {
    AgentSettings: ROOT / "config/agent.toml",
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
    loaded = load(model, path=SAMPLES[model])
    if isinstance(loaded, AgentSettings):
        assert loaded.group == "demo"
        loaded = replace(loaded, group="")
    assert loaded == model()


@pytest.mark.parametrize("model", MODELS)
def test_a_sample_names_every_setting_with_its_default(model: type[Settings]) -> None:
    shown = tomllib.loads(COMMENTED.sub(r"\1", SAMPLES[model].read_text()))
    assert set(shown) == {s.name for s in settings_of(model)}
    defaults = {s.name: shown[s.name] for s in settings_of(model) if s.has_default}
    assert validate(model, defaults) == model()


@pytest.mark.parametrize("model", MODELS)
def test_every_setting_without_a_default_documents_what_happens_without_it(
    model: type[Settings],
) -> None:
    settings = settings_of(model)
    silent = [
        s.name
        for s in settings
        if not s.has_default and "Not set:" not in s.doc and s.name != "group"
    ]
    assert not silent
    assert all(s.doc.endswith(".") for s in settings)


def test_the_sample_has_a_table_of_each_type_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(COMMENTED.sub(r"\1", SAMPLES[AgentSettings].read_text()))
    shown = tomllib.loads(path.read_text())["check"]
    checks = validate(AgentSettings, {"check": shown}).check
    assert [check.type for check in checks] == list(CHECKS.kinds)
    assert len({check.name for check in checks}) == len(CHECKS.kinds)


def test_the_settings_page_explains_every_key_of_every_table() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    settings = [s for model in MODELS for s in settings_of(model) if s.tables]
    assert [s.name for s in settings] == ["check", "progress", "mqtt"]
    for table in (table for setting in settings for table in tables_of(setting).values()):
        for key in (key for key in settings_of(table) if key.name != "type"):
            assert page.count(f"| `{key.name}` | {format_text(key)} |"), key
            assert key.doc.endswith("."), key
            assert key.required or key.has_default or "Not set:" in key.doc, key


def test_the_exit_codes_page_has_every_code_once_under_its_name() -> None:
    rows = re.findall(
        r"^\| (\d+) \| ([A-Z_]+) \| \S.*\. \|$",
        (ROOT / "docs/exit-codes.md").read_text(),
        re.MULTILINE,
    )
    assert [(int(code), name) for code, name in rows] == [(c.value, c.name) for c in ExitCode]
