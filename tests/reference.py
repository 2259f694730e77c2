"""Pages that are generated: docs/settings.md, the samples in config/, the diagrams of docs/roles.md.

Owns their text; tests compare it with the files, so that they cannot be stale, and can rewrite those.
"""

import textwrap
from collections.abc import Iterator

from agent.core.phases import TABLE, Phase
from agent.core.roles import TRANSITIONS
from agent.model import Role
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.fields import Setting, Settings, settings_of
from agent.schema.settings import AgentSettings
from agent.schema.toml import to_toml
from tests.declarations import format_text
from tests.declarations import sample as sample_of

COLUMNS = 98
"""Of the samples' comments."""

DURATIONS = (
    'Durations are seconds (2.5), or in quotes a time-span ("00:00:02.5") or ISO 8601 ("PT2.5S").'
)

DOCS_HEAD = f"""# Settings

For operators: every setting of the agent and of the coordinator. Generated from the declarations in `agent/schema`;
`REWRITE=1 pytest tests/cli/test_reference.py` renews it.

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
    ("run", AgentSettings),
    ("serve", CoordinatorSettings),
)

ALWAYS_SHOWN = frozenset({"group"})
"""Set in a sample, since the program does not start without it."""


def settings_page() -> str:
    """The whole of docs/settings.md."""
    parts = [DOCS_HEAD]
    for program, declared in PROGRAMS:
        settings = settings_of(declared)
        parts.append(
            f"## failover-agent {program}\n\nEnvironment: `{declared.env_prefix}` and the setting in"
            " capitals.\n\n| setting | form | default | meaning |\n|---|---|---|---|\n"
            + "".join(map(_row, settings))
        )
        parts += ["".join(_table_rows(setting)) for setting in settings if setting.tables]
    return "\n".join(parts)


def tables_of(setting: Setting) -> dict[str, type]:
    """The class of each kind of the setting's tables."""
    assert setting.tables is not None, setting
    return {kind: setting.tables.load(kind) for kind in setting.tables.kinds}


def _table_rows(setting: Setting) -> Iterator[str]:
    """The keys of a setting's tables: those that all have, then each kind's own."""
    keys = {
        kind: [key for key in settings_of(declared) if key.name != "type"]
        for kind, declared in tables_of(setting).items()
    }
    shared = set.intersection(*({key.name for key in own} for own in keys.values()))
    head = "\n| key | form | default | meaning |\n|---|---|---|---|\n"
    yield f"### `{setting.tables.header if setting.tables else ''}`\n{head}"
    yield from (_row(key) for key in next(iter(keys.values())) if key.name in shared)
    for kind, declared in tables_of(setting).items():
        if own := [key for key in keys[kind] if key.name not in shared]:
            yield f'\n`type = "{kind}"`: {declared.__doc__}\n{head}'
            yield from map(_row, own)


def _row(setting: Setting) -> str:
    default = f"`{to_toml(setting.default)}`" if setting.has_default else "not set"
    if setting.required:
        default = "needed"
    return f"| `{setting.name}` | {format_text(setting)} | {default} | {setting.doc} |\n"


def sample(program: str, declared: type[Settings]) -> str:
    """A configuration file that names every setting, and changes nothing but what has to be set."""
    head = (
        f"For: failover-agent {program} --config FILE. Every setting is here, as a comment with its"
        " default, or with an example where it is not set by default: take the '#' away to set it."
        f" A flag, and {declared.env_prefix}..., override this file. {DURATIONS}"
    )
    settings = sorted(settings_of(declared), key=lambda setting: bool(setting.tables))  # as in TOML
    return _comment(head) + "".join(map(_entry, settings))


def _entry(setting: Setting) -> str:
    mark = "" if setting.name in ALWAYS_SHOWN else "#"
    text = f"{setting.doc} Form: {format_text(setting)}."
    if setting.tables:
        after = "Tables come after every other setting; docs/settings.md has all their keys."
        return "\n" + _comment(f"{text} {after}") + "".join(_table_samples(setting))
    return f"\n{_comment(text)}{mark}{setting.name} = {to_toml(sample_of(setting))}\n"


def _table_samples(setting: Setting) -> Iterator[str]:
    assert setting.tables is not None, setting
    for number, declared in enumerate(tables_of(setting).values()):
        other = number > 0 and setting.tables.most is None
        example = [f"{key} = {to_toml(value)}" for key, value in declared.EXAMPLE.items()]  # type: ignore[attr-defined]
        mark = "# " if other else "#"
        meaning = declared.__doc__ or ""
        if other:
            meaning = f"Or: {meaning[0].lower()}{meaning[1:]}"
        lines = "".join(f"{mark}{line}\n" for line in [setting.tables.header, *example])
        yield f"\n{_comment(meaning)}{lines}"


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


def role_diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {Role.SECONDARY}"]
    lines += [f"    {a} --> {b}: {why}" for (a, b), why in TRANSITIONS.items()]
    return "\n".join(lines)


def phase_diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {Phase.STARTING}"]
    lines += [
        f"    {before} --> {row.phase}: {trigger.replace('_', ' ')}"
        for (before, trigger), row in TABLE.items()
    ]
    return "\n".join([*lines, f"    {Phase.ENDED} --> [*]"])
