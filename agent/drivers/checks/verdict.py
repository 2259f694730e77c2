"""The verdict on results: rise and fall of one check, score and fitness of all. No I/O, no clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType

from agent.ops.logs import one_line
from agent.schema.kinds import CheckSettings

REASON_CHARS = 500
"""The most characters of a reason, which goes into log lines and the state file."""

SCORE_DECIMALS = 2

NO_RESULT = "no result yet"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The state of one check.

    Attributes:
        up: whether it passes, by rise and fall; False before the first result.
        since: since when (wall clock, UTC).
        last_error: why its last run failed; None if that succeeded, or was not judged.
        duration_s: how long its last run took, suspended time included.
        known: whether the check has a result, or needs none in this role (scope ``primary``).
        against: runs in a row with the opposite of ``up``.
    """

    up: bool
    since: datetime
    last_error: str | None = None
    duration_s: float = 0.0
    known: bool = True
    against: int = 0

    def after(
        self, check: CheckSettings, error: str | None, duration_s: float, now: datetime
    ) -> "CheckResult":
        """The state after one more run: the first decides alone, later ones by rise and fall."""
        passed = error is None
        ran = replace(self, last_error=error, duration_s=duration_s, known=True, against=0)
        if self.known and passed == self.up:
            return ran
        against = self.against + 1
        if self.known and against < (check.rise if passed else check.fall):
            return replace(ran, against=against)
        return replace(ran, up=passed, since=now)


@dataclass(frozen=True, slots=True)
class Health:
    """How fit this member is.

    Attributes:
        score: FailoverScore, 0 to 100: the configured one, times the share of weights that pass.
        fit: whether it may become or stay primary: False if the share rounds to 0, if a
            required check is down, or while a first result is missing.
        reason: which checks are down and why, in one line.
        results: by name of check.
    """

    score: float
    fit: bool
    reason: str
    results: Mapping[str, CheckResult] = field(default_factory=lambda: MappingProxyType({}))


def judge(
    checks: Sequence[CheckSettings],
    results: Mapping[str, CheckResult],
    failover_score: float = 100.0,
) -> Health:
    """Compute the health from results. Without checks: fit, with the configured score.

    Args:
        checks: what is configured.
        results: of each of them, by name.
        failover_score: the score when all pass, 0 to 100.
    """
    if not checks:
        return Health(failover_score, fit=True, reason="no checks are configured")
    down = [check for check in checks if not results[check.name].up]
    passing = sum(check.weight for check in checks if results[check.name].up)
    share = round(100 * passing / sum(check.weight for check in checks), SCORE_DECIMALS)
    known = all(result.known for result in results.values())
    return Health(
        score=round(failover_score * share / 100, SCORE_DECIMALS),
        fit=known and share > 0 and not any(check.required for check in down),
        reason=one_line(
            "; ".join(_sentence(check, results[check.name]) for check in down), REASON_CHARS
        )
        or "all checks pass",
        results=MappingProxyType(dict(results)),
    )


def _sentence(check: CheckSettings, result: CheckResult) -> str:
    required = " (required)" if check.required else ""
    return f"{check.name}{required}: {result.last_error or 'passes again, not often enough yet'}"
