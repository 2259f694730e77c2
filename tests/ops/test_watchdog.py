"""The watchdog device. A FIFO or a file stands for it: a real one would reset the host."""

import fcntl
import logging
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import ConfigError, ExitCode
from agent.ops.watchdog import LONGEST_TIMEOUT_S, WatchdogDevice
from tests.this_process import open_files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "watchdog"
    path.touch()
    return path


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "watchdog"
    os.mkfifo(path)
    return path


@pytest.fixture
def reader(fifo: Path) -> Iterator[int]:
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def timeouts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A driver that takes whole seconds from 1 to 60; the timeouts it was asked for."""
    asked: list[int] = []

    def ioctl(_device: int, request: int, argument: bytes) -> bytes:
        assert request == (3 << 30) | (4 << 16) | (ord("W") << 8) | 6  # _IOWR('W', 6, int)
        asked.append(struct.unpack("i", argument)[0])
        return struct.pack("i", min(asked[-1], 60))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return asked


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def test_a_pet_is_a_write_and_disarm_writes_the_magic_character(fifo: Path, reader: int) -> None:
    device = WatchdogDevice(fifo)
    device.check()
    device.arm(10)
    with pytest.raises(BlockingIOError):
        os.read(reader, 10)
    device.pet()
    assert os.read(reader, 10) == b"\0"
    device.pet()
    device.disarm()
    assert os.read(reader, 10) == b"\0V"
    assert os.read(reader, 10) == b"", "it is closed"


def test_an_empty_file_can_replace_the_device(file: Path) -> None:
    device = WatchdogDevice(file)
    device.check()
    device.arm(10)
    device.pet()
    device.disarm()
    assert file.read_bytes() == b"\0V"


def test_nothing_happens_before_arm_and_after_disarm(file: Path) -> None:
    device = WatchdogDevice(file)
    device.pet()
    device.disarm()
    device.arm(10)
    device.disarm()
    device.disarm()
    device.pet()
    assert file.read_bytes() == b"V"


def test_it_can_be_armed_again(file: Path) -> None:
    device = WatchdogDevice(file)
    device.arm(10)
    device.disarm()
    device.arm(10)
    device.pet()
    device.disarm()
    assert file.read_bytes() == b"\0V", "a new opening starts at the file's beginning"


@pytest.mark.parametrize(
    ("timeout_s", "asked"),
    [
        (10, 10),
        (2.001, 3),
        (0.1, 1),
        (0, 1),
        (float("inf"), LONGEST_TIMEOUT_S),
        (float("nan"), LONGEST_TIMEOUT_S),
    ],
)
def test_the_timeout_is_rounded_up_to_whole_seconds(
    file: Path, timeouts: list[int], timeout_s: float, asked: int
) -> None:
    device = WatchdogDevice(file)
    device.arm(timeout_s)
    device.disarm()
    assert timeouts == [asked]


def test_the_timeout_of_the_driver_is_logged(
    file: Path, timeouts: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    device = WatchdogDevice(file)
    device.arm(90)
    device.disarm()
    assert [r.__dict__["fields"]["timeout_s"] for r in caplog.records] == [60]


def test_arming_twice_sets_the_timeout_and_opens_nothing(
    fifo: Path, reader: int, timeouts: list[int]
) -> None:
    device = WatchdogDevice(fifo)
    device.arm(10)
    device.arm(20)
    device.disarm()
    assert timeouts == [10, 20]
    assert os.read(reader, 10) == b"V"
    assert os.read(reader, 10) == b"", "no second descriptor is left open"


def test_a_driver_that_refuses_the_timeout_is_logged_and_still_petted(
    fifo: Path, reader: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = WatchdogDevice(fifo)
    device.arm(10)
    assert errors(caplog) == ["watchdog armed with the driver's own timeout"]
    device.pet()
    device.disarm()
    assert os.read(reader, 10) == b"\0V"


def test_a_device_that_cannot_be_opened_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = WatchdogDevice(tmp_path / "missing")
    device.arm(10)
    device.arm(10)
    device.pet()
    device.disarm()
    assert errors(caplog) == ["watchdog not armed"]
    assert not (tmp_path / "missing").exists()


@pytest.mark.usefixtures("timeouts")
def test_a_pet_that_fails_never_raises_and_is_logged_once_until_one_succeeds(
    fifo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    device = WatchdogDevice(fifo)
    device.arm(10)
    os.close(reader)
    device.pet()
    device.pet()
    assert errors(caplog) == ["watchdog not petted"]
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    device.pet()
    os.close(reader)
    device.pet()
    device.disarm()
    assert errors(caplog) == ["watchdog not petted"] * 2


@pytest.mark.usefixtures("timeouts")
def test_a_full_device_does_not_block(
    fifo: Path, reader: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = WatchdogDevice(fifo)
    device.arm(10)
    while not errors(caplog):
        device.pet()
    device.pet()
    device.disarm()
    assert errors(caplog) == ["watchdog not petted"]


def test_children_do_not_hold_the_device_open(fifo: Path, reader: int) -> None:
    device = WatchdogDevice(fifo)
    device.arm(10)
    command = ["/bin/ls", "-l", "/proc/self/fd"]
    listed = subprocess.run(command, close_fds=False, capture_output=True, text=True, check=True)
    assert str(fifo) not in listed.stdout
    assert str(fifo) in open_files().values()
    device.disarm()


def test_check_accepts_a_character_device_and_does_not_open_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("it was opened: that starts it"))
    WatchdogDevice(Path(os.devnull)).check()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file or directory"),
        (Path.mkdir, "Is a directory"),
        (os.mkfifo, "No such device or address"),
        (lambda path: path.write_text("[agent]\n"), "it is a file with something in it"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
    ids=["missing", "directory", "fifo without a reader", "somebody's file", "loop"],
)
def test_check_errors_name_the_fault_the_place_and_the_remedy(
    tmp_path: Path, make: object, reason: str
) -> None:
    path = tmp_path / "watchdog"
    assert callable(make)
    make(path)
    with pytest.raises(ConfigError) as caught:
        WatchdogDevice(path).check()
    assert caught.value.exit_code is ExitCode.CONFIG_VALUE
    assert str(caught.value).startswith(f"watchdog device {path} cannot be used ({reason})")
    assert "/dev/watchdog" in str(caught.value)


def test_check_refuses_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        with pytest.raises(ConfigError, match="No such device or address"):
            WatchdogDevice(path).check()


def test_check_refuses_an_impossible_path() -> None:
    with pytest.raises(ConfigError, match="null byte"):
        WatchdogDevice(Path("/dev/watch\0dog")).check()


def test_check_refuses_a_device_that_is_not_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=r"\(not writable\)"):
        WatchdogDevice(Path(os.devnull)).check()
