"""The signature by which a coordinator vouches for a client that is known by its certificate."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from agent.coordinator import forwarded_clients
from agent.coordinator.auth import ClientCertificate
from agent.coordinator.calls import FORWARDED, Request
from agent.coordinator.forwarded_clients import CLIENT, WINDOW, ForwardedClients
from agent.errors import NotLeading, Unauthenticated

KEY = bytes(range(32))
OTHER = bytes(range(1, 33))
ANN = ClientCertificate("host a/ß", 2_000_000_000.0)
PLAIN = Request("POST", b"/groups/g/clientsessions/a/heartbeat?a=b", [], b'{"FailoverScore":1}')


def signed(number: int = 1, certificate: ClientCertificate = ANN, receiver: str = "7") -> Request:
    """A request as the leader gets it."""
    name = f"run-{number:x}".encode()
    value = ForwardedClients((KEY,)).sign(certificate, PLAIN, name, receiver)
    return replace(PLAIN, headers=[(b"host", b"x"), (FORWARDED, name), (CLIENT, value)])


@pytest.fixture
def leader() -> ForwardedClients:
    return ForwardedClients((KEY,))


def test_the_leader_gets_the_client_as_it_was_verified(leader: ForwardedClients) -> None:
    request = signed()
    assert leader.read(replace(request, body=b""), "7") == ANN, "before the body has come"
    assert leader.read(request, "7") == ANN, "a second time"
    leader.accept_once(request)


def test_nobody_is_vouched_for_without_the_header(leader: ForwardedClients) -> None:
    assert leader.read(PLAIN, "7") is None
    leader.accept_once(PLAIN)


def test_an_authorization_header_takes_precedence(leader: ForwardedClients) -> None:
    request = signed()
    request = replace(request, headers=[*request.headers, (b"authorization", b"Basic x")])
    assert leader.read(request, "7") is None
    leader.accept_once(request)


def header_of(request: Request, name: bytes) -> bytes:
    return dict(request.headers)[name]


def with_header(request: Request, name: bytes, value: bytes) -> Request:
    return replace(request, headers=[*(h for h in request.headers if h[0] != name), (name, value)])


def with_client(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Request], Request]:
    """Another header CLIENT, from the parts of the right one: receiver, until, name, digest, signature."""

    def changed(request: Request) -> Request:
        parts = header_of(request, CLIENT).split(b" ")
        return with_header(request, CLIENT, b" ".join(change(parts)))

    return changed


def test_a_key_is_replaced_without_a_request_that_is_refused() -> None:
    """Coordinators take up each step at different times: before and after it, everybody accepts everybody."""
    steps = [(KEY,), (KEY, OTHER), (OTHER, KEY), (OTHER,)]
    for number, both in enumerate(itertools.pairwise(steps)):
        for sender, receiver in (both, both[::-1]):
            name = b"run-%x" % number
            value = ForwardedClients(sender).sign(ANN, PLAIN, name, "7")
            request = replace(PLAIN, headers=[(FORWARDED, name), (CLIENT, value)])
            assert ForwardedClients(receiver).read(request, "7") == ANN
    value = ForwardedClients((KEY,)).sign(ANN, PLAIN, b"run-1", "7")
    former = replace(PLAIN, headers=[(FORWARDED, b"run-1"), (CLIENT, value)])
    with pytest.raises(Unauthenticated):
        ForwardedClients((OTHER,)).read(former, "7")


@pytest.mark.parametrize(
    "forge",
    [
        lambda r: replace(r, method="DELETE"),
        lambda r: replace(r, target=b"/groups/h/clientsessions/a/heartbeat?a=b"),
        lambda r: replace(r, target=r.target + b"c"),
        lambda r: with_header(r, FORWARDED, b"run-2"),
        lambda r: replace(r, headers=[h for h in r.headers if h[0] != FORWARDED]),
        lambda r: with_header(r, CLIENT, b""),
        lambda r: with_header(r, CLIENT, b"7 1 admin"),
        lambda r: with_header(r, CLIENT, b"\xff\xfe \xff"),
        with_client(lambda p: [*p[:2], b"admin", *p[3:]]),
        with_client(lambda p: [p[0], b"9999999999", *p[2:]]),
        with_client(lambda p: [b"8", *p[1:]]),
        with_client(lambda p: [*p[:3], b"0" * 64, p[4]]),
        with_client(lambda p: [*p[:4], b"0" * 64]),
        with_client(lambda p: p[:4]),
        with_client(lambda p: [*p[:4], b""]),
        with_client(lambda p: [*p, p[4]]),
        lambda r: with_header(
            r, CLIENT, ForwardedClients((b"another",)).sign(ANN, PLAIN, b"run-1", "7")
        ),
        lambda r: with_header(r, CLIENT, ForwardedClients((b"",)).sign(ANN, PLAIN, b"run-1", "7")),
    ],
)
def test_a_forged_header_is_refused(
    leader: ForwardedClients, forge: Callable[[Request], Request]
) -> None:
    request = signed()
    with pytest.raises(Unauthenticated):
        leader.read(forge(request), "7")
    assert leader.read(request, "7") == ANN


def test_another_body_is_refused(leader: ForwardedClients) -> None:
    for body in (b"", b"{}", PLAIN.body + b" "):
        request = replace(signed(), body=body)
        assert leader.read(request, "7") == ANN, "the body is not there yet"
        with pytest.raises(Unauthenticated):
            leader.accept_once(request)
    leader.accept_once(signed())


def test_a_copied_request_is_refused(leader: ForwardedClients) -> None:
    leader.accept_once(signed(1))
    leader.accept_once(signed(3))
    leader.accept_once(signed(2))
    for number in (1, 2, 3):
        with pytest.raises(Unauthenticated):
            leader.accept_once(signed(number))
    leader.accept_once(signed(WINDOW))
    leader.accept_once(signed(4))
    leader.accept_once(signed(3 * WINDOW))
    for number in (1, 5, WINDOW, 2 * WINDOW, 3 * WINDOW):
        with pytest.raises(Unauthenticated):
            leader.accept_once(signed(number))
    leader.accept_once(signed(2 * WINDOW + 1))


def test_a_header_for_another_session_of_a_coordinator_is_of_no_use(
    leader: ForwardedClients,
) -> None:
    """The sender tries again: this coordinator has lost its leadership meanwhile."""
    for member in ("8", ""):
        with pytest.raises(NotLeading):
            leader.read(signed(receiver="7"), member)
    with pytest.raises(NotLeading):
        leader.read(signed(receiver=""), "")


def test_the_senders_that_are_remembered_are_bounded(
    leader: ForwardedClients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarded_clients, "MAX_SENDERS", 3)

    def take(run: str, number: int | str) -> None:
        name = f"{run}-{number}".encode()
        value = leader.sign(ANN, PLAIN, name, "7")
        leader.accept_once(replace(PLAIN, headers=[(FORWARDED, name), (CLIENT, value)]))

    take("a", 1)
    for other in "bcdef":
        take(other, 1)
        take("a", ord(other) - 90)
    for remembered in "aef":
        with pytest.raises(Unauthenticated):
            take(remembered, 1)
    take("b", 1)  # forgotten: nobody uses it any more
    for number in ("", "x", "1" * 17):
        with pytest.raises(Unauthenticated):
            take("g", number)


def test_the_numbers_of_one_sender_take_a_bounded_memory(leader: ForwardedClients) -> None:
    for number in (1, WINDOW - 1, WINDOW, 5 * WINDOW - 3, 16**15):
        leader.accept_once(signed(number))
        # memory is the only effect of the window
        assert leader._senders[b"run"].bits.bit_length() <= WINDOW
