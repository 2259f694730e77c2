"""Bounds on the source: what outgrows one of them is to be split, or said in fewer words."""

import re
from pathlib import Path

import pytest

AGENT = Path(__file__).parent.parent / "agent"
SMALL = ("core", "daemon")
"""Folders whose modules are read as a whole."""

SPEECH = re.compile(r"\b(told|tells?|said|says)\b")
"""Words for which the glossary of docs/development.md has better ones."""


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize(
    "path", sorted(AGENT.rglob("*.py")), ids=lambda path: str(path.relative_to(AGENT))
)
def test_a_module_is_short_enough_to_be_read_in_one_sitting(path: Path) -> None:
    limit = 400 if path.relative_to(AGENT).parts[0] in SMALL else 500
    assert lines(path) <= limit


def total(folder: Path) -> int:
    return sum(lines(path) for path in folder.rglob("*.py"))


def test_the_declarations_of_settings_and_of_the_api_stay_small() -> None:
    assert total(AGENT / "schema") <= 3435


def test_the_program_grows_only_on_purpose() -> None:
    """Whoever raises this has looked for what the new code makes superfluous."""
    assert total(AGENT) <= 40_880


def test_the_parts_report_and_send_rather_than_tell() -> None:
    found = {
        str(path.relative_to(AGENT)): len(SPEECH.findall(path.read_text()))
        for path in AGENT.rglob("*.py")
    }
    assert sum(found.values()) < 60, {name: count for name, count in found.items() if count}
