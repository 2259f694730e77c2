"""Every exception of the project, one class for each different reaction of the caller.

The outermost layer turns one into an exit code (the command line) or into an ErrorResponse
(the coordinator's API); nothing in between catches more than it can handle.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of the process. Documented in docs/exit-codes.md, checked by a test."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    CONFIG_FILE = 10
    CONFIG_UNKNOWN_KEY = 11
    CONFIG_VALUE = 12
    TIMING = 13
    HOOK_MISSING = 14
    HOOK_NOT_EXECUTABLE = 15
    HOOK_WRITABLE = 16
    LISTEN = 17
    SESSION_IN_USE = 18
    STATE_FILE = 19
    UNREACHABLE = 20
    NOT_HTTP = 21
    NOT_THE_API = 22
    HALF_BODY = 23
    NO_ANSWER = 24
    REFUSED = 25
    NOT_AUTHORISED = 26
    OTHER_STORE = 27
    DATA_DIR_READ_ONLY = 30
    DATA_DIR_FULL = 31
    DATA_DIR_LOCKED = 32
    DATA_DIR_NEWER = 33
    DATA_DIR_DAMAGED = 34
    ETCD = 35
    STORE_MOVED = 36
    TASK_FAILED = 38
    GUARD = 39
    DEMOTION_FAILED = 40
    DEMO_CHECK_FAILED = 41
    HOOK_FAILED = 42


NOT_LEADING_RETRY_S = 0.2
"""Retry-After while no leader is known: a handover takes less."""


class FailoverError(Exception):
    """An error that a person can act on: its message names the fault, the place and the remedy.

    Attributes:
        hint: further lines for the same person, or None.
    """

    exit_code: ExitCode = ExitCode.INTERNAL
    hint: str | None = None

    def __init__(self, message: str, *, exit_code: ExitCode | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class ConfigError(FailoverError):
    """A setting, a flag, or a file that one of them names is wrong. Nothing was started.

    Attributes:
        state_file: the agent's state file, if its path is known by then; else empty.
    """

    exit_code = ExitCode.CONFIG_VALUE

    def __init__(
        self, message: str, *, exit_code: ExitCode | None = None, state_file: str = ""
    ) -> None:
        super().__init__(message, exit_code=exit_code)
        self.state_file = state_file


class TimingError(ConfigError):
    """The timings break R1.

    Attributes:
        smallest_lease_s: the shortest FailoverTimeout, in seconds, that the same budgets fit in.
    """

    exit_code = ExitCode.TIMING

    def __init__(self, message: str, *, smallest_lease_s: float) -> None:
        super().__init__(message)
        self.smallest_lease_s = smallest_lease_s


class ServerError(FailoverError):
    """A request to a server got no usable answer; a retry may succeed.

    Attributes:
        retry_after_s: the server's Retry-After, in seconds, or None.
        has_operation_id: whether the answer has the Operation-Id header, which our coordinator always sends.
    """

    exit_code = ExitCode.UNREACHABLE
    has_operation_id = False

    def __init__(
        self,
        message: str,
        *,
        exit_code: ExitCode | None = None,
        retry_after_s: float | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message, exit_code=exit_code)
        self.retry_after_s = retry_after_s
        self.status = status


class StoreError(FailoverError):
    """The store cannot be used. Nothing was changed, except as ``OutcomeUnknown`` describes."""

    exit_code = ExitCode.DATA_DIR_DAMAGED


class OutcomeUnknown(StoreError):  # noqa: N818 - an outcome
    """A change may have happened, or may still happen; ``Store.settle`` finds out."""

    exit_code = ExitCode.ETCD


class LeadershipLost(StoreError):  # noqa: N818 - an outcome
    """Another coordinator leads the group by now (R19). Nothing was changed."""

    exit_code = ExitCode.ETCD


class RequestRefused(FailoverError):  # noqa: N818 - a refusal is an answer, not a fault of ours
    """The coordinator refuses a request and has changed nothing.

    Attributes:
        reason: one sentence with names and values.
        resolution: what the caller can do about it.
    """

    exit_code = ExitCode.REFUSED

    def __init__(self, reason: str, resolution: str) -> None:
        super().__init__(f"{reason} {resolution}")
        self.reason = reason
        self.resolution = resolution


class NotFound(RequestRefused):
    """There is no such group, session or route."""


class Conflict(RequestRefused):
    """The request contradicts the current state."""


class Invalid(RequestRefused):
    """The request itself is wrong."""


class Forbidden(RequestRefused):
    """The caller is authenticated, but does not have the right."""


class Unauthenticated(RequestRefused):
    """The caller is not authenticated."""


class TooSoon(RequestRefused):
    """A heartbeat arrived before the group's minimum interval had passed.

    Attributes:
        retry_after_s: seconds until the next heartbeat is accepted.
    """

    def __init__(self, reason: str, resolution: str, *, retry_after_s: float) -> None:
        super().__init__(reason, resolution)
        self.retry_after_s = retry_after_s


class TooManyAttempts(RequestRefused):
    """Too many passwords from the caller's address were wrong, or are waiting to be checked.

    Attributes:
        retry_after_s: seconds until the next one is checked.
    """

    def __init__(self, reason: str, resolution: str, *, retry_after_s: float) -> None:
        super().__init__(reason, resolution)
        self.retry_after_s = retry_after_s


class Unavailable(RequestRefused):
    """The coordinator cannot make the change durable now, or is shutting down; nothing was changed."""

    def __init__(self, reason: str, resolution: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(reason, resolution)
        self.retry_after_s = retry_after_s


class NotLeading(Unavailable):
    """This coordinator does not lead the group, or not any more (R19); nothing was changed."""

    def __init__(self) -> None:
        super().__init__(
            "This coordinator does not lead the group.",
            "Try again after Retry-After, or ask another endpoint.",
            retry_after_s=NOT_LEADING_RETRY_S,
        )


class CasMismatch(FailoverError):  # noqa: N818 - an outcome, answered by trying again
    """A store's compare-and-set found another version: load, decide and swap again."""


def unavailable(why: str) -> Unavailable:
    """Build the refusal of a request that cannot be served now."""
    return Unavailable(
        f"The coordinator cannot do this now: {why}.", "Try again after Retry-After."
    )
