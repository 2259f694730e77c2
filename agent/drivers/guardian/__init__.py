"""The agent's end of the guard (agent/guard, R12): runs it, sends it deadlines, notices its loss."""

from agent.drivers.guardian.messages import Arming, GuardHook, GuardLogContext
from agent.drivers.guardian.supervisor import Guardian

__all__ = ["Arming", "GuardHook", "GuardLogContext", "Guardian"]
