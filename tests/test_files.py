"""Opening files in directories of somebody else: links, FIFOs, devices and owners."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent import files
from agent.drivers.statefile import StateFile
from agent.errors import ConfigError
from agent.schema.secret_files import read_secret
from tests.this_process import descriptors

SOMEBODY = 65534
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs: root: run the tests as root")


def refusal(path: Path, *, trusted_link: bool = False) -> OSError:
    with pytest.raises(OSError, match=r".") as caught:
        files.read_regular(path, 10, trusted_link=trusted_link)
    return caught.value


def test_a_file_is_read_up_to_one_byte_more_than_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 100)
    assert files.read_regular(path, 10) == b"x" * 11
    assert files.read_regular(path, 1000) == b"x" * 100


def test_a_relative_path_and_one_with_dots_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    assert files.read_regular(Path("f"), 9) == b"1"
    assert files.read_regular(Path("d/../f"), 9) == b"1"


def test_the_last_component_is_never_a_link_unless_a_trusted_one_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1")
    (tmp_path / "l").symlink_to("f")
    assert files.NOT_FOLLOWED in str(refusal(tmp_path / "l"))
    assert files.read_regular(tmp_path / "l", 9, trusted_link=True) == b"1"


@pytest.mark.parametrize("target", ["d", "{}/d", "../{0.name}/d"])
def test_a_link_of_ours_to_a_directory_is_followed(tmp_path: Path, target: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_bytes(b"1")
    (tmp_path / "l").symlink_to(target.format(tmp_path))
    assert files.read_regular(tmp_path / "l/f", 9) == b"1"


@ROOT
@pytest.mark.parametrize("path", ["l/f", "final"])
def test_a_link_of_another_user_is_not_followed(tmp_path: Path, path: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_bytes(b"1")
    (tmp_path / "l").symlink_to("d")
    (tmp_path / "final").symlink_to("d/f")
    for link in ("l", "final"):
        os.chown(tmp_path / link, SOMEBODY, SOMEBODY, follow_symlinks=False)
    assert f"belongs to uid {SOMEBODY}" in str(refusal(tmp_path / path, trusted_link=True))
    with pytest.raises(OSError, match="not followed"):
        files.stat_file(tmp_path / path)


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "l").symlink_to("l")
    assert refusal(tmp_path / "l/f").errno == errno.ELOOP
    assert refusal(tmp_path / "l", trusted_link=True).errno == errno.ELOOP


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        assert "not a regular file" in str(refusal(path))


def test_what_is_missing_or_no_directory_has_the_systems_words(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert refusal(tmp_path / "none").errno == errno.ENOENT
    assert refusal(tmp_path / "none/f").errno == errno.ENOENT
    assert refusal(tmp_path / "f/g").errno == errno.ENOTDIR
    with pytest.raises(NotADirectoryError):
        files.open_directory(tmp_path / "f")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "l").symlink_to("l")
    (tmp_path / "d").symlink_to(tmp_path)
    before = descriptors()
    for _ in range(5):
        files.read_regular(tmp_path / "d/f", 1)
        files.stat_file(tmp_path / "d/f")
        for path in ("l", "none", "l/f", "f/g"):
            refusal(tmp_path / path)
    assert descriptors() == before


def test_a_secret_may_be_behind_the_links_of_a_volume_and_behind_no_other(tmp_path: Path) -> None:
    """As Kubernetes makes them; a FIFO at its place would hold the agent up."""
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026/password").write_text("secret\n")
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "password").symlink_to("..data/password")
    assert read_secret(tmp_path / "password") == "secret"
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_secret(tmp_path / "fifo")
    if os.geteuid() == 0:
        os.chown(tmp_path / "..data", SOMEBODY, SOMEBODY, follow_symlinks=False)
        with pytest.raises(ConfigError, match=f"belongs to uid {SOMEBODY}"):
            read_secret(tmp_path / "password")


ATTACKER = """
import os, sys
precious, uid = sys.argv[1], int(sys.argv[2])
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
traps = [name + end for name in ("state.json", "s") for end in ("", ".tmp", ".new")]
print("ready", flush=True)
while True:
    for name in traps:
        for trap in (lambda: os.symlink(precious, name), lambda: os.mkfifo(name), lambda: os.link(precious, name)):
            try:
                os.unlink(name)
            except OSError:
                pass
            try:
                trap()
            except OSError:
                pass
"""


@ROOT
def test_a_hostile_owner_of_the_directory_gets_nothing_out_of_root(tmp_path: Path) -> None:
    """A process of another user puts traps there again and again, while files are written and read."""
    for part in (tmp_path, *tmp_path.parents[:2]):
        part.chmod(part.stat().st_mode | 0o011)
    precious = tmp_path / "precious"
    precious.touch(0o644)
    precious.write_text("as it was")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, SOMEBODY, SOMEBODY)
    state_file = StateFile(theirs / "state.json")
    state_file.acquire()
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", ATTACKER, str(precious), str(SOMEBODY)],
        cwd=theirs,
        stdout=subprocess.PIPE,
    ) as attacker:
        assert attacker.stdout is not None
        assert attacker.stdout.readline() == b"ready\n"
        written = 0
        for number in range(300):
            with contextlib.suppress(OSError):
                state_file.write({"n": number})
                written += 1
            state_file.read()
            with contextlib.suppress(OSError):
                assert b"as it was" not in files.read_regular(theirs / "state.json", 100)
        attacker.kill()
    state_file.close()
    assert written
    assert precious.read_text() == "as it was"
    assert precious.stat().st_mode & 0o777 == 0o644
    assert precious.stat().st_uid == 0
