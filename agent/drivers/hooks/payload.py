"""The hook payload, as JSON and as environment variables (docs/hooks.md). Pure."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from agent.model import Role
from agent.schema.scalars import format_date_time

LONGEST_TEXT = 1024
"""The most characters of a text that may come from a server. An id has at most 256; with a variable that is too long,
or has a NUL, no hook could start."""


def build_payload(
    *,
    event: str,
    group: str,
    session: str,
    old_role: Role,
    new_role: Role,
    epoch: int | None,
    reason: str,
    last_data: datetime | None,
    deadline_s: float,
    previous_primary: str | None,
    state_file: str | None,
    probe_url: str | None,
    now: datetime,
) -> dict[str, Any]:
    """Build the payload of one run; docs/hooks.md defines each field.

    ``deadline_s`` counts from the start of the hook to its TERM, in seconds. The gap counts from
    ``last_data`` to ``now``, and is never negative, however the clocks of two hosts differ.
    """
    gap_ms = None
    if event == "primary" and last_data is not None:
        gap_ms = max(0, round((now - last_data).total_seconds() * 1000))
    return {
        "event": event,
        "group": group,
        "session": session,
        "old_role": old_role.value,
        "new_role": new_role.value,
        "epoch": epoch,
        "reason": _bounded(reason),
        "last_data_processed_time": format_date_time(last_data) if last_data is not None else None,
        "deadline_ms": max(0, round(deadline_s * 1000)),
        "previous_primary": None if previous_primary is None else _bounded(previous_primary),
        "state_file": state_file,
        "probe_url": probe_url,
        "gap_ms": gap_ms,
    }


def _bounded(text: str) -> str:
    return text[:LONGEST_TEXT].replace("\0", " ")


def payload_environment(payload: Mapping[str, Any]) -> dict[str, str]:
    """The payload as environment variables; an unknown value is empty."""
    return {
        f"FAILOVER_{key.upper()}": "" if value is None else str(value)
        for key, value in payload.items()
    }
