"""The agent's end of the guard (agent/guard, R12): runs it, sends it deadlines, notices its loss."""
