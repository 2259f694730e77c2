"""One HTTP/1.1 connection of a caller: uvicorn's protocol, with bounds on sizes and times.

Owns when a request is refused before the application sees it, and when the connection ends. A refusal is passed to
the application as a request with ``REFUSAL`` in its scope, so that all errors have the same form. listener.py
accepts connections and has the timer.
"""

import asyncio
from enum import Enum
from math import inf
from typing import Any, Protocol, cast

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from agent.coordinator.auth.certificates import ClientCertificate, certificate_of
from agent.coordinator.hang_up import HUNG_UP, is_closed_by_peer
from agent.coordinator.limits import (
    ANSWER_S,
    BODY_BYTES_PER_S,
    BODY_OVERHEAD,
    BODY_S,
    CLOSE_S,
    HEAD_S,
    IDLE_S,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_PIPELINED,
    PARSED_AT_ONCE,
    Ending,
    HeadTooLarge,
    TooSlow,
)
from agent.errors import Invalid, RequestRefused

REFUSAL = "failover.refusal"
"""Scope key of the RequestRefused with which a request has to be answered."""

ON_AUTHENTICATED = "failover.on_authenticated"
"""Scope key of a callback: the application calls it when a caller on the connection is authenticated."""

CERTIFICATE = "failover.certificate"
"""Scope key of the connection's ClientCertificate, if it has one."""

ASGI = {"version": "3.0", "spec_version": "2.3"}
NOTHING = memoryview(b"")
VERSIONS = frozenset({"1.0", "1.1"})
BODY_HEADERS = frozenset({b"content-length", b"transfer-encoding"})
HEALTH_PATH = b"/healthz"


class Host(Protocol):
    """The part of the listener that a connection uses. ``now``: seconds, updated at each sweep."""

    now: float
    max_body_bytes: int

    def authenticated(self, connection: "Connection") -> None: ...
    def ended(self, connection: "Connection", why: Ending, reason: str = "") -> None: ...
    def lost(self, connection: "Connection") -> None: ...
    def refusal(self, limit: Ending, address: str) -> RequestRefused: ...


class _Reading(Enum):
    """What a connection waits for: a request, or the rest of one."""

    REQUEST = 0
    HEAD = 1
    BODY = 2


class _Refused(Exception):  # noqa: N818 - stops the parser; the refusal is under way
    """Raised in a callback of the parser to refuse the request."""


class _Flow(FlowControl):
    """uvicorn's flow control, which does not resume reading while ``held`` is set."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """uvicorn's connection with bounds.

    Args:
        host: the listener, which is notified of events on the connection.
        config: of uvicorn, loaded.
        state: the connections and requests of the listener.
        address: of the peer, in the form by which connections are counted.

    Attributes:
        spare: the limit that the connection exceeds, so that only /healthz is answered; or None.
        authenticated: whether a caller on the connection was authenticated.
        read_deadline: when on_deadline has to be called unless bytes are received; on ``host.now``.
        write_deadline: the same, unless the peer reads its answer.
    """

    def __init__(
        self,
        host: Host,
        config: uvicorn.Config,
        state: ServerState,
        address: str,
    ) -> None:
        super().__init__(config, state, {})
        self.access_log = False
        self.address = address
        self.spare: Ending | None = None
        self.authenticated = False
        self.read_deadline = self.write_deadline = inf
        self._host = host
        self._reading = _Reading.REQUEST
        self._used = False
        self._received = 0
        self._head_bytes = 0
        self._body_bytes = 0
        self._ignores_input = False
        self._closing = False
        self._made = self._aborted = False
        self._certificate: ClientCertificate | None = None
        self._handshake: asyncio.Task[Any] | None = None
        self._running: RequestResponseCycle | None = None
        self._unparsed = NOTHING

    # -- opening and closing ------------------------------------------------------------------

    def begin(self, handshake: asyncio.Task[Any]) -> bool:
        """Record the task of the TLS handshake; return False if the connection was aborted before."""
        self._handshake = handshake
        return not self._aborted

    def end_handshake(self) -> None:
        """Record that the handshake has succeeded or failed."""
        self._handshake = None

    def abort(self) -> None:
        """Close at once, whatever is in progress."""
        self._aborted = True
        if self._made:
            self.transport.abort()
        elif self._handshake is not None:
            self._handshake.cancel()

    def connection_made(self, transport: Any) -> None:
        if self._aborted:  # during the handshake
            transport.abort()
            return
        self._made = True
        joining = JoiningTransport(transport, self)
        super().connection_made(cast("asyncio.Transport", joining))
        self.flow = self._flow = _Flow(cast("asyncio.Transport", joining))
        self._certificate = certificate_of(transport.get_extra_info("ssl_object"))
        self.read_deadline = self._host.now + HEAD_S

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._made:
            return
        waiting = [cycle for cycle, _ in self.pipeline]
        for cycle in (self._running, *waiting):  # the base class stores only the newest one
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)
        self._host.lost(self)
        # Reference cycles would keep these objects until the next full collection, which is rare.
        cast("JoiningTransport", self.transport).detach()
        self.scope = self.cycle = self._running = None  # type: ignore[assignment] # as before the first request

    def begin_closing(self) -> bool:
        """Read no more. Return whether the peer may still be sending a request."""
        self._closing = self._ignores_input = True
        self.read_deadline = self._host.now + CLOSE_S
        self._unparsed, self._flow.held = NOTHING, False
        self.flow.resume_reading()
        return self._reading is not _Reading.REQUEST

    def on_deadline(self, now: float) -> None:
        """End the request or the connection whose deadline has passed."""
        if self.write_deadline <= now:
            self._host.ended(self, Ending.ANSWER_TIMEOUT)
            self.abort()
        elif self._closing:
            self.abort()
        elif self.flow.read_paused:  # until an earlier request is answered
            self.read_deadline = now + BODY_S
        elif self._reading is _Reading.HEAD:
            self._refuse(
                TooSlow(
                    f"The head of the request was not received within {HEAD_S:g} s.",
                    "Send it at once.",
                ),
                Ending.HEAD_TIMEOUT,
            )
        elif self._reading is _Reading.BODY:
            self._refuse(
                TooSlow(
                    f"The body was not received within {BODY_S:g} s and a second more for each"
                    f" {BODY_BYTES_PER_S} bytes.",
                    "Send as many bytes as Content-Length states, at once.",
                ),
                Ending.BODY_TIMEOUT,
            )
        else:
            self._host.ended(self, Ending.IDLE if self._used else Ending.HEAD_TIMEOUT)
            self.transport.close()

    # -- requests -----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._ignores_input:
            return
        if self._unparsed or len(data) > PARSED_AT_ONCE:
            self._unparsed = memoryview(bytes(self._unparsed) + data)
            self._parse_rest()
        else:
            self._parse(data)

    def _parse_rest(self) -> None:
        """Parse what was received until too many requests wait; then receive no more."""
        while self._unparsed and len(self.pipeline) < MAX_PIPELINED and not self._ignores_input:
            part, self._unparsed = (
                self._unparsed[:PARSED_AT_ONCE],
                self._unparsed[PARSED_AT_ONCE:],
            )
            self._parse(part)
        if self._ignores_input or not self._unparsed:
            self._unparsed = NOTHING  # even an empty slice would keep the whole buffer in memory
        self._flow.held = bool(self._unparsed)
        if self._flow.held:
            self._flow.pause_reading()

    def _parse(self, data: bytes | memoryview) -> None:
        self._received += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # answered like any other request, and then closed
            if any(name in BODY_HEADERS and value != b"0" for name, value in self.headers):
                self._answer_with(
                    Invalid("The request has a body and the header Upgrade.", "Omit Upgrade.")
                )
            self._end_reading()
        except httptools.HttpParserError as error:
            if not self._ignores_input:
                self._refuse(
                    Invalid(f"This is not a request of HTTP/1.1: {error}.", "Send one."),
                    Ending.BAD_REQUEST,
                )
        else:
            if self._reading is _Reading.HEAD and self._received > MAX_HEAD_BYTES:
                self._refuse(_too_large(), Ending.HEAD_SIZE)
            elif self._reading is _Reading.BODY and self._received > (
                MAX_HEAD_BYTES + BODY_OVERHEAD * self._host.max_body_bytes
            ):
                self._refuse(
                    Invalid("The body's chunks are too small.", "Send it in larger ones."),
                    Ending.BODY_SIZE,
                )

    # The callbacks of the parser do not call the base class: each call costs every heartbeat.

    def on_message_begin(self) -> None:
        self._reading = _Reading.HEAD
        self._used = True
        self._received = self._head_bytes = self._body_bytes = 0
        self.read_deadline = self._host.now + HEAD_S
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        scope: Any = {
            "type": "http",
            "asgi": ASGI,
            "http_version": "1.1",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": "",
            "headers": self.headers,
            HUNG_UP: self._hung_up,
        }
        if self._certificate is not None:
            scope[CERTIFICATE] = self._certificate
        if not self.authenticated:
            scope[ON_AUTHENTICATED] = self._on_authenticated
        self.scope = scope

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) >= MAX_HEADERS:
            self._refuse(_too_large(), Ending.HEAD_SIZE)
            raise _Refused
        if self._reading is _Reading.HEAD:  # a field after the body is a trailer, not a header
            name = name.lower()
            self.headers.append((name, value))
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True

    def on_headers_complete(self) -> None:
        """The path stays percent-encoded: the application decodes what it uses of it."""
        if len(self.url) + self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(_too_large(), Ending.HEAD_SIZE)
            raise _Refused
        target = httptools.parse_url(self.url)
        raw_path = target.path or b"/"
        scope = self.scope
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["path"] = raw_path.decode("ascii")
        scope["raw_path"] = raw_path
        scope["query_string"] = target.query or b""
        version = self.parser.get_http_version()
        self._reading = _Reading.BODY
        self.read_deadline = self._host.now + BODY_S
        self._start_cycle(
            keep_alive=self.spare is None and version == "1.1" and self.parser.should_keep_alive()
        )
        if version not in VERSIONS:
            self._answer_with(Invalid(f"This is HTTP/{version}.", "Use HTTP/1.1."))
            self._end_reading()
        elif self.spare is not None and raw_path.rstrip(b"/").lower() != HEALTH_PATH:
            self._answer_with(self._host.refusal(self.spare, self.address))

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()
        self._body_bytes += len(body)
        self.read_deadline += len(body) / BODY_BYTES_PER_S
        if self._body_bytes > self._host.max_body_bytes:  # the application refuses the body
            self._host.ended(self, Ending.BODY_SIZE)
            self._end_reading()
            raise _Refused

    def on_message_complete(self) -> None:
        cycle = self.cycle
        self._reading = _Reading.REQUEST
        if cycle.response_complete:
            self.read_deadline = self._host.now + IDLE_S
            return
        self.read_deadline = inf
        cycle.more_body = False
        cycle.message_event.set()

    def _on_authenticated(self) -> None:
        self.authenticated = True
        self._host.authenticated(self)

    def _hung_up(self) -> bool:
        return is_closed_by_peer(self.transport)

    def _answer_with(self, refusal: RequestRefused) -> None:
        """Have the application answer the newest request with this refusal, unless it has answered."""
        cast("dict[str, Any]", self.scope)[REFUSAL] = refusal

    def _refuse(self, refusal: RequestRefused, why: Ending) -> None:
        """Answer with an error, after the answers to earlier requests, and then close the connection."""
        self._host.ended(self, why, refusal.reason)
        if self._reading is _Reading.BODY:
            self._answer_with(refusal)
            self.cycle.more_body = False
            self.cycle.message_event.set()
            self._end_reading()
            return
        self._ignores_input = True
        self.on_message_begin()
        self.read_deadline = inf  # the answer has a deadline of its own
        scope: Any = self.scope
        scope |= {"method": "GET", "path": "/", "raw_path": b"/", "query_string": b""}
        self._answer_with(refusal)
        self._start_cycle(keep_alive=False)

    def _start_cycle(self, *, keep_alive: bool) -> None:
        """Let the application answer the present request, after those before it."""
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=[],
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=keep_alive,
            on_response=self.on_response_complete,
        )
        if self._running is None or self._running.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def _end_reading(self) -> None:
        """Read no more, and close the connection after the answer to the present request."""
        self._ignores_input = True
        self.read_deadline = inf
        self.cycle.keep_alive = False
        if self.cycle.response_complete:
            self.transport.close()

    # -- answers ------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        task = self.loop.create_task(cycle.run_asgi(app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def on_response_complete(self) -> None:
        """As in the base class, but with a deadline instead of a timer for each request."""
        self.write_deadline = self._host.now + ANSWER_S if self.flow.write_paused else inf
        if self._closing or self.transport.is_closing():
            return
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._reading is _Reading.REQUEST:
            self.read_deadline = self._host.now + IDLE_S
        if self._unparsed:
            self._parse_rest()
        self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.write_deadline == inf:
            self.write_deadline = self._host.now + ANSWER_S

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._running is None or self._running.response_complete:
            self.write_deadline = inf


class JoiningTransport:
    """Sends head and body of an answer together, at the end of the loop iteration in which they were written.

    Uvicorn writes them separately, and uvloop sends the first write at once. Each send is a system call, which
    costs more than making the answer, and wakes the client.
    """

    def __init__(self, transport: Any, connection: Connection) -> None:
        self._transport = transport
        self._connection: Connection | None = connection
        self._unsent: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(data)

    def close(self) -> None:
        """Close when all is sent. While the peer is still sending, only this side is closed: see CLOSE_S."""
        self._flush()
        is_sending = self._connection is not None and self._connection.begin_closing()
        if is_sending and self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()
        else:
            self._transport.close()

    def detach(self) -> None:
        """The connection is lost."""
        self._connection = None

    def _flush(self) -> None:
        if self._unsent and not self._transport.is_closing():
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()


def _too_large() -> HeadTooLarge:
    return HeadTooLarge(
        f"The head of the request has more than {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} headers.",
        "Send a shorter one.",
    )
