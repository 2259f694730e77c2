"""Notifications to systemd, as received at the other end of a real socket."""

import logging
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.ops.sd_notify import LONGEST_EXTENSION_S, STATUS_CHARS, Notify

DROPPED = "systemd notification dropped"


@dataclass
class Systemd:
    """The receiving end. A datagram has arrived when its sending has returned."""

    socket: socket.socket
    name: str

    def received(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(65536).decode())
            except BlockingIOError:
                return messages


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    abstract = request.param == "abstract"
    name = f"@failover-{secrets.token_hex(8)}" if abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name.replace("@", "\0", 1) if abstract else name)
        receiver.setblocking(False)
        yield Systemd(receiver, name)


@pytest.fixture
def notify(systemd: Systemd) -> Iterator[Notify]:
    notify = Notify({"NOTIFY_SOCKET": systemd.name}, monotonic_ns=lambda: 1_234_567_890)
    yield notify
    notify.close()


def dropped(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [record.levelno for record in caplog.records if record.getMessage() == DROPPED]


def test_each_state_is_one_message(systemd: Systemd, notify: Notify) -> None:
    notify.ready("Secondary of demo")
    notify.reloading()
    notify.extend_timeout(1.5)
    notify.stopping()
    assert systemd.received() == [
        "READY=1\nSTATUS=Secondary of demo",
        "RELOADING=1\nMONOTONIC_USEC=1234567",
        "EXTEND_TIMEOUT_USEC=1500000",
        "STOPPING=1",
    ]


def test_a_reload_has_the_time_of_the_monotonic_clock_by_default(systemd: Systemd) -> None:
    notify = Notify({"NOTIFY_SOCKET": systemd.name})
    before = monotonic_usec()
    notify.reloading()
    notify.close()
    stamp = int(systemd.received()[0].rpartition("=")[2])
    assert before <= stamp <= monotonic_usec()


def monotonic_usec() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_a_status_is_sent_only_when_it_has_changed(systemd: Systemd, notify: Notify) -> None:
    notify.ready("a")
    for text in ("a", "b", "b", "a"):
        notify.status(text)
    assert systemd.received() == ["READY=1\nSTATUS=a", "STATUS=b", "STATUS=a"]


def test_ready_is_sent_with_an_unchanged_status(systemd: Systemd, notify: Notify) -> None:
    notify.ready("a")
    notify.ready("a")
    assert systemd.received() == ["READY=1\nSTATUS=a"] * 2


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("one\nMAINPID=1", "one MAINPID=1"),
        ("one\r\ntwo\n", "one two"),
        ("nul\0 \x1b \udc80", r"nul\u0000 \u001b \udc80"),
        ("grüße", "grüße"),
        ("", ""),
        ("\U0001f600" * 3000, "\U0001f600" * STATUS_CHARS),
    ],
)
def test_a_status_is_one_line_that_systemd_accepts(
    systemd: Systemd, notify: Notify, text: str, sent: str
) -> None:
    notify.status(text)
    (message,) = systemd.received()
    assert message == f"STATUS={sent}"
    assert len(message.encode()) < 4096


@pytest.mark.parametrize(
    ("seconds", "usec"),
    [
        (0, 0),
        (-1, 0),
        (1e-6, 1),
        (float("inf"), LONGEST_EXTENSION_S * 1e6),
        (float("nan"), LONGEST_EXTENSION_S * 1e6),
    ],
)
def test_a_timeout_extension_is_a_bounded_number_of_microseconds(
    systemd: Systemd, notify: Notify, seconds: float, usec: float
) -> None:
    notify.extend_timeout(seconds)
    assert systemd.received() == [f"EXTEND_TIMEOUT_USEC={usec:.0f}"]


@pytest.mark.parametrize(
    ("variables", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "2500000"}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": str(os.getpid())}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "me"}, None),
        ({"WATCHDOG_PID": str(os.getpid())}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "18446744073709551615"}, None),
        ({"WATCHDOG_USEC": "9" * 5000}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_reset_only_if_systemd_watches_this_process(
    systemd: Systemd, variables: dict[str, str], watchdog_s: float | None
) -> None:
    notify = Notify({"NOTIFY_SOCKET": systemd.name, **variables})
    notify.watchdog()
    notify.close()
    assert notify.watchdog_s == watchdog_s
    assert systemd.received() == ([] if watchdog_s is None else ["WATCHDOG=1"])


def test_the_watchdog_is_reset_at_most_four_times_in_its_timeout(systemd: Systemd) -> None:
    """The receiver's queue is short, and an agent calls it at each iteration of its loop."""
    moment = [10**18]
    environ = {"NOTIFY_SOCKET": systemd.name, "WATCHDOG_USEC": "2000000"}
    notify = Notify(environ, lambda: moment[0])
    for _ in range(8):
        notify.watchdog()
        moment[0] += 250_000_000
    notify.close()
    assert systemd.received() == ["WATCHDOG=1"] * 4


def test_the_variables_are_removed_from_the_environment() -> None:
    environ = {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "HOME": "/"}
    Notify(environ).close()
    assert environ == {"HOME": "/"}


def test_children_do_not_inherit_the_variables_of_this_process(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.name)
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notify = Notify()
    notify.watchdog()
    notify.close()
    assert systemd.received() == ["WATCHDOG=1"]
    printed = subprocess.run(["/usr/bin/env"], capture_output=True, text=True, check=True).stdout
    assert "NOTIFY_SOCKET" not in printed
    assert "WATCHDOG_" not in printed


@pytest.mark.parametrize(
    "name", [None, "", "relative", "vsock:2:1234", "/" + "x" * 200, "/no/such"]
)
def test_without_a_reachable_socket_nothing_is_sent_or_raised(name: str | None) -> None:
    notify = Notify(
        {"WATCHDOG_USEC": "1000000"} | ({} if name is None else {"NOTIFY_SOCKET": name})
    )
    notify.ready("a")
    notify.status("b")
    notify.reloading()
    notify.watchdog()
    notify.extend_timeout(1)
    notify.stopping()
    notify.close()
    notify.close()
    notify.status("after the end")


def test_a_full_queue_drops_messages_without_waiting_and_is_logged_once(
    systemd: Systemd, notify: Notify, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sent = 0
    while not dropped(caplog):
        notify.stopping()
        sent += 1
    notify.stopping()
    assert dropped(caplog) == [logging.DEBUG]
    assert len(systemd.received()) == sent - 1


def test_a_status_that_was_dropped_is_sent_the_next_time(
    systemd: Systemd, notify: Notify, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    while not dropped(caplog):
        notify.stopping()
    notify.status("a")
    systemd.received()
    notify.status("a")
    assert systemd.received() == ["STATUS=a"]
