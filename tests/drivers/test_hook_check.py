"""Hooks that the kernel would refuse to execute, and directories of ConfigMap volumes."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent.drivers.hooks.check import HookCheck
from agent.drivers.hooks.process import HookContext
from agent.drivers.hooks.spec import HookSpec
from agent.errors import ConfigError, ExitCode


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o755)
    return path


def fault(path: Path, search_path: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        HookCheck("primary", search_path=search_path).check_command([str(path)])
    assert caught.value.exit_code == ExitCode.HOOK_NOT_EXECUTABLE
    assert str(path) in str(caught.value)
    return str(caught.value)


REFUSED: Mapping[bytes, str] = {
    b"": "it is empty",
    bytes(300): "nothing but zeros",
    b"echo started\n": "no interpreter line",
    b"\xef\xbb\xbf#!/bin/sh\n": "no interpreter line",
    b"\n#!/bin/sh\n": "no interpreter line",
    b"#!/bin/sh\r\nexit 0\r\n": "carriage return",
    b"#!/usr/bin/env sh\r\n": "carriage return",
    b"#!\n": "no absolute path",
    b"#!sh\n": "no absolute path",
    b"#!/no/such/interpreter -x\n": "/no/such/interpreter is not there",
    b"#!/etc/passwd\n": "/etc/passwd is not there, or may not be executed",
    b"#!/bin\n": "/bin is not there, or may not be executed",
    b"#!/usr/bin/env no-such-program\n": "'no-such-program'",
    b"#!/usr/bin/env\n": "env finds no ''",
    b"#!/usr/bin/env -S X=1 no-such-program -u\n": "'no-such-program'",
    b"#!/usr/bin/env sh -e\n": "env -S sh -e",
    b"#!/" + b"x" * 300 + b"\n": "longer than 256 bytes",
}


@pytest.mark.parametrize("content", REFUSED, ids=lambda content: repr(content[:30]))
def test_a_file_that_the_kernel_would_not_execute_is_refused(
    tmp_path: Path, content: bytes
) -> None:
    """Fault 24: such a hook was only found when it had to run."""
    path = written(tmp_path / "hook", content)
    assert REFUSED[content] in fault(path)
    with pytest.raises((OSError, subprocess.SubprocessError)):  # env alone executes it for ever
        subprocess.run([path], check=True, capture_output=True, timeout=0.5)


def test_an_interpreter_that_cannot_be_executed_itself_is_a_fault_of_the_hook(
    tmp_path: Path,
) -> None:
    interpreter, path = tmp_path / "interpreter", tmp_path / "hook"
    written(path, f"#!{interpreter}\n".encode())
    for content, why in ((bytes(300), "nothing but zeros"), (f"#!{path}\n".encode(), "in turn")):
        written(interpreter, content)
        assert why in fault(path)
        with pytest.raises(OSError, match=r"Exec format error|Too many levels"):
            subprocess.run([path], check=True)


def test_interpreters_that_are_scripts_pass_as_far_as_the_kernel_takes_them(tmp_path: Path) -> None:
    paths = [written(tmp_path / "0", b"#!/bin/sh\n")]
    for number in range(1, 7):
        paths.append(written(tmp_path / str(number), f"#!{paths[-1]}\n".encode()))
    for path in paths:
        try:
            subprocess.run([path], check=True)
        except OSError:
            assert "in turn" in fault(path)
        else:
            HookCheck("primary").check_command([str(path)])


@pytest.mark.parametrize(
    "content",
    [
        b"#!/bin/sh",
        b"#! /bin/sh -e\nexit 0\n",
        b"#!\t/bin/sh\t-e\nexit 0\n",
        b"#!/usr/bin/env sh\nexit 0\n",
        b"#!/usr/bin/env -S sh -e\nexit 0\n",
        b"#!/usr/bin/env -S X=1 sh -e\nexit 0\n",
        Path("/bin/true").read_bytes(),
    ],
    ids=lambda content: repr(content[:30]),
)
def test_a_file_that_the_kernel_executes_passes(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "hook", content)
    HookCheck("primary").check_command([str(path)])
    subprocess.run([path], check=True, capture_output=True)


def test_env_searches_the_path_of_the_hook(tmp_path: Path) -> None:
    path = written(tmp_path / "hook", b"#!/usr/bin/env tool\n")
    written(tmp_path / "tool", b"#!/bin/sh\n")
    assert "/bin" in fault(path, "/bin")
    HookCheck("primary", search_path=f"/bin:{tmp_path}").check_command([str(path)])
    context = HookContext(environment={"PATH": str(tmp_path)})
    HookSpec("primary", (str(path),), context=context).check()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_hook_on_a_noexec_mount_is_refused(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "noexec,mode=0755", "tmpfs", str(tmp_path)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("needs: the right to mount")
    try:
        path = written(tmp_path / "hook", b"#!/bin/sh\n")
        assert "mounted noexec" in fault(path)
        HookCheck("primary").check_command(["/bin/sh", str(path)])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def volume(tmp_path: Path) -> Path:
    """A directory as Kubernetes mounts a ConfigMap."""
    directory = tmp_path / "volume"
    data = directory / "..2026_01_31"
    data.mkdir(parents=True)
    (directory / "..data").symlink_to(data.name)
    for name in ("10-start", "notes.txt"):
        written(data / name, b"#!/bin/sh\n").chmod(0o555)
        (directory / name).symlink_to(f"..data/{name}")
    directory.chmod(0o777)
    return directory


def test_a_config_map_directory_is_accepted_only_with_the_setting(tmp_path: Path) -> None:
    """Fault 24: its mode is 0777, and it cannot be changed."""
    directory = volume(tmp_path)
    with pytest.raises(ConfigError, match="hook_directories_writable") as caught:
        HookCheck("primary").check_directory(directory)
    assert caught.value.exit_code == ExitCode.HOOK_WRITABLE
    HookCheck("primary", writable_directories=True).check_directory(directory)
    spec = HookSpec("primary", (str(directory),), writable_directories=True)
    spec.check()
    assert [step.name for step in spec.steps()] == ["10-start"]


def test_the_setting_does_not_accept_writable_files(tmp_path: Path) -> None:
    directory = volume(tmp_path)
    (directory / "..data" / "10-start").chmod(0o777)
    with pytest.raises(ConfigError, match="could change the hook"):
        HookCheck("primary", writable_directories=True).check_directory(directory)


def test_without_home_a_hook_has_the_home_of_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 24: systemd sets no HOME for a service of root."""
    monkeypatch.delenv("HOME", raising=False)
    assert HookContext().variables()["HOME"] == str(Path("~").expanduser())
