"""Real coordinators and agents on loopback: started, watched, signalled and ended.

Owns the processes that it starts and one folder. Hooks are shell scripts that append to one file,
``events``, together with what a test itself notes there, so that the order of things that happen in
different processes can be read from it. Knows nothing of what is right.
"""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
P = TypeVar("P", bound="Process")

PATIENCE_S = 30.0
"""Many failover timeouts: what has not happened by then, even on a busy machine, will not."""

LOOK_S = 0.02
TIMING = ("--failover-timeout=2", "--demote=0.6", "--margin=0.4")
"""Quick, and with a margin that a busy machine does not use up: R is 1 s."""

HOOK = """#!/bin/sh
facts=$(cat)
echo "{name} begin {event} $facts" >> {events}
cat /proc/$$/environ > {environment}.new
mv {environment}.new {environment}
{body}
echo "{name} end {event} $facts" >> {events}
"""

EVENTS = ("primary", "pending_primary", "secondary")


def until(condition: Callable[[], T | None], what: str, patience_s: float = PATIENCE_S) -> T:
    """The first true value of ``condition``; fails with ``what`` if there is none in time."""
    end_at = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < end_at, f"waited {patience_s:g} s in vain for {what}"
        time.sleep(LOOK_S)
    return value


def free_port() -> int:
    """A port that is free, and that no outgoing connection takes while nothing listens on it."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def lives(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def environment(**more: str) -> dict[str, str]:
    """Ours, without settings of whoever runs the tests."""
    return {k: v for k, v in os.environ.items() if not k.startswith("FAILOVER_")} | more


@dataclass(frozen=True)
class Said:
    """An answer over HTTP; ``body`` is the JSON in it, or None."""

    status: int
    headers: Mapping[str, str]
    body: Any


def ask(method: str, url: str, body: object = None, **headers: str) -> Said:
    """One request, with these headers beside the Content-Type. A body of bytes is sent as it is."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        text = answer.read()
        received = {name.lower(): value for name, value in answer.getheaders()}
        return Said(answer.status, received, json.loads(text) if text else None)


@dataclass
class Process:
    """One process of ours; its stderr is in a file."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    log_begins: int

    def said(self) -> str:
        """All that this process, and none before it of the same name, wrote on stderr."""
        return self.log.read_bytes()[self.log_begins :].decode()

    def lines(self, *words: str, after: int = 0) -> list[str]:
        """Lines of the log, from a position on, that have one of these words."""
        return [line for line in self.said()[after:].splitlines() if any(w in line for w in words)]

    def until_said(self, text: str, after: int = 0) -> None:
        def found() -> bool:
            assert text in self.said()[after:] or self.popen.poll() is None, self.said()
            return text in self.said()[after:]

        until(found, f"{self.name} to say {text!r}")

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self) -> int:
        return self.popen.wait(PATIENCE_S)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.send(number)
        return self.wait()


@dataclass
class Coordinator(Process):
    """``failover-agent serve``."""

    endpoint: str
    group: str

    def ask(self, method: str, path: str, body: object = None) -> Said:
        return ask(method, f"{self.endpoint}/{path}", body)

    def status(self) -> dict[str, Any]:
        return dict(self.ask("GET", f"groups/{self.group}/status").body)

    def history(self) -> list[dict[str, Any]]:
        """The tenures, oldest first."""
        return list(reversed(self.ask("GET", f"groups/{self.group}/history").body))

    def tenure(self, epoch: int) -> dict[str, Any]:
        return next(entry for entry in self.history() if entry["Epoch"] == epoch)


@dataclass
class Agent(Process):
    """``failover-agent run``."""

    state_file: Path
    guarded: bool = True

    @property
    def state(self) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            return dict(json.loads(self.state_file.read_text()))
        return {}

    def until_role(self, role: str, *, after_epoch: int = -1) -> dict[str, Any]:
        """The state with that role, and for Primary with a later epoch."""

        def found() -> dict[str, Any] | None:
            assert self.popen.poll() is None, "it has ended"
            state = self.state
            fits = state.get("role") == role and state["pid"] == self.popen.pid
            fits = fits and (role != "Primary" or (state["epoch"] or 0) > after_epoch)
            return state if fits else None

        try:
            return until(found, f"{self.name} to be {role} after epoch {after_epoch}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.said()}") from None


@dataclass(frozen=True)
class Happened:
    """One line of ``events``: who, what, of which hook, with which facts."""

    who: str
    what: str
    which: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


class Stage:
    """Everything that one test starts. As a context manager it leaves nothing behind."""

    def __init__(self, directory: Path, group: str = "line-7") -> None:
        self.directory = directory
        self.group = group
        self.events_file = directory / "events"
        self.events_file.touch()
        self._processes: list[Process] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.popen.poll() is None:
                process.send(signal.SIGCONT)
                process.end(signal.SIGKILL)
        self._stack.close()

    def enter(self, manager: contextlib.AbstractContextManager[T]) -> T:
        """Keep something until the end of the test."""
        return self._stack.enter_context(manager)

    def later(self, act: Callable[[], object]) -> None:
        """Do this at the end of the test."""
        self._stack.callback(act)

    def adopt(self, process: P) -> P:
        """End a process at the end of the test, if it still runs then."""
        self._processes.append(process)
        return process

    def spawn(
        self, name: str, *command: str, before: Sequence[str] = (), **variables: str
    ) -> tuple[subprocess.Popen[bytes], Path, int]:
        """Start the command line, ``before`` being what starts it."""
        log = self.directory / f"{name}.log"
        with log.open("ab") as file:
            begins = file.tell()
            popen = subprocess.Popen(
                [*before, sys.executable, "-m", "agent", *command],
                cwd=self.directory,
                env=environment(**variables),
                stdin=subprocess.DEVNULL,
                stderr=file,
            )
        return popen, log, begins

    def process(
        self, name: str, *command: str, before: Sequence[str] = (), **variables: str
    ) -> Process:
        """Any command of ours."""
        return self.adopt(Process(name, *self.spawn(name, *command, before=before, **variables)))

    def serve(self, *flags: str, port: int | None = None, store: str = "memory") -> Coordinator:
        """Start a coordinator and wait until it listens; the same port to start it again."""
        port = port or free_port()
        words = (f"--listen=127.0.0.1:{port}", f"--store={store}", *flags)
        words = (*words, f"--data-dir={self.directory / 'data'}")
        name = f"coordinator-{port}"
        endpoint = f"http://127.0.0.1:{port}/api/v1/clientfailover"
        coordinator = Coordinator(name, *self.spawn(name, "serve", *words), endpoint, self.group)
        self.adopt(coordinator)
        coordinator.until_said("coordinator listening")
        return coordinator

    def run(
        self,
        name: str,
        *endpoints: str | Coordinator,
        flags: Sequence[str] = (),
        timing: Sequence[str] = TIMING,
        **bodies: str,
    ) -> Agent:
        """Start an agent whose three hooks record; ``bodies`` is what they do beside that."""
        state_file = self.directory / f"{name}.json"
        urls = [e.endpoint if isinstance(e, Coordinator) else e for e in endpoints]
        hooks = {event: self.hook(name, event, bodies.get(event, "")) for event in EVENTS}
        words = [
            f"--group={self.group}",
            f"--session-id={name}",
            f"--state-file={state_file}",
            *(f"--endpoint={url}" for url in urls),
            *(f"--hook-{event.replace('_', '-')}={path}" for event, path in hooks.items()),
            *timing,
            *flags,
        ]
        guarded = "--no-guard" not in words
        return self.adopt(Agent(name, *self.spawn(name, "run", *words), state_file, guarded))

    def hook(self, name: str, event: str, body: str = "") -> Path:
        """A script that records, does ``body``, and records its end."""
        path = self.directory / f"{name}-{event}"
        text = HOOK.format(
            name=name,
            event=event,
            body=body,
            events=self.events_file,
            environment=self.environment_file(name, event),
        )
        beside = path.with_suffix(".new")  # the guard of an agent that was killed may run it now
        beside.write_text(text)
        beside.chmod(0o700)
        return beside.replace(path)

    def environment_file(self, name: str, event: str) -> Path:
        """What the last run of a hook was given as its environment."""
        return self.directory / f"{name}-{event}.environ"

    def note(self, who: str, what: str, which: str = "") -> None:
        """Put something of the test's own among the events."""
        with self.events_file.open("a") as events:
            events.write(f"{who} {what} {which} {{}}\n")

    def events(self, who: str | None = None) -> list[Happened]:
        """What has happened so far, in order."""
        found = []
        for line in self.events_file.read_text().splitlines():
            name, what, which, facts = line.split(" ", 3)
            if who in (None, name):
                # the guard runs a hook without the facts on stdin
                found.append(Happened(name, what, which, json.loads(facts or "{}")))
        return found

    def until_event(self, who: str, what: str, which: str) -> Happened:
        def found() -> Happened | None:
            fitting = (e for e in self.events(who) if (e.what, e.which) == (what, which))
            return next(fitting, None)

        return until(found, f"{who} {what} {which}")

    def pair(self, endpoint: str | Coordinator, *flags: str) -> tuple[Agent, Agent, int]:
        """Two agents: the primary, the other one, and the epoch. Both have joined."""
        agents = [self.run(name, endpoint, flags=flags) for name in ("host-a", "host-b")]
        one = self.until_primary(*agents, after_epoch=0)
        other = agents[agents[0] is one]
        other.until_said("joined")
        return one, other, one.state["epoch"]

    def until_primary(self, *agents: Agent, after_epoch: int) -> Agent:
        """Whichever becomes Primary under a later epoch."""

        def found() -> Agent | None:
            for agent in agents:
                assert agent.popen.poll() is None, agent.said()
                state = agent.state
                if state.get("role") == "Primary" and (state["epoch"] or 0) > after_epoch:
                    return agent
            return None

        return until(found, f"a primary after epoch {after_epoch}")

    def kill(self, agent: Agent) -> None:
        """SIGKILL to an agent; if no guard demotes in its place, its workload is taken to go too."""
        agent.end(signal.SIGKILL)
        if not agent.guarded:
            self.note(agent.name, "killed")

    def check_promise(self) -> list[int]:
        """Never two active, epochs increase: of all hooks that ran. The epochs in their order.

        Active is a host from the beginning of its promotion hook to the end of its demotion hook.
        """
        active: set[str] = set()
        epochs = []
        for event in self.events():
            match event.what, event.which:
                case "begin", "primary":
                    assert active <= {event.who}, f"{event.who} became active beside {active}"
                    active.add(event.who)
                    epochs.append(event.facts["epoch"])
                case ("end", "secondary") | ("killed", _):
                    active.discard(event.who)
                case _:
                    pass
        assert epochs == sorted(set(epochs)), f"epochs do not increase: {epochs}"
        return epochs


class Relay:
    """A reverse proxy that notes each request among the events of a stage."""

    def __init__(self, stage: Stage, upstream: str) -> None:
        parts = urlsplit(upstream)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def relay(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                stage.note("relay", self.command, self.path.partition("?")[0].rpartition("/")[2])
                assert parts.hostname is not None
                to = http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE_S)
                with contextlib.closing(to), contextlib.suppress(OSError):
                    kept = {"Content-Type": self.headers.get("Content-Type") or "text/plain"}
                    to.request(self.command, self.path, content, kept)
                    answer = to.getresponse()
                    text = answer.read()
                    self.send_response(answer.status)
                    for name, value in answer.getheaders():
                        if name.lower() not in {"content-length", "server", "date"}:
                            self.send_header(name, value)
                    if answer.status != http.HTTPStatus.NO_CONTENT:
                        self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)

            do_GET = do_POST = do_DELETE = relay  # noqa: N815 - the names that http.server calls

            def log_message(self, *_: object) -> None:
                pass

        self._server = listening(stage, Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}{parts.path}"


class Gate:
    """A way to a server that can be shut: connections are cut and refused then, at the same address."""

    def __init__(self, stage: Stage, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self._port = free_port()
        self._open: list[socket.socket] = []
        self._server: socket.socket | None = None
        self.endpoint = f"{parts.scheme}://127.0.0.1:{self._port}{parts.path}"
        self.open()
        stage.later(self.close)

    def open(self) -> None:
        """Let connections through."""
        self._server = socket.create_server(("127.0.0.1", self._port))
        Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def close(self) -> None:
        """Cut what is there, and refuse what comes."""
        server, self._server = self._server, None
        for end in [*([server] if server else []), *self._open]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = server.accept()
                try:
                    far = socket.create_connection(self._upstream)
                except OSError:  # the server is down
                    near.close()
                    continue
                self._open += [near, far]
                for ends in ((near, far), (far, near)):
                    Thread(target=self._copy, args=ends, daemon=True).start()

    def _copy(self, from_: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := from_.recv(65536):
                to.sendall(data)
        for end in (from_, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class _QuietServer(ThreadingHTTPServer):
    """Clients that are killed, or give up, are part of the tests: no traceback for them."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def listening(stage: Stage, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    """An HTTP server in threads, until the end of the test."""
    server = _QuietServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    stage.later(server.server_close)
    stage.later(thread.join)
    stage.later(server.shutdown)
    return server
