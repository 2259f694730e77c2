"""The table of roles, and the page of both tables. REWRITE=1 regenerates docs/roles.md."""

import os
from itertools import product
from pathlib import Path

import pytest

from agent.core.phases import FIRST_SENTENCE, TABLE, Phase
from agent.core.roles import TRANSITIONS, check_transition
from agent.model import Role
from tests.reference import phase_diagram, role_diagram

PAGE = Path(__file__).parents[2] / "docs/roles.md"


def page() -> str:
    rows = [f"| {before} | {after} | {why} |" for (before, after), why in TRANSITIONS.items()]
    phases = [
        f"| {before} | {trigger.replace('_', ' ')} | {row.phase} | {row.sentence} |"
        for (before, trigger), row in TABLE.items()
    ]
    return "\n".join(
        [
            "# Roles and phases",
            "",
            "For readers of logs and of [design.md](design.md): every change of role and of phase that is possible.",
            "",
            "A session has one of three roles. It starts as Secondary (R6). The coordinator assigns roles by this",
            "table, and the agent publishes its own role by the same table. The two may differ for a moment: an",
            "agent publishes Primary only after its hook",
            "has succeeded (R8), and Secondary before its demotion hook starts.",
            "",
            "| from | to | why |",
            "|---|---|---|",
            *rows,
            "",
            "```mermaid",
            role_diagram(),
            "```",
            "",
            "## Phases of an agent",
            "",
            "The role is that of a member in its group; the phase is that of an agent's own session. An agent",
            "changes its phase only by this table, and its log and status show the sentence of the last",
            "change; during a demotion, they show its reason instead. Before the",
            f'first change it is {Phase.STARTING}, "{FIRST_SENTENCE}".',
            "",
            "| phase | trigger | next phase | sentence |",
            "|---|---|---|---|",
            *phases,
            "",
            "```mermaid",
            phase_diagram(),
            "```",
            "",
            "Generated from `agent/core/roles.py` and `agent/core/phases.py` by"
            " `REWRITE=1 pytest tests/core/test_roles.py`.",
            "",
        ]
    )


def test_the_roles_page_is_up_to_date() -> None:
    if os.environ.get("REWRITE"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page(), f"stale: REWRITE=1 pytest {Path(__file__).name} renews it"


def test_every_row_is_in_the_diagram_and_has_a_reason() -> None:
    for (before, after), why in TRANSITIONS.items():
        assert why
        assert f"    {before} --> {after}: {why}" in role_diagram().splitlines()
    assert "[*] --> Secondary" in role_diagram()


POSSIBLE = {
    (Role.SECONDARY, Role.PENDING_PRIMARY),
    (Role.PENDING_PRIMARY, Role.PRIMARY),
    (Role.PENDING_PRIMARY, Role.SECONDARY),
    (Role.PRIMARY, Role.SECONDARY),
}
"""Every role change, written out once more."""


@pytest.mark.parametrize(("before", "after"), list(product(Role, Role)))
def test_a_role_change_has_a_sentence_or_raises(before: Role, after: Role) -> None:
    if (before, after) in POSSIBLE:
        assert check_transition(before, after)
    else:
        with pytest.raises(AssertionError, match=f"from {before} to {after}"):
            check_transition(before, after)


def test_r8_primary_is_reached_by_pending_primary_and_left_to_secondary() -> None:
    assert {before for before, after in TRANSITIONS if after is Role.PRIMARY} == {
        Role.PENDING_PRIMARY
    }
    assert {after for before, after in TRANSITIONS if before is Role.PRIMARY} == {Role.SECONDARY}
