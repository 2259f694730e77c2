"""The state file and its lock."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.drivers import statefile
from agent.drivers.statefile import StateFile, default_directory
from agent.errors import ConfigError, ExitCode

HOLDER = """
import sys
import time
from pathlib import Path
from agent.drivers.statefile import StateFile
file = StateFile(Path(sys.argv[1]))
file.acquire()
file.write({"role": "Primary"})
Path(sys.argv[1] + ".tmp").write_text("half of a sta")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[StateFile]:
    file = StateFile(tmp_path / "state.json")
    file.acquire()
    yield file
    file.close()


def test_a_written_state_is_read_back(file: StateFile) -> None:
    file.write({"role": "Secondary", "epoch": None})
    file.write({"role": "Primary", "epoch": 7, "why": "ü"})
    assert file.read() == {"role": "Primary", "epoch": 7, "why": "ü"}
    assert json.loads(file.path.read_text()) == file.read()


def test_a_write_keeps_the_lock_file_young(file: StateFile) -> None:
    """systemd-tmpfiles removed an old one from /tmp, and then a second agent could claim the session."""
    lock = file.path.with_name("state.json.lock")
    os.utime(lock, (0, 0))
    file.write({})
    assert lock.stat().st_mtime > 0


def test_the_file_is_readable_by_all_under_any_umask(file: StateFile) -> None:
    before = os.umask(0o077)
    try:
        file.write({})
    finally:
        os.umask(before)
    assert file.path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(("umask", "before"), [(0, None), (0o777, None), (0o022, 0o644)])
def test_nobody_else_can_lock_the_lock_file_under_any_umask(
    tmp_path: Path, umask: int, before: int | None
) -> None:
    """A workload of another user took the lock when the agent had died, and no agent could start any more."""
    lock = tmp_path / "state.json.lock"
    if before is not None:
        lock.touch(before)
    umask = os.umask(umask)
    try:
        file = StateFile(tmp_path / "state.json")
        file.acquire()
        file.close()
    finally:
        os.umask(umask)
    assert lock.stat().st_mode & 0o777 == 0o600


def test_a_reader_never_sees_a_partial_state(file: StateFile) -> None:
    file.write({"n": 0})
    with file.path.open() as reader:
        file.write({"n": 1})
        assert json.load(reader) == {"n": 0}


def test_a_missing_file_is_none_and_logged(
    file: StateFile, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert file.read() is None
    assert "no previous state" in caplog.text


@pytest.mark.parametrize(
    "content", [b"", b'{"role": "Pri', b"[]", b"\xff\xfe", b"[" * 50_000, b" " * 70_000 + b"{}"]
)
def test_a_damaged_file_is_none_and_logged(
    file: StateFile, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file.path.write_bytes(content)
    assert file.read() is None
    assert "previous state ignored" in caplog.text


def test_a_failed_write_raises_and_leaves_the_old_state(file: StateFile) -> None:
    file.write({"n": 0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            file.write({"n": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read() == {"n": 0}
    assert sorted(path.name for path in file.path.parent.iterdir()) == [
        "state.json",
        "state.json.lock",
    ]


def test_a_state_that_is_not_json_changes_nothing(file: StateFile) -> None:
    file.write({"n": 0})
    with pytest.raises(ValueError, match="JSON"):
        file.write({"until": float("inf")})
    assert file.read() == {"n": 0}
    assert not file.path.with_name("state.json.tmp").exists()


def test_writing_requires_the_claim(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        StateFile(tmp_path / "state.json").write({})


def test_two_processes_never_share_the_claim_and_a_crash_releases_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state.json"
    file = StateFile(path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(ConfigError, match=f"pid {holder.pid}:") as caught:
            file.acquire()
        assert caught.value.exit_code == ExitCode.SESSION_IN_USE
        assert path.with_name("state.json.tmp").exists()
        holder.kill()
    file.acquire()
    assert file.read() == {"role": "Primary"}
    file.write({})
    assert not path.with_name("state.json.tmp").exists()
    file.close()


def test_a_released_claim_can_be_acquired(file: StateFile) -> None:
    other = StateFile(file.path)
    with pytest.raises(ConfigError):
        other.acquire()
    file.close()
    file.close()
    other.acquire()
    other.write({})
    other.close()


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("missing/state.json", "file/state.json"):
        with pytest.raises(ConfigError, match="cannot be written") as caught:
            StateFile(tmp_path / path).acquire()
        assert caught.value.exit_code == ExitCode.STATE_FILE
        assert str(tmp_path / path) in str(caught.value)


def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    # root may write everywhere but here
    place = Path("/proc/self") if os.geteuid() == 0 else tmp_path
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError) as caught:
        StateFile(place / "state.json").acquire()
    assert caught.value.exit_code == ExitCode.STATE_FILE


def test_systemds_directory_is_used_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/one:/run/two")
    assert default_directory() == Path("/run/one")


def test_xdg_runtime_dir_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_directory() == tmp_path / "failover-agent"
    assert default_directory().is_dir()


# the directories of the host itself are not created here
@pytest.mark.parametrize(
    ("uid", "expected"),
    [(0, ("/run/failover-agent", 0o755)), (1000, ("/tmp/failover-agent-1000", 0o700))],
)
def test_the_fallback_directory_depends_on_the_user(uid: int, expected: tuple[str, int]) -> None:
    assert statefile._choose(None, uid) == (Path(expected[0]), expected[1])


def test_the_directory_is_created_with_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for _ in range(2):
        assert default_directory().stat().st_mode & 0o777 == 0o755


def test_a_directory_that_others_can_change_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = {name: tmp_path / name for name in ("open", "link", "missing", "theirs")}
    for name in ("open", "link", "theirs"):
        parents[name].mkdir()
    (parents["open"] / "failover-agent").mkdir()
    (parents["open"] / "failover-agent").chmod(0o777)
    (tmp_path / "target").mkdir()
    (parents["link"] / "failover-agent").symlink_to(tmp_path / "target")
    if os.geteuid() == 0:
        (parents["theirs"] / "failover-agent").mkdir()
        os.chown(parents["theirs"] / "failover-agent", 12345, -1)
    else:
        del parents["theirs"]
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    for parent in parents.values():
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(parent))
        with pytest.raises(ConfigError) as caught:
            default_directory()
        assert caught.value.exit_code == ExitCode.STATE_FILE
        assert str(parent / "failover-agent") in str(caught.value)


HELD_BY_A_GUARD = """
import os, subprocess, sys
from pathlib import Path
from agent.drivers.statefile import StateFile
state_file = StateFile(Path(sys.argv[1]))
state_file.acquire()
guard = subprocess.Popen(["sleep", sys.argv[2]], pass_fds=[state_file.claim])
print(guard.pid, flush=True)
os._exit(9)
"""


def test_a_start_waits_for_the_guard_of_a_dead_agent(tmp_path: Path) -> None:
    """The claim outlives the agent until its guard has demoted and let go, too."""
    path = tmp_path / "state.json"
    command = [sys.executable, "-c", HELD_BY_A_GUARD, str(path), "0.5"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    with pytest.raises(ConfigError):
        StateFile(path).acquire()
    state_file = StateFile(path)
    state_file.acquire(wait_s=30)
    state_file.close()


def test_a_start_does_not_wait_for_a_live_agent(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    first = StateFile(path)
    first.acquire()
    started = time.monotonic()
    with pytest.raises(ConfigError):
        StateFile(path).acquire(wait_s=30)
    assert time.monotonic() - started < 10
    first.close()


def test_a_start_waits_for_the_guard_of_a_dead_agent_that_nobody_has_reaped(tmp_path: Path) -> None:
    """As in a container whose first process reaps nobody: a zombie counted as a live agent."""
    path = tmp_path / "state.json"
    command = [sys.executable, "-c", HELD_BY_A_GUARD, str(path), "0.5"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as agent:
        os.waitid(os.P_PID, agent.pid, os.WEXITED | os.WNOWAIT)
        state_file = StateFile(path)
        state_file.acquire(wait_s=30)
        state_file.close()


# --- a lock file that somebody removes under a live agent


def test_a_removed_lock_file_is_made_again_and_excludes_others(file: StateFile) -> None:
    """Whoever started then claimed the session, too, and released the tenure of the live agent."""
    claim = file.claim
    file.path.with_name("state.json.lock").unlink()
    file.write({"n": 1})
    with pytest.raises(ConfigError, match=f"pid {os.getpid()}:") as caught:
        StateFile(file.path).acquire()
    assert caught.value.exit_code == ExitCode.SESSION_IN_USE
    assert file.claim == claim


def test_a_file_that_another_process_has_claimed_meanwhile_is_not_written(file: StateFile) -> None:
    file.write({"n": 1})
    file.path.with_name("state.json.lock").unlink()
    other = StateFile(file.path)
    other.acquire()
    with pytest.raises(ConfigError) as caught:
        file.write({"n": 2})
    assert caught.value.exit_code == ExitCode.SESSION_IN_USE
    assert other.read() == {"n": 1}
    other.close()
    file.write({"n": 3})


def test_the_claim_is_made_again_in_a_directory_that_is_there_again(file: StateFile) -> None:
    directory, moved = file.path.parent, file.path.parent.with_name("moved")
    directory.rename(moved)
    with pytest.raises(FileNotFoundError):
        file.write({"n": 1})
    directory.mkdir()
    file.write({"n": 2})
    with pytest.raises(ConfigError):
        StateFile(file.path).acquire()
    shutil.rmtree(moved)


# --- a directory that belongs to the workload, and an agent that is root

SOMEBODY = 65534
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs: root: run the tests as root")


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    path = tmp_path / "etc/precious"
    path.touch(0o600)
    path.write_text('{"role": "Primary"}')
    return path


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    directory = tmp_path / "theirs"
    directory.mkdir()
    if os.geteuid() == 0:
        os.chown(directory, SOMEBODY, SOMEBODY)
    return directory


def untouched(precious: Path) -> bool:
    return (
        precious.read_text() == '{"role": "Primary"}' and precious.stat().st_mode & 0o777 == 0o600
    )


@pytest.mark.parametrize("suffix", ["", ".tmp"])
@pytest.mark.parametrize("how", ["symbolic", "hard", "fifo"])
def test_a_trap_at_the_place_of_a_file_is_replaced_and_what_it_leads_to_is_not(
    theirs: Path, precious: Path, suffix: str, how: str
) -> None:
    file = StateFile(theirs / "state.json")
    file.acquire()
    trap = theirs / f"state.json{suffix}"
    if how == "fifo":
        os.mkfifo(trap)
    elif how == "hard":
        trap.hardlink_to(precious)
    else:
        trap.symlink_to(precious)
    if suffix or how != "hard":
        assert file.read() is None
    file.write({"n": 1})
    assert untouched(precious)
    assert file.read() == {"n": 1}
    assert not file.path.is_symlink()
    file.close()


@pytest.mark.parametrize("how", ["symbolic", "hard", "fifo"])
def test_a_trap_at_the_place_of_the_lock_is_refused(theirs: Path, precious: Path, how: str) -> None:
    trap = theirs / "state.json.lock"
    if how == "fifo":
        os.mkfifo(trap)
    elif how == "hard":
        trap.hardlink_to(precious)
    else:
        trap.symlink_to(precious)
    with pytest.raises(ConfigError) as caught:
        StateFile(theirs / "state.json").acquire()
    assert caught.value.exit_code == ExitCode.STATE_FILE
    assert untouched(precious)


@ROOT
def test_a_state_of_another_user_is_ignored(theirs: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has processes to kill, and a tenure to release."""
    file = StateFile(theirs / "state.json")
    file.acquire()
    file.path.write_text('{"role": "Primary", "instance": "x"}')
    os.chown(file.path, SOMEBODY, SOMEBODY)
    assert file.read() is None
    reasons = [str(record.__dict__["fields"]["reason"]) for record in caplog.records]
    assert reasons == [f"[Errno 1] it belongs to uid {SOMEBODY}, and not to this user"]
    file.close()


@ROOT
def test_a_directory_behind_anothers_link_is_refused(theirs: Path, precious: Path) -> None:
    link = theirs / "run"
    link.symlink_to(precious.parent)
    os.chown(link, SOMEBODY, SOMEBODY, follow_symlinks=False)
    with pytest.raises(ConfigError, match=f"belongs to uid {SOMEBODY}"):
        StateFile(link / "state.json").acquire()
    assert [path.name for path in precious.parent.iterdir()] == ["precious"]


def test_a_directory_that_was_made_anew_is_written_to(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    file = StateFile(directory / "state.json")
    file.acquire()
    directory.rename(tmp_path / "old")
    directory.mkdir()
    file.write({"n": 1})
    assert file.read() == {"n": 1}
    file.close()
