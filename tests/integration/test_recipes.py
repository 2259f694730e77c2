"""docs/recipes.md: every file of config/recipes does with real agents what the page says.

Only paths and ports are replaced, by those of the test.
"""

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from tests.mosquitto import a_broker, watching

from .stage import TIMING, Agent, Coordinator, Stage, free_port, until
from .test_story import private_network

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "config/recipes"
ENOUGH_HEARTBEATS = 3
"""A member that could take the role back would have it after so many."""


def member(
    stage: Stage,
    name: str,
    recipe: str,
    endpoint: str,
    places: Mapping[str, object],
    *flags: str,
    before: Sequence[str] = (),
) -> Agent:
    """An agent with the settings of a recipe; ``places`` replaces its paths and ports."""
    text = (RECIPES / recipe).read_text()
    for place, ours in places.items():
        assert place in text, place
        text = text.replace(place, str(ours))
    config = stage.directory / f"{name}.toml"
    config.write_text(text)
    found = re.search(r'state_file = "(.*)"', text)
    state_file = Path(found[1]) if found else stage.directory / f"{name}.json"
    words = [
        "run",
        f"--config={config}",
        f"--group={stage.group}",
        f"--session-id={name}",
        f"--endpoint={endpoint}",
        *([] if found else [f"--state-file={state_file}"]),
        *TIMING,
        *flags,
    ]
    return stage.adopt(Agent(name, *stage.spawn(name, *words, before=before), state_file))


def sample(stage: Stage, path: str) -> Path:
    """A copy of a file of config/, in a directory that nobody else can write to."""
    copy = stage.directory / Path(path).name
    if not copy.exists():
        shutil.copy(ROOT / "config" / path, copy)
    return copy


def program(stage: Stage, name: str, text: str) -> Path:
    path = stage.directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def start(stage: Stage, *command: object) -> subprocess.Popen[bytes]:
    """A program of a recipe, until the end of the test."""
    # `make test` sets PYTHONSAFEPATH, and a recipe imports its neighbour.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    argv = [sys.executable, *map(str, command)]
    popen = stage.enter(subprocess.Popen(argv, cwd=RECIPES, env=kept))
    stage.later(popen.kill)
    return popen


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def until_line(path: Path, first: str) -> None:
    """Until a line of the file begins with that word."""
    until(lambda: any(line[0] == first for line in lines(path)), f"{first} in {path}")


def span(path: Path, epoch: str) -> tuple[int, int]:
    """When an epoch was written first and last, on the monotonic clock."""
    times = [int(line[1]) for line in lines(path) if line[0] == epoch]
    return times[0], times[-1]


@pytest.mark.parametrize("name", ["warm-standby", "publish-file"])
def test_shellcheck_finds_nothing_in_a_script(name: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs: shellcheck: apt-get install shellcheck")
    command = ["shellcheck", str(RECIPES / name)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


# -- standby ---------------------------------------------------------------------------------------


def hot_host(stage: Stage, name: str, coordinator: Coordinator) -> tuple[Agent, Path]:
    """The collector, which runs on every host, and its agent; where it writes."""
    output, port = stage.directory / f"{name}.output", free_port()
    collector = start(stage, RECIPES / "hot_collector.py", port, output)
    until(output.exists, "the collector to start")
    fence = program(stage, f"{name}-fence", f"exec kill -KILL {collector.pid}")
    places = {
        "/etc/failover-agent/hooks/webhook": sample(stage, "hooks/webhook"),
        "9300": port,
        "/usr/bin/systemctl": fence,
    }
    until(lambda: listens(port), "the collector to listen")
    return member(stage, name, "hot.toml", coordinator.endpoint, places), output


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_hot_standby_activates_the_collector_that_runs_already(
    stage: Stage, coordinator: Coordinator
) -> None:
    one, output = hot_host(stage, "host-a", coordinator)
    one.until_role("Primary")
    until_line(output, "1")
    _, other_output = hot_host(stage, "host-b", coordinator)
    assert lines(other_output) == []
    assert one.end() == 0
    until_line(other_output, "2")
    assert span(output, "1")[1] < span(other_output, "2")[0]


def hot_primary(stage: Stage, coordinator: Coordinator) -> tuple[Agent, Path, int]:
    """A primary whose collector writes: the agent, what is written, and the collector's process id."""
    agent, output = hot_host(stage, "host-a", coordinator)
    agent.until_role("Primary")
    until_line(output, "1")
    (collector,) = re.findall(r"-KILL (\d+)", (stage.directory / "host-a-fence").read_text())
    return agent, output, int(collector)


def test_hot_standby_fences_a_collector_that_does_not_answer(
    stage: Stage, coordinator: Coordinator
) -> None:
    agent, _, collector = hot_primary(stage, coordinator)
    os.kill(collector, signal.SIGSTOP)
    assert agent.end() == 40
    stat = Path(f"/proc/{collector}/stat").read_text()
    assert stat.rpartition(")")[2].split()[0] == "Z"


def test_hot_standby_releases_the_role_when_the_collector_was_restarted_inactive(
    stage: Stage, coordinator: Coordinator
) -> None:
    _, output, collector = hot_primary(stage, coordinator)
    (port,) = re.findall(r":(\d+)/role", (stage.directory / "host-a.toml").read_text())[:1]
    os.kill(collector, signal.SIGKILL)
    until(lambda: not listens(int(port)), "the collector to end")
    start(stage, RECIPES / "hot_collector.py", port, output)
    until_line(output, "2")


WARM = """echo prepared
until [ -e "$1" ]; do sleep 0.02; done
exec python3 -S -c 'import sys, time
while True:
    print(sys.argv[1], time.monotonic_ns(), flush=True)
    time.sleep(0.02)' "$(cat "$1")" "$0 $1"
"""


def warm_host(stage: Stage, name: str, coordinator: Coordinator) -> tuple[Agent, Path]:
    run_dir = stage.directory / name
    run_dir.mkdir()
    places = {
        "/etc/failover-agent/hooks/warm-standby": sample(stage, "recipes/warm-standby"),
        "/usr/local/bin/collector": program(stage, "collector", WARM),
        "/run/collector": run_dir,
    }
    return member(stage, name, "warm.toml", coordinator.endpoint, places), run_dir / "output"


def test_warm_standby_prepares_before_it_works_and_stops_before_the_next(
    stage: Stage, coordinator: Coordinator
) -> None:
    one, output = warm_host(stage, "host-a", coordinator)
    one.until_role("Primary")
    until_line(output, "1")
    assert lines(output)[0] == ["prepared"]
    other, other_output = warm_host(stage, "host-b", coordinator)
    other.until_said("joined")
    assert lines(other_output) == []
    one.end(signal.SIGKILL)
    until_line(other_output, "2")
    assert lines(other_output)[0] == ["prepared"]
    assert span(output, "1")[1] < span(other_output, "2")[0]


def test_warm_standby_releases_the_role_when_the_program_has_ended(
    stage: Stage, coordinator: Coordinator
) -> None:
    agent, output = warm_host(stage, "host-a", coordinator)
    agent.until_role("Primary")
    until_line(output, "1")
    go = output.with_name("go")
    subprocess.run(["pkill", "-KILL", "-f", f"/collector {go}"], check=True)
    until_line(output, "2")


def test_cold_standby_starts_the_collector_on_the_primary_only(
    stage: Stage, coordinator: Coordinator
) -> None:
    output = stage.directory / "output"
    text = f'while sleep 0.02; do echo "$FAILOVER_SESSION $FAILOVER_EPOCH" >>{output}; done'
    places = {"/usr/local/bin/collector": program(stage, "collector", text)}
    one = member(stage, "host-a", "cold.toml", coordinator.endpoint, places)
    until_line(output, "host-a")
    other = member(stage, "host-b", "cold.toml", coordinator.endpoint, places)
    other.until_said("joined")
    assert one.end() == 0
    until_line(output, "host-b")
    written = lines(output)
    assert written == sorted(written)
    assert {tuple(line) for line in written} == {("host-a", "1"), ("host-b", "2")}


# -- what a host owns -----------------------------------------------------------------------------


def test_the_virtual_address_is_on_the_primary_only(stage: Stage) -> None:
    inside = private_network(stage)
    subprocess.run(
        [*inside, "ip", "link", "add", "left", "type", "veth", "peer", "name", "right"], check=True
    )
    for device in ("left", "right"):
        subprocess.run([*inside, "ip", "link", "set", device, "up"], check=True)
    coordinator = stage.process("coordinator", "serve", "--store=memory", before=inside)
    coordinator.until_said("coordinator listening")
    endpoint = "http://127.0.0.1:5470/api/v1/clientfailover"
    places = {"/etc/failover-agent/hooks/virtual-ip": sample(stage, "hooks/virtual-ip")}

    def devices() -> list[str]:
        listed = [*inside, "ip", "-o", "address", "show", "to", "192.0.2.10"]
        said = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
        return [line.split()[1] for line in said.splitlines()]

    def host(name: str, device: str) -> Agent:
        """An agent with a network device of its own."""
        ours = places | {"eth0": device}
        return member(stage, name, "virtual-ip.toml", endpoint, ours, before=inside)

    one = host("host-a", "left")
    one.until_role("Primary")
    assert devices() == ["left"]
    other = host("host-b", "right")
    other.until_said("joined")
    assert one.end() == 0
    other.until_role("Primary")
    assert devices() == ["right"]


def test_the_recipe_for_a_systemd_unit_is_what_two_booted_hosts_run() -> None:
    """test_systemd.py types docs/operations.md, "Five minutes", on them."""
    page = (ROOT / "docs/operations.md").read_text()
    section = page.partition("## Five minutes")[2].partition("\n## ")[0]
    assert (RECIPES / "systemd-unit.toml").read_text() in section


def test_a_sidecar_stops_by_itself_when_agent_and_guard_are_dead(
    stage: Stage, coordinator: Coordinator
) -> None:
    agents, outputs = [], []
    for name in ("host-a", "host-b"):
        state_file, output = stage.directory / f"{name}.state", stage.directory / f"{name}.output"
        start(stage, RECIPES / "sidecar_collector.py", state_file, output)
        places = {"/run/failover-agent/state.json": state_file}
        agent = member(stage, name, "sidecar.toml", coordinator.endpoint, places, "--no-guard")
        agents.append(agent)
        outputs.append(output)
        agents[0].until_role("Primary")
        agent.until_said("joined")
    until_line(outputs[0], "1")
    agents[0].end(signal.SIGKILL)
    until_line(outputs[1], "2")
    assert span(outputs[0], "1")[1] < span(outputs[1], "2")[0]


# -- fencing by epoch ------------------------------------------------------------------------------

Write = Callable[[int, str, float], None]
"""Runs fence-write.sql with an epoch, a time and a value."""


@contextlib.contextmanager
def sqlite(directory: Path) -> Iterator[tuple[Write, Callable[[], list[tuple[Any, ...]]]]]:
    with contextlib.closing(sqlite3.connect(directory / "db", isolation_level=None)) as database:
        database.executescript((RECIPES / "fence-schema.sql").read_text())
        text = re.sub("--.*", "", (RECIPES / "fence-write.sql").read_text())

        def write(epoch: int, at: str, value: float) -> None:
            for statement in text.split(";"):
                database.execute(
                    statement, {"name": "line-7", "epoch": epoch, "at": at, "value": value}
                )

        yield write, lambda: database.execute("SELECT * FROM readings ORDER BY at").fetchall()


def postgresql_bin() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found and shutil.which("psql") else None


@contextlib.contextmanager
def postgresql(_: Path) -> Iterator[tuple[Write, Callable[[], list[tuple[Any, ...]]]]]:
    """A server of our own, as the user postgres where we are root: it refuses to run as root."""
    programs = postgresql_bin()
    assert programs is not None
    with tempfile.TemporaryDirectory() as folder:
        user = "postgres" if os.geteuid() == 0 else None
        if user:
            shutil.chown(folder, user)
        as_user: dict[str, Any] = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL}
        initdb = [str(programs / "initdb"), "--no-sync", "--auth=trust", "--username=postgres"]
        subprocess.run([*initdb, f"--pgdata={folder}/data"], check=True, **as_user)
        serve = [str(programs / "postgres"), "-D", f"{folder}/data", "-k", folder, "-F"]
        with subprocess.Popen(
            [*serve, "-c", "listen_addresses="], stderr=subprocess.DEVNULL, **as_user
        ) as server:

            def psql(*words: str) -> str:
                base = ["psql", "-X", "-q", "-A", "-t", "-h", folder, "-U", "postgres"]
                return subprocess.run(
                    [*base, "-v", "ON_ERROR_STOP=1", *words],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout

            def is_up() -> bool:
                with contextlib.suppress(subprocess.CalledProcessError):
                    return psql("-c", "SELECT 1") == "1\n"
                return False

            def write(epoch: int, at: str, value: float) -> None:
                given = {"name": "'line-7'", "epoch": epoch, "at": f"'{at}'", "value": value}
                words = [word for name, it in given.items() for word in ("-v", f"{name}={it}")]
                psql(*words, "-f", str(RECIPES / "fence-write.sql"))

            def readings() -> list[tuple[Any, ...]]:
                rows = psql("-c", "SELECT * FROM readings ORDER BY at").splitlines()
                cells = [row.split("|") for row in rows]
                return [(at, float(value), int(epoch)) for at, value, epoch in cells]

            try:
                until(is_up, "PostgreSQL to start")
                psql("-f", str(RECIPES / "fence-schema.sql"))
                yield write, readings
            finally:
                server.send_signal(signal.SIGINT)


@pytest.mark.parametrize("database", [sqlite, *([postgresql] if postgresql_bin() else [])])
def test_a_database_takes_no_reading_of_an_old_epoch(
    tmp_path: Path,
    database: Callable[
        [Path],
        contextlib.AbstractContextManager[tuple[Write, Callable[[], list[tuple[Any, ...]]]]],
    ],
) -> None:
    with database(tmp_path) as (write, readings):
        write(1, "12:00:00", 20.5)
        write(2, "12:00:01", 21.5)
        write(1, "12:00:01", 99.5)
        write(1, "12:00:02", 99.5)
        write(2, "12:00:02", 22.5)
        assert readings() == [
            ("12:00:00", 20.5, 1),
            ("12:00:01", 21.5, 2),
            ("12:00:02", 22.5, 2),
        ]


def post(port: int, epoch: int, reading: str) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", reading.encode())
    request.add_header("X-Failover-Epoch", str(epoch))
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except HTTPError as error:
        error.close()
        return error.code


def test_an_http_receiver_refuses_an_old_epoch_after_a_restart_too(stage: Stage) -> None:
    port, output = free_port(), stage.directory / "output"
    command = (RECIPES / "http_receiver.py", port, stage.directory / "fence", output)
    receiver = start(stage, *command)
    until(lambda: listens(port), "the receiver to listen")
    assert post(port, 1, "a") == HTTPStatus.NO_CONTENT
    assert post(port, 2, "b") == HTTPStatus.NO_CONTENT
    receiver.kill()
    receiver.wait()
    start(stage, *command)
    until(lambda: listens(port), "the receiver to listen again")
    assert post(port, 1, "late") == HTTPStatus.CONFLICT
    assert post(port, 2, "c") == HTTPStatus.NO_CONTENT
    assert lines(output) == [["a"], ["b"], ["c"]]


def test_two_fences_in_one_directory_write_no_common_file(tmp_path: Path) -> None:
    other = tmp_path / "line.new"
    other.write_text("being written")
    fence = runpy.run_path(str(RECIPES / "fence.py"))["Fence"](tmp_path / "line.7")
    assert fence.admits(3)
    assert (tmp_path / "line.7").read_text() == "3"
    assert other.read_text() == "being written"


def test_an_mqtt_consumer_ignores_an_old_epoch(stage: Stage) -> None:
    with a_broker(stage.directory) as broker:
        broker.start()
        with watching(broker) as producer:
            output = stage.directory / "output"

            def send(epoch: int, value: str) -> None:
                message = json.dumps({"epoch": epoch, "value": value}).encode()
                producer.publish("line-7/readings", message)

            send(1, "a")
            fence = stage.directory / "fence"
            start(
                stage, RECIPES / "mqtt_consumer.py", broker.port, "line-7/readings", fence, output
            )
            until_line(output, "a")
            for epoch, value in ((2, "b"), (1, "late"), (2, "c")):
                send(epoch, value)
            until_line(output, "c")
            assert lines(output) == [["a"], ["b"], ["c"]]


def test_shared_storage_keeps_a_late_file_out_of_the_new_epochs_directory(tmp_path: Path) -> None:
    shared, ready = tmp_path / "shared", tmp_path / "readings.csv"

    def publish(epoch: int, text: str) -> int:
        ready.write_text(text)
        command = [RECIPES / "publish-file", ready, shared]
        env = {"PATH": os.environ["PATH"], "FAILOVER_EPOCH": str(epoch)}
        return subprocess.run(command, env=env, check=False, capture_output=True).returncode

    assert [publish(9, "old"), publish(10, "new"), publish(9, "late")] == [0, 0, 1]
    found = {path.parent.name: path.read_text() for path in sorted(shared.glob("*/*"))}
    assert list(found.values()) == ["old", "new"]
    assert sorted(found) == [f"{9:016d}", f"{10:016d}"]


# -- who is chosen ---------------------------------------------------------------------------------


def heard(coordinator: Coordinator, session: str, times: int) -> None:
    """Until the coordinator has had so many more heartbeats of a session."""
    path = f"groups/{coordinator.group}/clientsessions/{session}"
    seen: set[str] = set()

    def enough() -> bool:
        said = coordinator.ask("GET", path).body
        seen.add(said["Heartbeat"].get("HeartbeatTime", ""))
        return len(seen) > times

    until(enough, f"heartbeats of {session}")


def test_the_preferred_member_is_chosen_and_does_not_take_the_role_back(stage: Stage) -> None:
    """Its id is the last, so it is not chosen for its id; no minimum hold keeps it from swapping."""
    coordinator = stage.serve("--minimum-hold=0")

    def run(name: str, recipe: str) -> Agent:
        return member(stage, name, recipe, coordinator.endpoint, {})

    first = run("host-a", "other-member.toml")
    first.until_role("Primary")
    run("host-b", "other-member.toml").until_said("joined")
    preferred = run("host-z", "preferred-member.toml")
    preferred.until_said("joined")
    heard(coordinator, "host-z", ENOUGH_HEARTBEATS)
    assert coordinator.status()["Primary"] == "host-a"
    assert first.end() == 0
    preferred.until_role("Primary")
    assert preferred.end() == 0
    until(lambda: coordinator.status().get("Primary") == "host-b", "host-b to take over")
    run("host-z", "preferred-member.toml").until_said("joined")
    heard(coordinator, "host-z", ENOUGH_HEARTBEATS)
    assert coordinator.status()["Primary"] == "host-b"


# -- back-fill -------------------------------------------------------------------------------------


class Source:
    """A file that gets a line every few milliseconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.times: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._feed)
        path.touch()
        self._thread.start()

    def _feed(self) -> None:
        with self.path.open("a", buffering=1) as file:
            while not self._stop.wait(0.01):
                moment = datetime.now(UTC).isoformat()
                self.times.append(moment)
                file.write(f"{moment} {len(self.times)}\n")

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def test_a_successor_fills_in_what_came_while_nobody_was_primary(
    stage: Stage, coordinator: Coordinator
) -> None:
    source, output = Source(stage.directory / "source"), stage.directory / "output"
    stage.later(source.stop)
    places = {
        "/usr/bin/python3": sys.executable,
        "/usr/local/lib/backfill_collector.py": RECIPES / "backfill_collector.py",
        "/srv/source": source.path,
        "/srv/output": output,
    }
    one = member(stage, "host-a", "backfill.toml", coordinator.endpoint, places)
    until(lambda: coordinator.status().get("LastDataProcessedTime"), "a time to be reported")
    other = member(stage, "host-b", "backfill.toml", coordinator.endpoint, places)
    other.until_said("joined")
    one.end(signal.SIGKILL)
    until(lambda: any(line[-1] == "2" for line in lines(output)), "host-b to write")
    source.stop()
    until(lambda: {line[0] for line in lines(output)} >= set(source.times), "every line")
    again = len(lines(output)) - len(source.times)
    assert again < len(source.times) / 2, "host-b began at the beginning"
