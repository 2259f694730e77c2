"""The image, built as the Dockerfile says, by buildah; podman runs containers of it.

The base image is made by mmdebstrap, under the name that the Dockerfile has, since no registry of
images can be asked; the wheels come from where this environment gets its own, in the locked versions.
Images and containers are in a folder of their own.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from .stage import until

ROOT = Path(__file__).parents[2]
TOOLS = ("podman", "buildah", "runc", "mmdebstrap")
HOW = f"as root, on Debian: apt-get install {' '.join(TOOLS)}"
IMAGE = "localhost/failover-agent:test"
SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = "python3,python3-venv"
LEAN = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
GLIBC = ("manylinux2014", "manylinux_2_17", "manylinux_2_28", "manylinux_2_34")
PIP_CONF = "[global]\nno-index = true\nfind-links = /wheels\ndisable-pip-version-check = true\n"
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
HARDENED = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all")
STORAGE = "3g"
"""The most memory for images and containers, of which half a gigabyte is used. It is faster than a disk by two to three times."""

BUILD_S = 400
COMMAND_S = 60


def call(*argv: str | Path, limit_s: float = COMMAND_S) -> str:
    """The output of a command that succeeds."""
    code, said = attempt(*argv, limit_s=limit_s)
    assert code == 0, f"{argv}: {code}: {said}"
    return said


def attempt(*argv: str | Path, limit_s: float = COMMAND_S) -> tuple[int, str]:
    """Code and output of a command."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "DISABLE_HC_SYSTEMD": "true"},  # the test itself asks for health
        text=True,
        timeout=limit_s,
        check=False,
    )
    return done.returncode, done.stdout


class Engine:
    """podman and buildah, with storage of their own in one folder."""

    def __init__(self, folder: Path) -> None:
        self._storage = folder / "storage"
        where = [f"--root={self._storage}", f"--runroot={folder / 'run'}"]
        own = [f"--tmpdir={folder / 'tmp'}", "--runtime=runc", "--cgroup-manager=cgroupfs"]
        self._podman = ["podman", *where, *own, "--events-backend=file"]
        self._buildah = ["buildah", *where]

    def __call__(self, *args: str | Path) -> str:
        return call(*self._podman, *args, limit_s=BUILD_S)

    def attempt(self, *args: str) -> tuple[int, str]:
        return attempt(*self._podman, *args)

    def build(self, *args: str) -> str:
        options = ["--isolation=chroot", "--network=host", "--pull-never", "--format=docker"]
        return call(*self._buildah, "bud", *options, *args, limit_s=BUILD_S)

    def remove(self) -> None:
        """Every container, and what keeps the folder from being unmounted."""
        try:
            self("rm", "--all", "--force", "--time=0")
            until(lambda: not self._is_in_use(), "the processes that clean up to end")
        finally:
            attempt("umount", str(self._storage / "overlay"))

    def _is_in_use(self) -> bool:
        """Whether a podman that was started at the end of a container still works: it would mount again."""
        name = os.fsencode(self._storage)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # the process has ended
                if name in path.read_bytes():
                    return True
        return False


class Container:
    """One container of the image, hardened as docs/container.md says."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        options: Sequence[str],
        *words: str,
        network: str = "host",
    ) -> None:
        self._engine = engine
        self.name = name
        flags = ["--detach", f"--name={name}", f"--network={network}", "--log-driver=k8s-file"]
        engine("run", *flags, *HARDENED, *LIMITS, "--security-opt=no-new-privileges", *options,
               IMAGE, *words)  # fmt: skip

    def sh(self, script: str) -> tuple[int, str]:
        return self._engine.attempt("exec", self.name, "/bin/sh", "-c", script)

    def said(self) -> str:
        return self._engine("logs", self.name)

    def until_said(self, text: str) -> None:
        until(lambda: text in self.said(), f"{self.name} to say {text!r}")

    def is_well(self) -> bool:
        return self._engine.attempt("healthcheck", "run", self.name)[0] == 0

    def end(self) -> int:
        """SIGTERM, as an orchestrator does it; the exit code."""
        self._engine("stop", "--time=30", self.name)
        return self.code()

    def kill(self) -> None:
        self._engine("kill", "--signal=KILL", self.name)

    def code(self) -> int:
        """The exit code, once it has ended."""
        return int(self._engine("wait", self.name).strip().splitlines()[-1])


# -- the image -------------------------------------------------------------------------------------


def base_name() -> str:
    """The base that the Dockerfile names, without the digest, which a local image cannot have."""
    found = re.search(r"^ARG BASE=(\S+:\S+)@sha256:[0-9a-f]{64}$", dockerfile(), re.MULTILINE)
    assert found, "the Dockerfile pins no base"
    return found[1]


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def debian(kept: Path, scratch: Path) -> Path:
    """The root file system of that base, with Python; kept from one run to the next."""
    root = kept / f"{SUITE}.tar"
    if not root.exists():
        options = ["--quiet", "--variant=minbase", "--mode=root", f"--include={PACKAGES}", *LEAN]
        new = root.with_suffix(".new.tar")
        call("env", f"TMPDIR={scratch}", "mmdebstrap", *options, SUITE, new, limit_s=BUILD_S)
        new.rename(root)
    return root


def download(wheels: Path) -> None:
    """Download the packages that the build of the image needs, for the image's Python."""
    wanted = [
        "--implementation=cp",
        f"--python-version={PYTHON}",
        f"--abi=cp{PYTHON.replace('.', '')}",
    ]
    wanted += ["--abi=abi3", "--abi=none"]
    wanted += [f"--platform={glibc}_{platform.machine()}" for glibc in GLIBC]
    files = [f"--requirement={ROOT}/requirements/{name}.txt" for name in ("image", "build")]
    options = [
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        f"--dest={wheels}",
    ]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    call(*pip, *options, *wanted, *files, limit_s=BUILD_S)


@contextmanager
def built(kept: Path) -> Iterator[Engine]:
    """An engine that has built the image. Skips the test without podman; ``kept`` keeps packages for later runs."""
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in TOOLS):
        pytest.skip(f"needs: podman: {HOW}")
    with tempfile.TemporaryDirectory(prefix="failover-") as name:
        folder = Path(name)
        call("mount", "-t", "tmpfs", "-o", f"size={STORAGE}", "tmpfs", folder)
        engine = Engine(folder)
        try:
            root = debian(kept, folder)
            engine("import", "--quiet", root, f"docker.io/library/{base_name()}")
            (folder / "wheels").mkdir()
            download(folder / "wheels")
            (folder / "pip.conf").write_text(PIP_CONF)
            engine.build(
                f"--build-arg=BASE={base_name()}",
                "--build-arg=VERSION=1.2.3",
                f"--volume={folder}/wheels:/wheels:ro",
                f"--volume={folder}/pip.conf:/etc/pip.conf:ro",
                f"--tag={IMAGE}",
                str(ROOT),
            )
            yield engine
        finally:
            engine.remove()
            call("umount", folder)
