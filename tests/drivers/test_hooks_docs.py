"""The tables of docs/hooks.md are equal to the code."""

import os
import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from agent.drivers.hooks import check, notifier, process, runner, webhook
from agent.drivers.hooks.payload import build_payload, payload_environment
from agent.drivers.hooks.spec import EVENTS, NOTIFICATIONS, ROLE_EVENTS
from agent.model import Role

PAGE = (Path(__file__).parents[2] / "docs/hooks.md").read_text()
NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def facts(event: str = "primary", **given: Any) -> dict[str, Any]:
    return build_payload(
        **{
            "event": event,
            "group": "g",
            "session": "s",
            "old_role": Role.PENDING_PRIMARY,
            "new_role": Role.PRIMARY,
            "epoch": 7,
            "reason": "chosen",
            "last_data": NOW - timedelta(seconds=1.5),
            "deadline_s": 2.5,
            "previous_primary": None,
            "state_file": None,
            "probe_url": None,
            "now": NOW,
            **given,
        }
    )


def test_the_page_has_each_variable_with_its_name_in_the_json() -> None:
    rows = re.findall(r"^\| `(FAILOVER_[A-Z_]+)` \| `([a-z_]+)` \| \S", PAGE, re.MULTILINE)
    assert [variable for variable, _ in rows] == list(payload_environment(facts()))
    assert [key for _, key in rows] == list(facts())


def test_no_text_of_a_server_keeps_a_hook_from_being_started() -> None:
    """A NUL in a variable, or 128 KiB of one, fail each exec: also that of the demotion hook."""
    given = payload_environment(facts(reason="x" * 200_000, previous_primary="a\0b"))
    environment = {"PATH": os.defpath, **given}
    subprocess.run(["/bin/true"], env=environment, check=True)
    assert given["FAILOVER_PREVIOUS_PRIMARY"] == "a b"


def test_the_page_has_each_event() -> None:
    role, notices = PAGE.split("### Notification hooks")
    assert re.findall(r"^\| `([a-z_]+)` \| ", role, re.MULTILINE) == list(ROLE_EVENTS)
    found = re.findall(r"^\| `([a-z_]+)` \| ", notices.split("## ")[0], re.MULTILINE)
    assert found == list(NOTIFICATIONS)
    assert {*ROLE_EVENTS, *NOTIFICATIONS} == set(EVENTS)


def test_the_page_has_the_bounds() -> None:
    assert f"at most {notifier.QUEUE_LIMIT} wait" in PAGE
    assert f"{process.RUN_BYTES // 1024} KiB, {process.RUN_LINES} lines" in PAGE
    assert f"{process.LINE_BYTES // 1024} KiB a line" in PAGE
    assert f"stops reading {process.LINGER_S} s after" in PAGE
    assert f"1 to {check.MOST_SCRIPTS} scripts" in PAGE
    assert f"first {webhook.ANSWER_BYTES // 1024} KiB of the\nresponse body" in PAGE
    assert runner.RETRY_PAUSE_S == 0.5
    assert "half a second later" in PAGE
    assert check.SCRIPT_NAME.pattern in PAGE


def test_the_snippet_of_the_page_verifies_our_signature() -> None:
    found = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)  # the page is ours
    timestamp = str(int(datetime.now(UTC).timestamp()))
    headers = {
        "X-Failover-Timestamp": timestamp,
        "X-Failover-Signature": webhook.signature(b"secret", timestamp, b"{}"),
    }
    assert names["is_genuine"](b"secret", headers, b"{}")
    assert not names["is_genuine"](b"other", headers, b"{}")
    assert not names["is_genuine"](b"secret", headers, b"{ }")


def test_the_gap_is_primarys_and_never_negative() -> None:
    assert facts()["gap_ms"] == 1500
    assert facts(last_data=NOW + timedelta(seconds=1))["gap_ms"] == 0
    assert facts(last_data=None)["gap_ms"] is None
    assert facts("secondary")["gap_ms"] is None
    assert payload_environment(facts("secondary"))["FAILOVER_GAP_MS"] == ""
