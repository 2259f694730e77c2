"""Which requests are those of pages of other sites."""

import pytest

from agent.ops.browsers import MOST_HOSTS, BrowserCheck, is_json

HOST = (b"host", b"coordinator.example:5470")
OWN = b"http://coordinator.example:5470"
Headers = list[tuple[bytes, bytes]]


def refusal(*headers: tuple[bytes, bytes], scheme: str = "http", page: bool = False) -> str | None:
    return BrowserCheck().refusal([HOST, *headers], scheme, page=page)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"user-agent", b"curl/8"), (b"accept", b"*/*")],
        [(b"origin", OWN)],
        [(b"origin", b"HTTP://Coordinator.Example:5470")],
        [(b"origin", b"https://coordinator.example:5470")],  # of a proxy before the service
        [(b"sec-fetch-site", b"same-origin"), (b"sec-fetch-mode", b"cors")],
        [(b"sec-fetch-site", b"none"), (b"sec-fetch-mode", b"navigate")],
        [(b"origin", OWN), (b"sec-fetch-site", b"same-origin")],
    ],
)
def test_programs_and_pages_of_the_service_itself_are_answered(headers: Headers) -> None:
    assert refusal(*headers) is None


@pytest.mark.parametrize(
    ("headers", "shown"),
    [
        ([(b"origin", b"https://evil.example")], "https://evil.example"),
        ([(b"origin", b"http://coordinator.example")], "Origin"),
        ([(b"origin", b"null")], "null"),
        ([(b"origin", b"")], "Origin"),
        ([(b"origin", OWN + b".evil.example")], "evil.example"),
        ([(b"sec-fetch-site", b"cross-site")], "cross-site"),
        ([(b"sec-fetch-site", b"same-site")], "same-site"),
        ([(b"sec-fetch-site", b"what else there may be")], "what else"),
        ([(b"origin", OWN), (b"sec-fetch-site", b"same-site")], "same-site"),
        ([(b"origin", b"http://evil.example"), (b"sec-fetch-site", b"same-origin")], "evil"),
        ([(b"access-control-request-method", b"POST")], "preflight"),
        ([(b"origin", OWN), (b"access-control-request-method", b"GET")], "preflight"),
        ([(b"origin", b"x" * 5000)], "x" * 100),
        ([(b"origin", b"a\r\x1b[1mb")], "a??[1mb"),
    ],
)
def test_pages_of_other_sites_are_refused(headers: Headers, shown: str) -> None:
    reason = refusal(*headers)
    assert reason is not None
    assert shown in reason
    assert len(reason) < 300


def test_an_unencrypted_page_may_not_use_the_encrypted_service() -> None:
    assert refusal((b"origin", OWN), scheme="https") is not None


LINK = [
    (b"sec-fetch-site", b"cross-site"),
    (b"sec-fetch-mode", b"navigate"),
    (b"sec-fetch-dest", b"document"),
]


def test_a_link_leads_to_a_page_for_people_and_to_nothing_else() -> None:
    assert refusal(*LINK, page=True) is None
    assert refusal(*LINK) is not None
    framed = [*LINK[:2], (b"sec-fetch-dest", b"iframe")]
    assert refusal(*framed, page=True) is not None


@pytest.mark.parametrize(
    "host",
    [
        b"127.0.0.1",
        b"127.0.0.1:5470",
        b"127.1.2.3:1",
        b"localhost",
        b"LocalHost:5470",
        b"localhost.:5470",
        b"line-7.localhost:80",
        b"[::1]:5470",
        b"[::1]",
        b"",
        b"coordinator.example:5470",
    ],
)
def test_on_loopback_its_names_and_the_configured_ones_are_answered(host: bytes) -> None:
    check = BrowserCheck(loopback=True, names=["Coordinator.example"])
    for _ in range(2):  # the second time it is known
        assert check.refusal([(b"host", host)], "http") is None


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"evil.example:5470",
        b"127.0.0.1.evil.example:5470",
        b"localhost.evil.example",
        b"evil",
        b"10.0.0.1:5470",
        b"0.0.0.0:5470",
        b"[::]:5470",
        b"[::1",
        b"coordinator.example.evil.example",
    ],
)
def test_on_loopback_any_other_name_is_refused(host: bytes) -> None:
    """DNS rebinding: a page of that name was loaded from elsewhere, and then the name was changed."""
    check = BrowserCheck(loopback=True, names=["coordinator.example"])
    own = [(b"host", host), (b"origin", b"http://" + host), (b"sec-fetch-site", b"same-origin")]
    for _ in range(2):
        reason = check.refusal(own, "http")
        assert reason is not None
        assert "Host" in reason
    assert BrowserCheck().refusal(own, "http") is None


def test_a_request_without_a_host_is_answered() -> None:
    """HTTP/1.0, as HAProxy's checks are; a browser always sends it."""
    assert BrowserCheck(loopback=True).refusal([], "http") is None


def test_the_known_hosts_are_bounded() -> None:
    check = BrowserCheck(loopback=True)
    for port in range(2 * MOST_HOSTS):
        assert check.refusal([(b"host", f"127.0.0.1:{port}".encode())], "http") is None
    # memory is the only effect of the bound
    assert len(check._hosts) == MOST_HOSTS


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        b"application/json",
        b"Application/JSON; charset=UTF-8",
        b"application/merge-patch+json",
    ],
)
def test_a_content_type_of_json_in_utf_8_is_recognised(content_type: bytes | None) -> None:
    assert is_json(content_type)


@pytest.mark.parametrize(
    "content_type",
    [
        b"",
        b"text/plain",
        b"text/plain; application/json",
        b"application/x-www-form-urlencoded",
        b"multipart/form-data; boundary=x",
        b"application/json; charset=latin-1",
        b"text/json",
    ],
)
def test_what_a_page_can_send_without_asking_is_no_json(content_type: bytes) -> None:
    assert not is_json(content_type)
