"""SIGHUP: applies what can change without losing the role, refuses the rest by name, notifies systemd."""

import resource
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from .stage import PATIENCE_S, Agent, Coordinator, Stage, until
from .workloads import guard_of, start


class Configured:
    """An agent that is primary, its configuration file, and what it tells systemd."""

    def __init__(self, stage: Stage, coordinator: Coordinator, text: str = "") -> None:
        self.stage = stage
        self.file = stage.directory / "agent.toml"
        self.address = stage.directory / "notify"
        self.systemd = stage.enter(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.systemd.bind(str(self.address))
        self.systemd.setblocking(False)
        self.file.write_text(text)
        self.messages: list[str] = []
        self.agent: Agent = start(
            stage,
            "host-a",
            coordinator,
            flags=[f"--config={self.file}"],
            NOTIFY_SOCKET=str(self.address),
            WATCHDOG_USEC="2000000",
        )
        self.epoch = self.agent.until_role("Primary")["epoch"]

    def told(self) -> list[str]:
        """Every assignment that systemd has got so far, one after the other."""
        try:
            while True:
                self.messages += self.systemd.recv(4096).decode().splitlines()
        except BlockingIOError:
            return self.messages

    def reload(self, text: str | None, says: str) -> str:
        """Change the file, SIGHUP, wait for a line and for READY=1; what was logged meanwhile."""
        if text is None:
            self.file.unlink()
        else:
            self.file.write_text(text)
        begins, heard = len(self.agent.said()), len(self.told())
        self.agent.send(signal.SIGHUP)
        self.agent.until_said(says, after=begins)
        until(lambda: "READY=1" in self.told()[heard:], "systemd to be told that it is ready")
        state = self.agent.state
        assert (state["role"], state["epoch"]) == ("Primary", self.epoch)
        return self.agent.said()[begins:]


DONE = "configuration read again"


def check(name: str, *command: str, **more: object) -> str:
    words = ", ".join(f'"{word}"' for word in command)
    keys = "".join(f"{key} = {str(value).lower()}\n" for key, value in more.items())
    return f'[[check]]\nname = "{name}"\ntype = "exec"\ncommand = [{words}]\ninterval = 0.5\n{keys}'


def note(stage: Stage, event: str, text: str) -> str:
    """A setting: a hook that records itself under another name."""
    return f'hook_{event} = ["{stage.hook(text, event)}"]\n'


def begun(stage: Stage) -> Sequence[tuple[str, str]]:
    return [(e.who, e.which) for e in stage.events() if e.what == "begin"]


def test_a_reload_applies_hooks_log_and_progress_source_and_keeps_the_role(
    stage: Stage, coordinator: Coordinator
) -> None:
    host = Configured(stage, coordinator, note(stage, "secondary", "old") + 'log_level = "ERROR"\n')
    assert begun(stage) == [("old", "secondary")]
    assert "INFO" not in host.agent.said()
    progress = stage.directory / "progress"
    progress.write_text("2026-01-31T12:00:00Z")
    text = note(stage, "secondary", "new") + 'log_level = "INFO"\nlog_format = "json"\n'
    text += f'[progress]\ntype = "file"\npath = "{progress}"\ninterval = 0.1\n'
    said = host.reload(text, DONE)
    for key in ("hook_secondary", "log_format", "log_level", "progress"):
        assert key in said
    until(
        lambda: host.agent.state["last_data_processed_time"] == "2026-01-31T12:00:00Z",
        "the new source to be read",
    )
    assert host.agent.end() == 0
    # The tenure keeps the demotion hook with which it began.
    assert begun(stage) == [("old", "secondary"), ("old", "secondary")]
    told = host.told()
    assert told.index("RELOADING=1") < len(told) - 1 - told[::-1].index("READY=1")
    assert any(line.startswith("MONOTONIC_USEC=") for line in told)


def test_the_guard_runs_the_demotion_hook_with_which_the_tenure_began(
    stage: Stage, coordinator: Coordinator
) -> None:
    host = Configured(stage, coordinator, note(stage, "secondary", "old"))
    host.reload(note(stage, "secondary", "new"), DONE)
    host.agent.end(signal.SIGKILL)
    until(lambda: [e.who for e in stage.events() if e.what == "end"] == ["old"] * 2, "the hook")
    assert begun(stage) == [("old", "secondary"), ("old", "secondary")]


def test_an_added_required_check_that_fails_revokes_the_role(
    stage: Stage, coordinator: Coordinator
) -> None:
    host = Configured(stage, coordinator)
    host.file.write_text("cooldown = 0.1\n" + check("plc", "/bin/false", required=True))
    host.agent.send(signal.SIGHUP)
    assert host.agent.until_role("Secondary")["unfit"] == "plc (required): exit 1"
    host.file.write_text("")
    host.agent.send(signal.SIGHUP)
    assert host.agent.until_role("Primary", after_epoch=host.epoch)["unfit"] is None


def test_added_checks_without_a_result_do_not_cost_the_role(stage: Stage) -> None:
    """Nor the score: another member would be better, and the role moves by strict v1 rules."""
    coordinator = stage.serve("--minimum-hold=0", "--score-hysteresis=0")
    host = Configured(stage, coordinator)
    other = start(stage, "host-b", coordinator)
    other.until_said("joined")
    go = stage.directory / "go"
    script = stage.directory / "slow"
    script.write_text(f"#!/bin/sh\nwhile [ ! -e {go} ]; do sleep 0.02; done\n")
    script.chmod(0o700)
    slow = check("slow", str(script)).replace("0.5", "20") + "limit = 20\n"
    host.file.write_text(slow)
    host.told()  # its socket holds few messages, and has waited for the other agent's start
    host.agent.send(signal.SIGHUP)
    until(lambda: "RELOADING=1" in host.told(), "the reload to begin")
    began = time.monotonic()
    until(lambda: time.monotonic() > began + 1.5, "some heartbeats to pass")
    assert host.agent.state["epoch"] == host.epoch
    go.touch()
    host.agent.until_said(DONE)
    assert host.agent.state["score"] == 100
    assert coordinator.status()["Primary"] == "host-a"


def test_settings_that_cannot_change_are_refused_by_name_and_the_others_applied(
    stage: Stage, coordinator: Coordinator
) -> None:
    host = Configured(stage, coordinator, "cooldown = 7\n")
    said = host.reload('cooldown = 8\nsession_name = "another"\nwatchdog_device = "/x"\n', DONE)
    assert "settings not changed refused=session_name,watchdog_device" in said
    assert "changed=cooldown" in said
    # These come as flags, which a file does not override: only their names are of use here.
    said = host.reload("guard = false\n", DONE)
    assert "guard" in said
    assert guard_of(host.agent)


def test_a_broken_or_missing_file_is_an_error_in_the_log_and_changes_nothing(
    stage: Stage, coordinator: Coordinator
) -> None:
    host = Configured(stage, coordinator, note(stage, "secondary", "old"))
    missing = f'hook_secondary = ["{Path("/no/such/hook")}"]\n'
    for text in ("cooldown = = 3\n", "no_such_key = 3\n", "cooldown = -3\n", missing, None):
        said = host.reload(text, "configuration not changed")
        assert " ERROR configuration not changed reason=" in said
        assert DONE not in said
    assert "Traceback" not in host.agent.said()
    assert host.agent.end() == 0
    assert begun(stage) == [("old", "secondary"), ("old", "secondary")]


def test_a_progress_source_that_cannot_be_started_does_not_replace_the_previous_one(
    stage: Stage, coordinator: Coordinator
) -> None:
    progress = stage.directory / "progress"
    progress.touch()
    source = f'[progress]\ntype = "file"\npath = "{progress}"\ninterval = 0.1\n'
    host = Configured(stage, coordinator, source)
    taken = stage.directory / "no" / "such" / "folder" / "socket"
    host.reload(f'[progress]\ntype = "socket"\npath = "{taken}"\n', "configuration not changed")
    progress.write_text("2026-01-31T12:00:00Z")
    until(
        lambda: host.agent.state["last_data_processed_time"] == "2026-01-31T12:00:00Z",
        "the old source to be read",
    )


def test_the_status_of_a_member_that_waits_is_not_that_it_joins(
    stage: Stage, coordinator: Coordinator
) -> None:
    """It was, until its role changed for the first time."""
    start(stage, "host-b", coordinator).until_role("Primary")
    address = stage.directory / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(address))
        systemd.settimeout(PATIENCE_S)
        start(stage, "host-a", coordinator, NOTIFY_SOCKET=str(address))
        while b"registered in the group" not in systemd.recv(4096):
            pass


def test_systemd_is_notified_of_start_role_watchdog_and_stop(
    stage: Stage, coordinator: Coordinator
) -> None:
    host = Configured(stage, coordinator)
    until(lambda: host.told().count("WATCHDOG=1") > 3, "signs of life")
    assert host.agent.end() == 0
    told = host.told()
    assert "READY=1" in told
    assert any(line.startswith("STATUS=") and "Primary" in line for line in told)
    assert told.index("STOPPING=1") > told.index("READY=1")


def test_a_reload_without_free_descriptors_changes_nothing(
    stage: Stage, coordinator: Coordinator
) -> None:
    """It ended the agent with code 38."""
    host = Configured(stage, coordinator)
    pid = host.agent.popen.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = max(int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()) + 1
    holes = used - len(list(Path(f"/proc/{pid}/fd").iterdir()))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used - holes - 1, limits[1]))
    host.reload("cooldown = 8\n", "configuration not changed")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    host.reload("cooldown = 9\n", DONE)
