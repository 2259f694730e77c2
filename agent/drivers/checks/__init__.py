"""Health checks that gate the role (R9): the kinds, what runs them, and the verdict on their results."""

from agent.drivers.checks.runner import Checks
from agent.drivers.checks.verdict import CheckResult, Health, judge

__all__ = ["CheckResult", "Checks", "Health", "judge"]
