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
    ("=", "renew", "R: if not renewed by then, demotion starts"),
    ("#", "demote", "D: demotion; then what still runs is killed"),
    (".", "margin", "M: kept free for clock drift and lateness"),
)


@click.command("explain-timing")
@settings_flags(AgentSettings)
@JSON_FLAG
def command(*, as_json: bool, **given: Any) -> int:
    """Draw how the failover timeout is divided (rule R1).

    Takes the settings of 'run'. Shows each part, when heartbeats are sent, each relation that has to hold,
    and the smallest failover timeout that the same budgets fit in. Exits 13 if R1 does not hold.
    """
    settings = load_settings(given)
    lease_s, budget = settings.failover_timeout, settings.budget
    if lease_s <= 0:
        plan(lease_s, budget)  # raises: there is nothing to divide
    timing = divide(lease_s, budget)
    smallest_s = smallest_lease_s(budget)
    if as_json:
        document = {
            **timing_parts(timing),
            "rules": [{"rule": rule, "holds": holds} for rule, holds in timing.rules()],
            "smallest_lease_s": smallest_s if math.isfinite(smallest_s) else None,
        }
        if timing.failsafe:
            document["questions"] = count_questions(timing)
        click.echo(json.dumps(document, indent=2))
    else:
        click.echo("\n".join(explain(timing, smallest_s)))
    plan(lease_s, budget)  # raises if R1 does not hold: the picture above shows where
    return 0


def timing_parts(timing: Timing) -> dict[str, float]:
    """The parts of a timing by name, in seconds; those of failsafe only with it."""
    parts: dict[str, float] = asdict(timing)
    del parts["failsafe"]
    if timing.failsafe:
        parts |= {"doubt_s": timing.doubt_s, "question_interval_s": timing.question_interval_s}
    return parts


def count_questions(timing: Timing) -> int:
    """How many questions a primary asks each other member within R, counted from the last renewal."""
    left_s = timing.renew_s - _first_question_s(timing)
    return max(0, math.ceil(left_s / timing.question_interval_s)) if timing.renew_s > 0 else 0


def _first_question_s(timing: Timing) -> float:
    """The latest moment of a primary's first questions, after a heartbeat without an answer."""
    return timing.heartbeat_interval_s + timing.doubt_s


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
    if timing.failsafe:
        rows += [
            ("  doubt", timing.doubt_s, "after this silence other members are asked"),
            ("? question", timing.question_interval_s, "from one question to the next"),
        ]
    lines += [f"  {name:<18}{part_s:>12.3f} s  {text}" for name, part_s, text in rows]
    if timing.failsafe:
        lines += ["", _explain_questions(timing)]
    lines.append("")
    for rule, holds in timing.rules():
        text = f"{'holds ' if holds else 'BROKEN'}  {rule}"
        lines += textwrap.wrap(text, COLUMNS - 2, initial_indent="  ", subsequent_indent=" " * 10)
    right = f"{smallest_s:g} s" if math.isfinite(smallest_s) else "none; change the broken part"
    return [*lines, "", f"Smallest failover timeout that fits these budgets: {right}"]


def _explain_questions(timing: Timing) -> str:
    first_s = _first_question_s(timing)
    count = count_questions(timing)
    return f"Questions within R: {count}, the first after {first_s:g} s at the latest"


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
    marks = {0: "0", column(renew_s): "R", column(demoted_s): "D", column(timing.lease_s): "L"}
    for place in marks:
        bar[place] = "|"
    step_s = max(timing.heartbeat_interval_s, whole_s / BAR)  # at most one mark in each column
    signs = {column(number * step_s): "^" for number in range(int(renew_s / step_s) + 1)}
    if timing.failsafe:
        step_s = max(timing.question_interval_s, whole_s / BAR)
        at_s = _first_question_s(timing)
        while at_s < renew_s:
            signs.setdefault(column(at_s), "?")
            at_s += step_s
    return [
        "  " + "".join(marks.get(place, " ") for place in range(BAR + 1)).rstrip(),
        "  " + "".join(bar).rstrip(),
        "  " + "".join(signs.get(place, " ") for place in range(BAR + 1)).rstrip(),
    ]
