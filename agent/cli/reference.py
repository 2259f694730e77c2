"""docs/settings.md and the samples in config/, made from the models so that they cannot be stale.

Owns their text and its form; a test compares them with the files and can rewrite those.
"""

import textwrap

from agent.settings.describe import Described, describe
from agent.settings.models import AgentForm, CoordinatorSettings, Settings

COLUMNS = 98
"""Of the samples' comments."""

DURATIONS = (
    'Durations are seconds (2.5), or in quotes a time-span ("00:00:02.5") or ISO 8601 ("PT2.5S").'
)

DOCS_HEAD = f"""# Settings

Made from the models in `agent/settings`; `REWRITE=1 pytest tests/cli/test_reference.py` renews it.

Each setting can be given in four ways. The first of these that is there counts:

1. a flag: `--failover-timeout 5`
2. the environment: `FAILOVER_AGENT_FAILOVER_TIMEOUT=5`, for the coordinator
   `FAILOVER_COORDINATOR_MINIMUM_HOLD=5`
3. the TOML file that `--config` names: `failover_timeout = 5`, at the top level; `[tables]` only
   where a setting's form is tables, and after everything else
4. the default

{DURATIONS}
A key or a variable with one of the two prefixes that no setting has is refused, as is a value that is
wrong or out of range; [exit-codes.md](exit-codes.md) lists the codes. `failover-agent check-config`
prints what is in force and where each value is from.
"""

PROGRAMS: tuple[tuple[str, type[Settings]], ...] = (
    ("run", AgentForm),
    ("serve", CoordinatorSettings),
)

ALWAYS_SHOWN = frozenset({"group"})
"""What a sample sets, since the program does not start without it."""


def settings_page() -> str:
    """The whole of docs/settings.md."""
    parts = [DOCS_HEAD]
    for program, model in PROGRAMS:
        parts.append(
            f"## failover-agent {program}\n\nEnvironment: `{model.env_prefix}` and the setting in"
            " capitals.\n\n| setting | form | default | meaning |\n|---|---|---|---|\n"
            + "".join(_row(setting) for setting in describe(model))
        )
        parts += [_tables(setting) for setting in describe(model) if setting.tables]
    return "\n".join(parts)


def _tables(setting: Described) -> str:
    """The keys of a setting's tables: those that all have, then each type's own."""
    tables = setting.tables
    shared = set.intersection(*({key.key for key in table.keys} for table in tables)) - {"type"}
    head = "\n| key | form | default | meaning |\n|---|---|---|---|\n"
    parts = [
        f"### `{tables[0].header}`\n",
        head,
        *(_row(key) for key in tables[0].keys if key.key in shared),
    ]
    for table in tables:
        own = [key for key in table.keys if key.key not in shared and key.key != "type"]
        if own:
            parts += [f'\n`type = "{table.type}"`: {table.meaning}\n', head, *map(_row, own)]
    return "".join(parts)


def _row(setting: Described) -> str:
    default = f"`{setting.default}`" if setting.default else "not set"
    if setting.required:
        default = "needed"
    return f"| `{setting.key}` | {setting.kind} | {default} | {setting.meaning} |\n"


def sample(program: str, model: type[Settings]) -> str:
    """A configuration file that names every setting, and changes nothing but what has to be set."""
    head = (
        f"For: failover-agent {program} --config FILE. Every setting is here, as a comment with its"
        " default, or with an example where it is not set by default: take the '#' away to set it."
        f" A flag, and {model.env_prefix}..., go before this file. {DURATIONS}"
    )
    settings = sorted(describe(model), key=lambda setting: bool(setting.tables))  # TOML's own rule
    return _comment(head) + "".join(_entry(setting) for setting in settings)


def _entry(setting: Described) -> str:
    mark = "" if setting.key in ALWAYS_SHOWN else "#"
    form = f"Form: {setting.kind}."
    if setting.tables:
        after = "Tables come after every other setting; docs/settings.md has all their keys."
        return "\n" + _comment(f"{setting.meaning} {form} {after}") + _samples(setting)
    return f"\n{_comment(f'{setting.meaning} {form}')}{mark}{setting.key} = {setting.example}\n"


def _samples(setting: Described) -> str:
    parts = []
    for number, table in enumerate(setting.tables):
        other = number > 0 and not table.header.startswith("[[")  # there can be one only
        lines = [table.header, *(f"{key} = {value}" for key, value in table.example.items())]
        mark = "# " if other else "#"
        meaning = table.meaning
        if other:
            meaning = f"Or: {meaning[0].lower()}{meaning[1:]}"
        parts.append("\n" + _comment(meaning) + "".join(f"{mark}{line}\n" for line in lines))
    return "".join(parts)


def _comment(text: str) -> str:
    return (
        textwrap.fill(
            text,
            COLUMNS,
            initial_indent="# ",
            subsequent_indent="# ",
            break_on_hyphens=False,
            break_long_words=False,
        )
        + "\n"
    )
