"""``failover-agent explain-timing``: the budget of R1 as a picture. Plain characters, 80 columns."""

import json
import math
import textwrap
from dataclasses import asdict
from typing import Any

import click

from agent.cli.options import JSON_FLAG, load_settings, settings_flags
from agent.core.timing import Timing, divide, plan, smallest_lease_s
from agent.schema.settings import AgentSettings

BAR = 72
"""Characters of the bar: with its indent and frame it fits into 80 columns."""

COLUMNS = 80

MEANINGS = (
    ("=", "renew", "R: not renewed for so long, demotion starts"),
    ("#", "demote", "D: demotion; then what still runs is killed"),
    (".", "margin", "M: kept free for clock drift and lateness"),
)


@click.command("explain-timing")
@settings_flags(AgentSettings)
@JSON_FLAG
def command(*, as_json: bool, **given: Any) -> int:
    """Draw how the failover timeout is divided (rule R1).

    Takes what 'run' takes. Shows each part, when heartbeats are sent, each relation that has to hold,
    and the smallest failover timeout that the same budgets fit in. Exits 13 if R1 does not hold.
    """
    settings = load_settings(given)
    lease_s, budget = settings.failover_timeout, settings.budget
    timing = divide(lease_s, budget)
    smallest_s = smallest_lease_s(budget)
    if as_json:
        document = {
            **asdict(timing),
            "rules": [{"rule": rule, "holds": holds} for rule, holds in timing.rules()],
            "smallest_lease_s": smallest_s if math.isfinite(smallest_s) else None,
        }
        click.echo(json.dumps(document, indent=2))
    else:
        click.echo("\n".join(explain(timing, smallest_s)))
    plan(lease_s, budget)  # raises if R1 does not hold: the picture above shows where
    return 0


def explain(timing: Timing, smallest_s: float) -> list[str]:
    """The whole picture, in lines of at most 80 characters."""
    lines = [
        f"Failover timeout {timing.lease_s:g} s, counted from the sending of a heartbeat:",
        "",
        *_bar(timing),
        "",
    ]
    rows = [
        *((f"{sign} {name}", getattr(timing, f"{name}_s"), text) for sign, name, text in MEANINGS),
        ("L failover timeout", timing.lease_s, "then another member may be chosen"),
        ("^ beat", timing.heartbeat_interval_s, "from one heartbeat to the next"),
        ("  request timeout", timing.request_timeout_s, "for one heartbeat and its answer"),
    ]
    lines += [f"  {name:<18}{part_s:>12.3f} s  {text}" for name, part_s, text in rows]
    lines.append("")
    for rule, holds in timing.rules():
        text = f"{'holds ' if holds else 'BROKEN'}  {rule}"
        lines += textwrap.wrap(text, COLUMNS - 2, initial_indent="  ", subsequent_indent=" " * 10)
    right = f"{smallest_s:g} s" if math.isfinite(smallest_s) else "none; change the broken part"
    return [*lines, "", f"Smallest failover timeout that fits these budgets: {right}"]


def _bar(timing: Timing) -> list[str]:
    """Draw the marks, the bar and the heartbeats on one time scale, which begins with a heartbeat's sending."""
    renew_s = max(timing.renew_s, 0.0)
    demoted_s = renew_s + timing.demote_s
    spent_s = demoted_s + timing.margin_s
    whole_s = max(timing.lease_s, spent_s)

    def column(at_s: float) -> int:
        return round(at_s / whole_s * BAR)

    ends = [column(at_s) for at_s in (0.0, renew_s, demoted_s, spent_s)]
    bar = [" "] * (BAR + 1)
    for (sign, _, _), start, end in zip(MEANINGS, ends, ends[1:], strict=False):
        bar[start : end + 1] = sign * (end + 1 - start)
    marks = {
        0: "0",
        column(renew_s): "R",
        column(demoted_s): "D",
        column(timing.lease_s): "L",
    }
    for place in marks:
        bar[place] = "|"
    step_s = max(
        timing.heartbeat_interval_s, whole_s / BAR
    )  # several in one column would be one mark
    beats = {column(number * step_s) for number in range(int(renew_s / step_s) + 1)}
    return [
        "  " + "".join(marks.get(place, " ") for place in range(BAR + 1)).rstrip(),
        "  " + "".join(bar).rstrip(),
        "  " + "".join("^" if place in beats else " " for place in range(BAR + 1)).rstrip(),
    ]
