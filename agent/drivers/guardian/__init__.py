"""The agent's side of the guard (agent/guard, R12): start it, send it deadlines, detect its loss."""
