"""Opening files in directories of somebody else: links, FIFOs, devices and owners."""

import errno
import os
from pathlib import Path

import pytest

from agent import files

SOMEBODY = 65534
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs: root: run the tests as root")


def refusal(path: Path, *, trusted_link: bool = False) -> OSError:
    with pytest.raises(OSError, match=r".") as caught:
        files.read_regular(path, 10, trusted_link=trusted_link)
    return caught.value


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


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
