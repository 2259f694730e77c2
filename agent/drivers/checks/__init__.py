"""Health checks that gate the role (R9): what runs them, and what they say of this member."""

from agent.drivers.checks.runner import Checks
from agent.drivers.checks.verdict import CheckResult, Health, judge

__all__ = ["CheckResult", "Checks", "Health", "judge"]
