"""The outside world of the agent, one thing a file; they know nothing of one another or of roles."""
