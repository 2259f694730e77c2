"""Credentials that are loaded again when their files change, and stay as they are when they cannot be."""

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent import files
from agent.daemon import credential_files
from agent.daemon.credential_files import CredentialFiles
from agent.errors import ConfigError, ServerError

LIMIT_S = 30
FAILED, DONE = "credentials not changed", "credentials read again"


class Site:
    """Two files, what is loaded from them, and a server that may refuse it."""

    def __init__(self, directory: Path) -> None:
        self.files = directory / "one", directory / "two"
        for file in self.files:
            file.write_text("good 0")
            os.utime(file, (0, 0))  # a kernel with a coarse clock could give a change the same time
        self.credentials = CredentialFiles()
        self.used: list[str] = []
        self.refused = ""
        self.attempts = 0

    def load(self) -> str:
        texts = [file.read_text() for file in self.files]
        if not all(texts) or "bad" in " ".join(texts):  # empty: it is being written in place
            raise ConfigError("a file has no good content")
        return " ".join(texts)

    def uses(self, content: str) -> bool:
        """Whether this is in force; twice, if it was read while its file was being written."""
        return set(self.used) == {content}

    async def use(self, loaded: str) -> None:
        self.attempts += 1
        if self.refused and self.refused in loaded:
            raise ServerError("the server refuses it")
        self.used.append(loaded)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.005)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(credential_files, "POLL_S", 0.01)
    monkeypatch.setattr(credential_files, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(credential_files, "LONGEST_RETRY_S", 0.02)
    return Site(tmp_path)


@asynccontextmanager
async def following(site: Site) -> AsyncIterator[None]:
    assert await site.credentials.load("test", site.files, site.load, site.use) == "good 0 good 0"
    task = asyncio.create_task(site.credentials.follow())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def count(caplog: pytest.LogCaptureFixture, message: str) -> int:
    return sum(record.getMessage().startswith(message) for record in caplog.records)


@pytest.mark.parametrize("how", ["written", "replaced", "link"])
async def test_a_change_of_one_file_is_put_into_force(site: Site, how: str) -> None:
    one = site.files[0]
    if how == "link":  # as a volume of Kubernetes does it
        (one.parent / "..1").write_text("good 0")
        (one.parent / "..2").write_text("good 1")
        one.unlink()
        one.symlink_to("..1")
    async with following(site):
        if how == "written":
            one.write_text("good 1")
        elif how == "replaced":
            (one.parent / "new").write_text("good 1")
            (one.parent / "new").replace(one)
        else:
            (one.parent / "link").symlink_to("..2")
            (one.parent / "link").replace(one)
        await until(lambda: site.uses("good 1 good 0"))


async def test_files_that_do_not_change_are_used_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[tuple[Path, ...]] = []

    def look_and_count(paths: tuple[Path, ...]) -> object:
        looks.append(paths)
        return files.signatures(paths)

    async with following(site):
        monkeypatch.setattr(credential_files, "signatures", look_and_count)
        await until(lambda: len(looks) >= 5)
    assert site.attempts == 0


async def test_a_wrong_file_is_one_line_and_the_former_stays_until_it_is_right(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with following(site):
        for number in range(3):
            site.files[0].write_text(f"bad {number}" + " " * number)
            await until(lambda: count(caplog, FAILED))
            await asyncio.sleep(0.05)
        assert (count(caplog, FAILED), site.used) == (1, [])
        site.files[0].write_text("good 1")
        await until(lambda: site.uses("good 1 good 0"))
        await until(lambda: count(caplog, DONE))
        site.files[0].write_text("bad again")
        await until(lambda: count(caplog, FAILED) == 2)


async def test_refused_credentials_are_tried_again_before_unchanged_files_are_looked_at(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server learns of new credentials later than the agent: until then its role has R (docs/operations.md)."""
    site.refused = "good 1"
    async with following(site):
        site.files[0].write_text("good 1")
        await until(lambda: site.attempts)
        monkeypatch.setattr(credential_files, "POLL_S", 10 * LIMIT_S)
        refused = site.attempts
        await until(lambda: site.attempts >= refused + 3)
        site.refused = ""
        await until(lambda: site.uses("good 1 good 0"))


async def test_a_file_that_is_half_written_for_a_moment_is_no_line(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(credential_files, "FIRST_RETRY_S", 1000.0)
    loads: list[str] = []
    load = site.load

    def recorded() -> str:
        loads.append(site.files[0].read_text())
        return load()

    site.load = recorded  # type: ignore[method-assign] # to see the attempts
    async with following(site):
        site.files[0].write_text("bad, as half of it is missing")
        await until(lambda: "bad, as half of it is missing" in loads)
        site.files[0].write_text("good 1")
        await until(lambda: site.uses("good 1 good 0"))
    assert count(caplog, FAILED) == 0


async def test_a_missing_file_is_one_line_and_its_return_no_change(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def load() -> str:
        try:
            return Site.load(site)
        except OSError as error:
            raise ConfigError(f"cannot be read: {error}") from None

    site.load = load  # type: ignore[method-assign] # as the real ones do
    async with following(site):
        aside = site.files[1].with_suffix(".aside")
        site.files[1].rename(aside)
        await until(lambda: count(caplog, FAILED) == 1)
        aside.rename(site.files[1])
        await until(lambda: site.used == ["good 0 good 0"])
    assert count(caplog, FAILED) == 1


async def test_what_the_server_refuses_is_tried_again_until_it_takes_it(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.refused = "good 1"
    async with following(site):
        site.files[0].write_text("good 1")
        await until(lambda: site.attempts > 4)
        assert (site.used, count(caplog, FAILED)) == ([], 1)
        site.refused = ""
        await until(lambda: site.uses("good 1 good 0"))


async def test_a_reload_loads_at_once_and_reports_each_time(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credential_files, "POLL_S", 1000.0)
    async with following(site):
        await site.credentials.reload()
        assert site.used == ["good 0 good 0"]
        site.files[0].write_text("bad")
        await site.credentials.reload()
        await site.credentials.reload()
        assert (len(site.used), count(caplog, FAILED)) == (1, 2)
        site.files[0].write_text("good 2")
        await site.credentials.reload()
        assert site.used[1:] == ["good 2 good 0"]


async def test_a_file_system_that_hangs_holds_up_no_loop_and_is_one_line(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 1: a secret may lie on a file system that hangs."""
    monkeypatch.setattr(credential_files, "LONGEST_LOAD_S", 0.05)
    hanging = threading.Event()
    with pytest.raises(ConfigError, match=f"reading {site.files[0]}.* took longer than 0.05 s"):
        await CredentialFiles().load("test", site.files, lambda: str(hanging.wait()), site.use)
    hanging.set()
    async with following(site):
        again = threading.Event()
        monkeypatch.setattr(credential_files, "signatures", lambda _: again.wait(LIMIT_S) or None)
        await until(lambda: count(caplog, FAILED) == 1)
        await asyncio.sleep(0.2)
        assert count(caplog, FAILED) == 1
        monkeypatch.undo()
        again.set()


async def test_a_thread_that_cannot_be_started_is_not_reported_as_a_slow_disk(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", start)
    with pytest.raises(ConfigError, match="test files: no thread can be started: can't start"):
        await site.credentials.load("test", site.files, site.load, site.use)


async def test_without_files_nothing_is_followed(site: Site) -> None:
    await site.credentials.load("test", (), lambda: "x", site.use)
    await site.credentials.reload()
    assert site.attempts == 0


async def test_a_change_of_mode_alone_is_a_change(site: Site) -> None:
    """A key that could not be read is right once it can be."""
    before = site.files[0].stat().st_ctime_ns
    async with following(site):
        while site.files[0].stat().st_ctime_ns == before:  # a kernel's clock may be coarse
            site.files[0].chmod(0o600)
        await until(lambda: site.uses("good 0 good 0"))
