"""One request and its answer over HTTP, or one ServerError with the reason.

Owns the timeout of a request and the classification of every failure of a server: ``send`` raises
nothing but a ServerError, or cancellation. Knows nothing of groups, roles, leases or tokens.

A ServerError's ``status`` is that of an answer of the API itself. It is None when no answer came
and when something else answered, so ``status == 404`` always means "gone", never a wrong address.
A 429 keeps its status whoever sent it; its exit code is NOT_THE_API if it was not the API.
"""

import asyncio
import json
import math
import os
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import Any

import httpx2

from agent.drivers.rest.connections import HTTP_HINT, UnfitAnswerError
from agent.errors import ExitCode, ServerError
from agent.ops.logs import Log, one_line

LONGEST_RETRY_AFTER_S = 300.0
"""Upper limit of Retry-After: after a repair an operator waits for five minutes at most."""

LONGEST_QUOTE = 300
"""Characters of a server's own words in a message, so that it stays one readable line."""

LONGEST_CHAIN = 32
"""How many causes of an exception are followed, as the chain could be circular."""

LAST_PORT = 65535
OPERATION_ID = "operation-id"

_parse_url = lru_cache(maxsize=16)(httpx2.URL)
"""Caches parsed URLs, as heartbeats go to the same one again and again."""

quoted = partial(one_line, most=LONGEST_QUOTE)
"""Makes a server's text fit for a message."""

log = Log(__name__)

_PROBLEM_FIELDS = ("title", "detail")
"""The readable fields of a ProblemDetails body (RFC 9457), which ASP.NET sends."""

_ERROR_FIELDS = ("OperationId", "Error", "Reason", "Resolution")


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, of whatever status.

    Attributes:
        what: the request, as the subject of a message: "heartbeat of session a".
    """

    what: str
    url: str
    status: int
    headers: httpx2.Headers
    body: bytes

    @property
    def date(self) -> datetime | None:
        """When the answer was made, by the server's clock in whole seconds; None without a Date header."""
        try:
            return _date(self.headers["date"])
        except (KeyError, ValueError, TypeError, OverflowError):
            return None

    def error(
        self,
        problem: str,
        right: str,
        exit_code: ExitCode,
        *,
        of_the_api: bool = True,
    ) -> ServerError:
        """Build the error for this answer, with its status and Retry-After."""
        error = _error(
            self.what,
            self.url,
            problem,
            right,
            exit_code,
            status=self.status if of_the_api else None,
            retry_after_s=retry_after_s(self.headers),
        )
        error.has_operation_id = OPERATION_ID in self.headers
        return error

    def not_the_api(self, problem: str) -> ServerError:
        """Build the error for an answer that does not come from the group API."""
        return self.error(
            problem,
            "the endpoint must be the base path of a group API, up to clientfailover",
            ExitCode.NOT_THE_API,
            of_the_api=False,
        )

    def check(self) -> None:
        """Return if the status is one of success.

        Raises:
            ServerError: NOT_AUTHORISED for 401 and 403; REFUSED for a refusal of the API and for
                5xx; NOT_THE_API for a redirect, a page, or a 4xx with neither an ErrorResponse nor
                ProblemDetails. Its status is None then, but for 429: something on the way that
                limits requests is obeyed, too.
        """
        if self.status // 100 == 2:  # noqa: PLR2004 - the class of success
            return
        quote = self._quote_error()
        if self.status == httpx2.codes.PROXY_AUTHENTICATION_REQUIRED:
            right = "check proxy, proxy_username and proxy_password_file"
            problem = "is behind a proxy that wants a user and password (407)"
            raise self.error(problem, right, ExitCode.NOT_AUTHORISED, of_the_api=False)
        if self.status in {401, 403}:
            problem = f"answered {self.status} ({quote})"
            right = "check the credentials and the rights of this client on the group"
            raise self.error(problem, right, ExitCode.NOT_AUTHORISED)
        if self.status // 100 == 3:  # noqa: PLR2004 - the class of redirects
            target = quoted(self.headers.get("location", "nowhere"))
            raise self.not_the_api(f"redirects ({self.status}) to {target}, which is not followed")
        if self.status == httpx2.codes.TOO_MANY_REQUESTS and not self._is_error_response():
            right = "look for a proxy or balancer on the way that limits requests"
            problem = f"answered 429 without an ErrorResponse: {quote}"
            raise self.error(problem, right, ExitCode.NOT_THE_API)
        if self.status < 500 and not (self._is_error_response() or self._problem_details()):  # noqa: PLR2004 - as above
            raise self.not_the_api(f"answered {self.status} without an ErrorResponse: {quote}")
        raise self.error(f"answered {self.status}", quote, ExitCode.REFUSED)

    def unreadable(self, why: str) -> ServerError:
        """Build the error for a successful answer whose body does not have the expected shape.

        HALF_BODY for a body without a length that begins like JSON, else NOT_THE_API.
        """
        framed = "content-length" in self.headers or "transfer-encoding" in self.headers
        if not framed and self.body.lstrip()[:1] in {b"{", b"["} and self._json() is None:
            return _incomplete(self.what, self.url, f"after {len(self.body)} bytes")
        return self.not_the_api(f"answered {self.status} with something else: {quoted(why)}")

    def _json(self) -> Any:
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    def _is_error_response(self) -> bool:
        body = self._json()
        if isinstance(body, dict):
            return any(name in body for name in _ERROR_FIELDS)
        return not self.body and OPERATION_ID in self.headers

    def _problem_details(self) -> str:
        """Title and detail of a ProblemDetails body, or nothing."""
        body = self._json()
        kind = self.headers.get("content-type", "").lower()
        if not isinstance(body, dict) or not kind.startswith("application/problem+json"):
            return ""
        words = [body.get(name) for name in _PROBLEM_FIELDS]
        return ": ".join(word for word in words if isinstance(word, str) and word) or "no title"

    def _quote_error(self) -> str:
        if problem := self._problem_details():
            return quoted(problem)
        body = self._json()
        if isinstance(body, dict):
            words = [body.get(name) for name in ("Error", "Reason", "Resolution")]
            text = " ".join(word for word in words[1:] if isinstance(word, str) and word)
            if text or isinstance(words[0], str):
                return quoted(text or str(words[0]))
        return quoted(self.body[: LONGEST_QUOTE * 4].decode("utf-8", "replace")) or "no body"


def fault_of_url(text: str) -> str | None:
    """Why this URL cannot be used, as the end of a sentence; None if it can."""
    try:
        url = httpx2.URL(text)
        url.host.encode("idna")
    except (httpx2.InvalidURL, UnicodeError) as error:
        return f"is no URL ({quoted(str(error))})"
    if url.scheme not in {"http", "https"}:
        return "does not begin with http:// or https://"
    if not url.host:
        return "names no host"
    if url.port is not None and not 0 < url.port <= LAST_PORT:
        return f"names port {url.port}, which is not within 1 and {LAST_PORT}"
    if url.userinfo:
        return "has a user or password in it, for which there are settings"
    return None


def retry_after_s(headers: httpx2.Headers) -> float | None:
    """Seconds to wait by Retry-After (RFC 9110, 10.2.3), from 0 to LONGEST_RETRY_AFTER_S.

    Our coordinator's Retry-After-Ms takes precedence if it is valid: whole seconds are too long for a short
    lease. A date is counted from the answer's own Date, since our clock may be off. Fractions of a second are
    read, too. None if there is no such header, or it is not valid.
    """
    if re.fullmatch(r"\d{1,9}", milliseconds := headers.get("retry-after-ms", "")):
        return min(int(milliseconds) / 1000, LONGEST_RETRY_AFTER_S)
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
            seconds = float(value)
        else:
            date = headers.get("date")
            now = _date(date) if date else datetime.now(UTC)
            seconds = (_date(value) - now).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S) if math.isfinite(seconds) else None


def _date(value: str) -> datetime:
    date = parsedate_to_datetime(value)
    return date if date.tzinfo else date.replace(tzinfo=UTC)


async def send(
    client: httpx2.AsyncClient,
    method: str,
    url: str,
    *,
    what: str,
    timeout_s: float,
    params: Mapping[str, str] | None = None,
    content: bytes | None = None,
    form: Mapping[str, str] | None = None,
) -> Answer:
    """Send one request and return the whole answer, whatever its status.

    Args:
        client: whose connections to use.
        method: of HTTP.
        url: where, without a query.
        what: the subject of messages.
        timeout_s: bounds everything together: connection, credentials, sending, answer.
        params: the query.
        content: a JSON document to send.
        form: fields to send as a form, instead.

    Raises:
        ServerError: UNREACHABLE, NOT_HTTP, NOT_THE_API, HALF_BODY, NO_ANSWER; and what the credentials raise.
    """
    headers_came = False
    try:
        async with asyncio.timeout(timeout_s):
            request = client.build_request(
                method,
                _parse_url(url),
                params=params,
                content=content,
                data=form,
                headers={"Content-Type": "application/json"} if content is not None else None,
                timeout=timeout_s,
            )
            response = await client.send(request, stream=True)
            headers_came = True
            try:
                body = await response.aread()
            finally:
                await response.aclose()
    except ServerError:  # of the credentials
        raise
    except (TimeoutError, httpx2.TimeoutException):
        problem = f"gave no answer within {timeout_s:.3g} s"
        right = "check that the server is healthy and that nothing on the way drops packets"
        raise _error(what, url, problem, right, ExitCode.NO_ANSWER) from None
    except Exception as error:  # any exception of the HTTP stack means that there is no answer
        raise _classify(what, url, error, headers_came=headers_came) from error
    return Answer(what, url, response.status_code, response.headers, body)


def _classify(what: str, url: str, error: Exception, *, headers_came: bool) -> ServerError:
    """The ServerError for an exception raised by a request."""
    root = _root_cause(error)
    if isinstance(error, UnfitAnswerError):
        return _error(what, url, *error.args)
    if not isinstance(error, httpx2.RequestError | OSError):
        kind, reason = type(error).__name__, quoted(str(error))
        log.error(
            "request failed in an unexpected way", what=what, url=url, error=kind, reason=reason
        )
    if isinstance(error, httpx2.ProxyError):
        return _proxy_error(what, url, quoted(str(error)), root)
    if headers_came:
        return _incomplete(what, url, quoted(str(error) or type(error).__name__))
    if isinstance(error, httpx2.ConnectError) or isinstance(root, ssl.SSLError):
        return _unreachable(what, url, root)
    if isinstance(error, httpx2.RemoteProtocolError) and "disconnected" not in str(error):
        problem = f"does not speak HTTP ({quoted(str(error))})"
        return _error(what, url, problem, HTTP_HINT, ExitCode.NOT_HTTP)
    if isinstance(error, httpx2.RequestError | OSError):
        problem = "closed the connection before it answered"
    else:
        problem = f"gave no answer that can be read ({type(error).__name__})"
    return _error(what, url, problem, "look at the server's own log", ExitCode.NO_ANSWER)


def _error(
    what: str,
    url: str,
    problem: str,
    right: str,
    exit_code: ExitCode,
    *,
    status: int | None = None,
    retry_after_s: float | None = None,
) -> ServerError:
    return ServerError(
        f"{what}: {url} {problem}; {right}",
        exit_code=exit_code,
        status=status,
        retry_after_s=retry_after_s,
    )


def _incomplete(what: str, url: str, how: str) -> ServerError:
    problem = f"closed the connection in the middle of its answer ({how})"
    right = "look at the log of the server and of any proxy before it"
    return _error(what, url, problem, right, ExitCode.HALF_BODY)


def _proxy_error(what: str, url: str, why: str, root: BaseException) -> ServerError:
    """Build the error for a proxy that has refused the connection, or does not answer."""
    if why.startswith(str(httpx2.codes.PROXY_AUTHENTICATION_REQUIRED.value)):
        right = "check proxy_username and proxy_password_file"
        return _error(what, url, f"is behind a proxy ({why})", right, ExitCode.NOT_AUTHORISED)
    if isinstance(root, OSError) and root.strerror:
        why = f"{why}: {root.strerror if root.errno is None else os.strerror(root.errno)}"
    problem = f"cannot be reached through the proxy ({why})"
    right = "check proxy, and that it lets this host reach the endpoint"
    return _error(what, url, problem, right, ExitCode.UNREACHABLE)


def _unreachable(what: str, url: str, root: BaseException) -> ServerError:
    match root:
        case socket.gaierror():
            why, right = root.strerror, "check the name of the host"
        case ssl.SSLCertVerificationError():
            why = f"its certificate is not trusted: {root.verify_message}"
            right = "name the CA that signed it, and use a host name that is in the certificate"
        case ssl.SSLError(reason=str(reason)) if "CERTIFICATE_REQUIRED" in reason:
            why = "it asks for a client certificate, and this program has none"
            right = "set client_certificate and client_key, or let the server take a password or a token"
        case ssl.SSLError():
            why = f"TLS failed: {root.reason or root}"
            right = "check that the server speaks TLS on this port, else use http"
        case OSError(errno=int(number)):
            why, right = os.strerror(number), "check the address and that the server runs"
        case _:
            why = str(root) or "the connection was closed while it was being set up"
            right = "check the address and that the server runs"
    problem = f"cannot be reached ({quoted(why or 'no reason given')})"
    return _error(what, url, problem, right, ExitCode.UNREACHABLE)


def proves_credentials(error: ServerError) -> bool:
    """Whether an error proves that the server has accepted the credentials.

    403 does: the caller is known, and does not have the right.
    """
    answered = error.exit_code in {ExitCode.REFUSED, ExitCode.NOT_THE_API}
    return answered or error.status == httpx2.codes.FORBIDDEN


def _root_cause(error: BaseException) -> BaseException:
    """The first cause in the chain of exceptions: the error of the operating system or of OpenSSL."""
    root = error
    for _ in range(LONGEST_CHAIN):
        inner = error.__cause__ or error.__context__
        if isinstance(error, BaseExceptionGroup):
            inner = error.exceptions[0]
        if inner is None:
            break
        error = inner
        if not isinstance(error, ssl.SSLWantReadError | ssl.SSLWantWriteError):  # not a fault
            root = error
    return root
