"""``failover-agent hooks``: list the hooks and whether they could run, and try one.

Owns how hooks are described to a person before there is a group. drivers/hooks defines what a hook is, and the
core decides what follows from its result: this file describes both in sentences, docs/hooks.md in tables.
"""

import asyncio
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import click

from agent.cli.options import JSON_FLAG, load_settings, settings_flags
from agent.core.lease import GRACE_SHARE, LONGEST_GRACE_S
from agent.drivers.hooks.payload import build_payload, payload_environment
from agent.drivers.hooks.process import HookExit
from agent.drivers.hooks.runner import HookRunner
from agent.drivers.hooks.spec import (
    EVENTS,
    NOTIFICATIONS,
    PROMOTIONS,
    CommandStep,
    HookSpec,
    load_specs,
)
from agent.errors import ConfigError, ExitCode
from agent.model import Role
from agent.ops.clock import Clock
from agent.schema.scalars import parse_date_time
from agent.schema.settings import AgentSettings

NEW_ROLE = {"pending_primary": Role.PENDING_PRIMARY, "primary": Role.PRIMARY}
OLD_ROLE = {
    "primary": Role.PENDING_PRIMARY,
    "secondary": Role.PRIMARY,
    "lost": Role.PRIMARY,
}
"""Role before the event, where it is not Secondary."""

LONGEST_DEADLINE_S = 24 * 3600.0
"""The longest time limit of a trial run: a person waits for it."""

KILLED_S = 5.0
"""How long to wait until a killed hook has exited, which one in uninterruptible sleep never does."""


@click.group("hooks")
def command() -> None:
    """List the hooks, and try one without a group (docs/hooks.md)."""


@command.command("list")
@settings_flags(AgentSettings)
@JSON_FLAG
def list_hooks(*, as_json: bool, **given: Any) -> int:
    """List every event with its hook. Show the form of each hook, its steps in order, and whether it can run.

    Exits 0, or with the code of the first fault.
    """
    specs = load_specs(load_settings(given))
    reports = {event: _report(specs.get(event)) for event in EVENTS}
    if as_json:
        click.echo(
            json.dumps([{"event": event, **report} for event, report in reports.items()], indent=2)
        )
    else:
        for event, report in reports.items():
            click.echo("\n".join(_lines(event, report)))
    return next((r["exit_code"] for r in reports.values() if r["exit_code"]), 0)


def _report(spec: HookSpec | None) -> dict[str, Any]:
    if spec is None:
        return {"form": None, "steps": [], "ignored": [], "fault": None, "exit_code": 0}
    fault: ConfigError | None = None
    steps: list[list[str]] = []
    try:
        steps = [
            list(step.argv) if isinstance(step, CommandStep) else [step.url]
            for step in spec.steps()
        ]
        spec.check()
    except ConfigError as error:
        fault = error
    return {
        "form": spec.form.value,
        "value": list(spec.value),
        "steps": steps,
        "ignored": [{"name": name, "reason": reason} for name, reason in spec.ignored()],
        "fault": str(fault) if fault is not None else None,
        "exit_code": int(fault.exit_code) if fault is not None else 0,
    }


def _lines(event: str, report: Mapping[str, Any]) -> Iterator[str]:
    if report["form"] is None:
        yield f"{event}: none"
        return
    yield f"{event}: {report['form']}, {'cannot run' if report['fault'] else 'can run'}"
    for step in report["steps"]:
        yield f"  runs {_words(step)}"
    for ignored in report["ignored"]:
        yield f"  ignores {ignored['name']!r}: {ignored['reason']}"
    if report["fault"]:
        yield f"  fault: {report['fault']}"


def _words(argv: list[str]) -> str:
    return " ".join(word if word.isprintable() and " " not in word else repr(word) for word in argv)


def _time(_ctx: click.Context, _param: click.Parameter, value: str | None) -> datetime | None:
    try:
        return parse_date_time(value) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}") from None


@command.command("test")
@click.argument("event", type=click.Choice(EVENTS))
@settings_flags(AgentSettings)
@click.option("--epoch", type=click.IntRange(min=0), metavar="N", help="Epoch of the tenure.")
@click.option(
    "--last-data-processed-time",
    "last_data",
    callback=_time,
    metavar="TIME",
    help="Up to when data was processed: 2026-01-31T12:00:00Z.",
)
@click.option("--previous-primary", metavar="ID", help="The member that was primary before.")
@click.option(
    "--old-role",
    type=click.Choice([role.value for role in Role]),
    help="Role before the event. [default: the usual one]",
)
@click.option(
    "--deadline",
    "deadline_s",
    type=click.FloatRange(min=0, min_open=True, max=LONGEST_DEADLINE_S),
    metavar="SECONDS",
    help="Time until TERM. [default: from the settings]",
)
def try_hook(
    *,
    event: str,
    epoch: int | None,
    last_data: datetime | None,
    previous_primary: str | None,
    old_role: str | None,
    deadline_s: float | None,
    **given: Any,
) -> int:
    """Run the hook of one event as the agent would. Explain what its result would lead to.

    It runs with its real user, directory and environment, and really starts or stops the workload. Exits 0
    if the hook succeeds, 42 if it fails, and with another code if it could not be tried.
    """
    settings = load_settings(given)
    spec = load_specs(settings).get(event)
    if spec is None:
        raise ConfigError(f"there is no hook for {event}: set it with --hook-{_flag(event)}")
    spec.check()
    grace_s = min(GRACE_SHARE * settings.timing.demote_s, LONGEST_GRACE_S)
    if deadline_s is None:
        limit_s = (
            settings.timing.demote_s if event == "secondary" else settings.hook_limit_of(event)
        )
        deadline_s = limit_s if event in NOTIFICATIONS else max(0.0, limit_s - grace_s)
    clock = Clock()
    facts = build_payload(
        event=event,
        group=settings.group or "test",
        session=settings.session_id or "test",
        old_role=Role(old_role) if old_role else OLD_ROLE.get(event, Role.SECONDARY),
        new_role=NEW_ROLE.get(event, Role.SECONDARY),
        epoch=epoch,
        reason="tried by hand",
        last_data=last_data,
        deadline_s=deadline_s,
        previous_primary=previous_primary,
        state_file=str(settings.state_file) if settings.state_file else None,
        probe_url=None,
        now=clock.wall(),
    )
    with _log_to_terminal():
        click.echo(f"{event}: {spec.form.value} {_words(list(spec.value))}")
        result = asyncio.run(_run(spec, facts, clock, deadline_s, grace_s))
    click.echo(
        f"{result.why} after {result.duration_s:.3f} s: {_consequence(event, result, settings)}"
    )
    return ExitCode.OK if result.ok else ExitCode.HOOK_FAILED


def _flag(event: str) -> str:
    return event.replace("_", "-")


async def _run(
    spec: HookSpec, facts: Mapping[str, Any], clock: Clock, deadline_s: float, grace_s: float
) -> HookExit:
    """Enforce the limits as the executor does. An interrupt kills the hook."""
    runner = HookRunner(clock)
    run = runner.start(spec, payload_environment(facts), facts)
    try:
        for limit_s, then in ((deadline_s, run.term), (grace_s, run.kill), (KILLED_S, None)):
            try:
                async with asyncio.timeout(limit_s):
                    return await run.wait()
            except TimeoutError:
                if then is not None:
                    click.echo(f"timeout: {then.__name__.upper()}")
                    then()
        return HookExit(None, None, deadline_s, error="it does not end, even by KILL")
    finally:
        if not run.ended:
            run.kill()
        runner.close()


def _consequence(event: str, result: HookExit, settings: AgentSettings) -> str:
    """The consequence that the result would have in a real change of role (docs/hooks.md)."""
    if event in NOTIFICATIONS:
        effect = "nothing would follow" if result.ok else "it would only be logged and counted"
        return f"{effect}; a notification decides nothing"
    if event in PROMOTIONS:
        if not result.ok:
            return (
                "the agent would run the secondary hook, release the role, and wait"
                f" {settings.cooldown:g} s (doubled each time, up to {settings.cooldown_limit:g} s)"
                " before it can be chosen again"
            )
        if event == "primary":
            return "the agent would report that it is Primary"
        return "the agent would be ready, and run the primary hook once it is confirmed"
    if result.ok:
        return "the agent would release the role, and the other member may start at once"
    return (
        "the agent would try again until its demotion budget of"
        f" {settings.timing.demote_s:g} s is used up, then kill what hooks left running and exit"
        f" with {int(ExitCode.DEMOTION_FAILED)}, without releasing the role"
    )


class _Echo(logging.Handler):
    """Print a hook's output as it comes, and other log messages of the driver in parentheses."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        if "line" in fields:
            line = "".join(c if c.isprintable() or c == "\t" else "?" for c in fields["line"])
            click.echo(f"  {fields['stream']} | {line}")
        else:
            click.echo(f"  ({record.getMessage()})")


@contextmanager
def _log_to_terminal() -> Iterator[None]:
    """Send the driver's log to the terminal, and nowhere else, while the block runs."""
    logger = logging.getLogger("agent.drivers.hooks")
    before = logger.level, logger.propagate
    handler = _Echo()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
