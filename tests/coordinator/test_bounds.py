"""What callers may send before they are known, and how long they may take: raw sockets, real processes."""

import itertools
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from agent.coordinator.limits import MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED
from tests.mosquitto import Authority

from .conftest import Process
from .raw import (
    BASE,
    HEALTH,
    TIMES,
    Raw,
    ask,
    crowd,
    peak,
    program,
    reset_peak,
    resident,
    took_s,
    until,
)

pytestmark = pytest.mark.long

MIB = 1 << 20
GROUP = {"Id": "g", "FailoverTimeout": "00:00:10"}
UNREAD = b"x" * 65536


@pytest.fixture(scope="module")
def hurried() -> Iterator[Process]:
    """A coordinator whose deadlines are a few seconds."""
    process = Process("--store", "memory", program=program())
    yield process
    process.process.terminate()
    code, log = process.end()
    assert code == 0
    assert "Traceback" not in log


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("trust"))


@pytest.fixture(scope="module")
def over_tls(trust: Authority) -> Iterator[Process]:
    certificate, key = trust.issue("coordinator")
    files = ("--tls-certificate", str(certificate), "--tls-key", str(key))
    process = Process("--store", "memory", *files, program=program())
    yield process
    process.process.terminate()
    code, log = process.end()
    assert code == 0
    assert "Traceback" not in log


def send_until_closed(one: Raw, parts: Iterator[bytes]) -> int:
    """Send until the coordinator resets the connection or sends an answer; the bytes sent."""
    sent = 0
    one.socket.settimeout(0)
    with suppress(ConnectionResetError, BrokenPipeError):
        for part in parts:
            try:
                one.socket.sendall(part)
            except BlockingIOError:
                time.sleep(0.001)
            sent += len(part)
            if sent > MIB:
                with suppress(BlockingIOError):
                    if one.socket.recv(1, socket.MSG_PEEK):
                        break
    one.socket.settimeout(20)
    return sent


def send_for_ever(one: Raw) -> None:
    """Send a chunked body, for as long as the coordinator reads it."""
    for part in itertools.chain.from_iterable(itertools.repeat(list(chunks(16384)))):
        one.send(part)


# -- heads ----------------------------------------------------------------------------------------


def test_a_header_of_64_mib_is_refused_and_takes_no_memory(hurried: Process) -> None:
    process = hurried.process.pid
    before = resident(process)
    with Raw(hurried.url) as one:
        one.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        send_until_closed(one, itertools.repeat(UNREAD, 1024))
        grown = resident(process) - before
        slowest_s = max(took_s(lambda: ask(hurried.url)) for _ in range(5))
        answer = one.answer()
    assert (answer.status, answer.error()["Error"]) == (431, "HeadTooLarge")
    assert answer.headers["connection"] == "close"
    assert grown < 8 * MIB
    assert slowest_s < 1


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (f"GET /healthz HTTP/1.1\r\nAuthorization: Bearer {'t' * 16384}\r\n", 200),
        (f"GET /healthz HTTP/1.1\r\nX: {'x' * MAX_HEAD_BYTES}\r\n", 431),
        (f"GET /{'x' * MAX_HEAD_BYTES} HTTP/1.1\r\n", 431),
        ("GET /healthz HTTP/1.1\r\n" + "X: 1\r\n" * MAX_HEADERS, 200),
        ("GET /healthz HTTP/1.1\r\n" + "X: 1\r\n" * (MAX_HEADERS + 1), 431),
    ],
    ids=["a long token", "a long header", "a long path", "many headers", "too many headers"],
)
def test_a_head_above_its_bound_is_431(hurried: Process, head: str, status: int) -> None:
    with Raw(hurried.url) as one:
        answer = one.send(head.encode() + b"\r\n").answer()
    assert answer.status == status
    if status != 200:
        answer.error()


def test_the_size_does_not_depend_on_how_a_head_is_cut(hurried: Process) -> None:
    head = b"GET /healthz HTTP/1.1\r\nX: " + b"x" * (MAX_HEAD_BYTES - 1000) + b"\r\n\r\n"
    with Raw(hurried.url) as one:
        one.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            for begin in range(0, len(head), 4096):
                one.send(head[begin : begin + 4096])
            assert one.answer().status == 200


def test_trailers_are_bounded_and_no_headers(hurried: Process) -> None:
    post = b"POST %s/groups HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b'2d\r\n{"Id":"trailed","FailoverTimeout":"00:00:10"}\r\n0\r\n'
    with Raw(hurried.url) as one:
        one.send(post % BASE.encode() + chunk + b"X: 1\r\n\r\n")
        assert one.answer().status == 201
        one.send(post % BASE.encode() + chunk + b"X: 1\r\n" * 2 * MAX_HEAD_BYTES)
        assert one.answer().status in {200, 431}
        assert one.closed()


# -- what is no request ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/3.7\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: elsewhere\r\n\r\n",
        b"GET nowhere HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\x00b\r\n\r\n",
    ],
)
def test_what_is_no_request_is_400_in_the_form_of_all_errors(hurried: Process, data: bytes) -> None:
    with Raw(hurried.url) as one:
        answer = one.send(data).answer()
        assert one.closed()
    assert (answer.status, answer.error()["Error"]) == (400, "Invalid")
    assert answer.headers["connection"] == "close"
    assert answer.headers["date"]


def test_garbage_after_a_request_is_answered_after_it(hurried: Process) -> None:
    with Raw(hurried.url) as one:
        one.send(HEALTH + b"\x00garbage\r\n\r\n")
        assert [one.answer().status for _ in range(2)] == [200, 400]
        assert one.closed()


def test_garbage_in_a_body_is_400(hurried: Process) -> None:
    head = f"POST {BASE}/groups HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with Raw(hurried.url) as one:
        answer = one.send(head.encode() + b"no length\r\n").answer()
        assert one.closed()
    assert (answer.status, answer.error()["Error"]) == (400, "Invalid")


def test_callers_cannot_fill_the_log(hurried: Process) -> None:
    before = len(hurried.lines)
    for _ in range(200):
        with Raw(hurried.url) as one:
            one.send(b"garbage " + b"x" * 2000 + b"\r\n\r\n").answer()
    for upgrade in ("websocket", "h2c"):
        for _ in range(20):
            headers = f"Connection: Upgrade\r\nUpgrade: {upgrade}\r\n"
            with Raw(hurried.url) as one:
                assert one.request("GET", "/healthz", headers=headers).answer().status == 200
    ask(hurried.url)
    lines = hurried.lines[before:]
    assert len(lines) < 10
    assert all(len(line) < 500 for line in lines)


# -- times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\r\n", b"GE", HEALTH[:-2]], ids=repr)
def test_a_connection_on_which_no_head_ends_is_closed(hurried: Process, data: bytes) -> None:
    with Raw(hurried.url) as one:
        one.send(data)
        if data.strip():
            answer = one.answer()
            assert (answer.status, answer.error()["Error"]) == (408, "TooSlow")
        assert one.closed()


def test_a_head_that_comes_byte_by_byte_has_the_same_deadline(hurried: Process) -> None:
    with Raw(hurried.url) as one:
        one.socket.settimeout(0.1)
        one.send(b"GET / HTTP/1.1\r\nX: ")
        began = time.monotonic()
        while True:
            with suppress(TimeoutError):
                assert one.answer().status == 408
                break
            one.send(b"x")
        assert time.monotonic() - began < TIMES["HEAD_S"] + 5


def test_a_head_that_comes_too_slowly_after_a_request_is_408_as_well(hurried: Process) -> None:
    with Raw(hurried.url) as one:
        assert one.send(HEALTH).answer().status == 200
        assert one.send(HEALTH[:10]).answer().status == 408
        assert one.closed()


def test_an_idle_connection_is_closed_and_one_in_use_is_not(hurried: Process) -> None:
    with Raw(hurried.url) as idle, Raw(hurried.url) as used:
        assert idle.send(HEALTH).answer().status == 200
        end = time.monotonic() + TIMES["IDLE_S"] + 1.5
        while time.monotonic() < end:
            assert used.send(HEALTH).answer().status == 200
            time.sleep(0.3)
        idle.socket.settimeout(0.1)
        assert idle.closed()


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_does_not_come_is_408(hurried: Process, framing: str) -> None:
    head = f"POST {BASE}/groups HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n"
    with Raw(hurried.url) as one:
        answer = one.send(head.encode()).answer()
        assert one.closed()
    assert (answer.status, answer.error()["Error"]) == (408, "TooSlow")


def test_a_body_that_nobody_waits_for_holds_no_connection(hurried: Process) -> None:
    """The route takes no body: the answer is sent at once, and the rest of the body has a deadline."""
    with Raw(hurried.url) as one:
        one.send(b"GET /healthz HTTP/1.1\r\nContent-Length: 100\r\n\r\n")
        assert one.answer().status == 200
        assert one.closed()


def test_a_long_read_outlasts_all_deadlines(hurried: Process) -> None:
    """What a caller waits for on purpose is no fault of its own."""
    with Raw(hurried.url) as one:
        assert one.request("POST", f"{BASE}/groups", GROUP | {"Id": "long"}).answer().status == 201
        wait_s = TIMES["IDLE_S"] + 2
        path = f"{BASE}/groups/long/status?after=1&wait=00:00:{wait_s:02.0f}"
        status = one.request("GET", f"{BASE}/groups/long/status").answer()
        revision = status.body.partition(b'"Revision":')[2].split(b",")[0].decode()
        took = took_s(lambda: one.request("GET", path.replace("=1", f"={revision}", 1)).answer())
        assert took > wait_s - 1
        assert one.send(HEALTH).answer().status == 200


# -- bodies ---------------------------------------------------------------------------------------


def chunks(size: int) -> Iterator[bytes]:
    return itertools.repeat(b"%x\r\n%s\r\n" % (size, b"x" * size), 64 * MIB // size)


def test_a_chunked_body_without_an_end_is_413(hurried: Process) -> None:
    process = hurried.process.pid
    before = resident(process)
    with Raw(hurried.url) as one:
        one.send(b"POST %s/groups HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" % BASE.encode())
        send_until_closed(one, chunks(16384))
        answer = one.answer()
    assert (answer.status, answer.error()["Error"]) == (413, "TooLarge")
    assert resident(process) - before < 8 * MIB


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_body_of_a_route_without_one_is_not_read_for_ever(hurried: Process, method: str) -> None:
    with Raw(hurried.url) as one:
        one.send(b"%s /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" % method.encode())
        assert one.answer().status in {200, 405}
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_for_ever(one)


def test_the_extensions_of_a_chunk_have_an_end(hurried: Process) -> None:
    with Raw(hurried.url) as one:
        one.send(b"POST %s/groups HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" % BASE.encode())
        one.send(b"1;")
        sent = send_until_closed(one, itertools.repeat(UNREAD, 1024))
        answer = one.answer()
    assert sent < 64 * MIB
    assert answer.status == 400
    answer.error()


def test_a_body_that_is_announced_too_long_is_refused_before_it_is_sent(hurried: Process) -> None:
    head = f"POST {BASE}/groups HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n"
    with Raw(hurried.url) as one:
        answer = one.send(head.encode() + b"Expect: 100-continue\r\n\r\n").answer()
    assert (answer.status, answer.error()["Error"]) == (413, "TooLarge")


def test_a_refused_body_does_not_destroy_its_answer(hurried: Process) -> None:
    """A close with bytes unread is a reset, which discards what the peer has not read yet."""
    head = f"POST {BASE}/groups HTTP/1.1\r\nHost: localhost\r\nContent-Length: {4 * MIB}\r\n\r\n"
    with Raw(hurried.url) as one:
        one.send(head.encode() + b"x" * 4 * MIB)
        assert one.answer().status == 413


def test_100_continue_is_sent_when_the_body_is_wanted(hurried: Process) -> None:
    head = f"POST {BASE}/groups HTTP/1.1\r\nHost: localhost\r\nContent-Length: 46\r\nExpect: 100-continue\r\n\r\n"
    with Raw(hurried.url) as one:
        assert one.send(head.encode()).answer(bodyless=True).status == 100
        one.send(b'{"Id":"awaited","FailoverTimeout":"00:00:10"} ')
        assert one.answer().status == 201
        assert one.send(head.encode()).answer(bodyless=True).status == 100
        assert one.answer().status == 408


# -- several requests, and other protocols --------------------------------------------------------


def test_pipelined_requests_are_answered_in_order(hurried: Process) -> None:
    paths = [f"/nothing/{number}" for number in range(MAX_PIPELINED)]
    with Raw(hurried.url) as one:
        one.send(b"".join(f"GET {path} HTTP/1.1\r\n\r\n".encode() for path in paths))
        for path in paths:
            assert path in one.answer().error()["Reason"]
        assert one.send(HEALTH).answer().status == 200


def test_many_pipelined_requests_are_all_answered_and_take_no_memory(hurried: Process) -> None:
    """Some of a megabyte are parsed, the rest waits in the kernel."""
    process = hurried.process.pid
    before = resident(process)
    reset_peak(process)
    count = 5000
    with Raw(hurried.url) as one:
        one.request("POST", f"{BASE}/groups", GROUP | {"Id": "piped"}).answer()
        status = one.request("GET", f"{BASE}/groups/piped/status").answer()
        revision = status.body.partition(b'"Revision":')[2].split(b",")[0].decode()
        one.request("GET", f"{BASE}/groups/piped/status?after={revision}&wait=00:00:02")
        data = b"POST /nothing/%05d HTTP/1.1\r\nContent-Length: 2\r\n\r\nxx"
        thread = threading.Thread(
            target=one.send, args=(b"".join(data % number for number in range(count)),)
        )
        thread.start()
        assert one.answer().status == 200
        waiting = peak(process) - before
        for number in range(count):
            assert f"/nothing/{number:05}" in one.answer().error()["Reason"]
        thread.join()
    assert waiting < 4 * MIB
    assert resident(process) - before < 8 * MIB


def test_http_1_0_is_answered_and_closed(hurried: Process) -> None:
    with Raw(hurried.url) as one:
        answer = one.send(b"GET /healthz HTTP/1.0\r\n\r\n").answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert one.closed()


@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "TLS/1.0"])
def test_a_request_for_an_upgrade_is_answered_without_one(hurried: Process, upgrade: str) -> None:
    headers = f"Connection: Upgrade\r\nUpgrade: {upgrade}\r\n"
    with Raw(hurried.url) as one:
        answer = one.request("GET", "/healthz", headers=headers).answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert one.closed()
    with Raw(hurried.url) as one:
        body = GROUP | {"Id": upgrade.replace("/", "")}
        answer = one.request("POST", f"{BASE}/groups", body, headers).answer()
        assert (answer.status, answer.headers["connection"]) == (400, "close")
        assert answer.error()["Resolution"] == "Omit Upgrade."
        assert one.closed()


# -- answers that are not read --------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True])
def test_a_caller_that_reads_no_answers_is_cut_off(
    hurried: Process, over_tls: Process, trust: Authority, *, tls: bool
) -> None:
    process = over_tls if tls else hurried
    before = resident(process.process.pid)
    request = b"GET /openapi.json HTTP/1.1\r\n\r\n"
    with Raw(process.url, trust=trust.file if tls else None) as one:
        ended = threading.Event()

        def send() -> None:
            with suppress(OSError):
                while True:
                    one.send(request)
                    time.sleep(0.001)
            ended.set()

        thread = threading.Thread(target=send)
        thread.start()
        assert ended.wait(60)
        thread.join()
        assert resident(process.process.pid) - before < 8 * MIB
        page = ask(process.url, "/metrics", trust=trust.file if tls else None).body
    assert b'connections_ended_total{reason="answer_timeout"} 0.0' not in page


def test_few_unauthenticated_callers_may_leave_their_answers_unread(
    serve: Callable[..., Process],
) -> None:
    """Whatever the deadline is: each may hold a page of its own."""
    process = serve(program=program(ANSWER_S=600.0, MAX_STALLED=4))
    with Raw(process.url) as known, crowd(process.url, 12) as stalled:
        known.request("POST", f"{BASE}/groups", GROUP).answer()
        for one in [known, *stalled]:
            one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.send(b"GET /openapi.json HTTP/1.1\r\n\r\n" * 200)
        until(lambda: b'reason="answer_timeout"} 8.0' in ask(process.url, "/metrics").body)
        assert known.answer().status == 200


# -- TLS ------------------------------------------------------------------------------------------


def test_a_tls_handshake_has_a_deadline(over_tls: Process) -> None:
    for data in (b"", b"\x16\x03\x01\x02\x00\x01"):
        with Raw(over_tls.url) as one:
            one.send(data)
            assert took_s(one.closed) < TIMES["HANDSHAKE_S"] + 5


def test_what_is_no_tls_is_closed_and_logged_once(over_tls: Process, trust: Authority) -> None:
    before = len(over_tls.lines)
    for _ in range(50):
        with Raw(over_tls.url) as one:
            one.send(HEALTH)
            with suppress(AssertionError, OSError):
                one.answer()
    assert ask(over_tls.url, trust=trust.file).status == 200
    assert len(over_tls.lines) - before < 5


def test_the_bounds_hold_over_tls_too(over_tls: Process, trust: Authority) -> None:
    with Raw(over_tls.url, trust=trust.file) as one:
        one.send(b"GET / HTTP/1.1\r\nX: ")
        with suppress(OSError):
            for _ in range(8):
                one.send(UNREAD)
        assert one.answer().status == 431
    with Raw(over_tls.url, trust=trust.file) as one:
        assert one.send(b"GET / HT").answer().status == 408


# -- its end --------------------------------------------------------------------------------------


def test_a_stop_waits_for_no_connection_that_does_nothing(
    serve: Callable[..., Process], trust: Authority
) -> None:
    """Silent ones, half a head, an idle one, one that reads nothing, and half a handshake."""
    certificate, key = trust.issue("stopped")
    process = serve("--tls-certificate", str(certificate), "--tls-key", str(key))
    with crowd(process.url, 4, trust=trust.file) as crowded, Raw(process.url):
        _silent, half, idle, deaf = crowded
        half.send(b"GET ")
        idle.send(HEALTH).answer()
        deaf.send(b"GET /openapi.json HTTP/1.1\r\n\r\n" * 16)
        process.process.terminate()
        began = time.monotonic()
        code, log = process.end()
    assert code == 0
    assert "Traceback" not in log
    assert time.monotonic() - began < 15


def test_a_freeze_of_the_process_closes_no_connection(hurried: Process) -> None:
    with Raw(hurried.url) as one:
        assert one.send(HEALTH).answer().status == 200
        hurried.process.send_signal(signal.SIGSTOP)
        time.sleep(TIMES["IDLE_S"] + 0.5)
        one.send(HEALTH)
        hurried.process.send_signal(signal.SIGCONT)
        assert one.answer().status == 200
