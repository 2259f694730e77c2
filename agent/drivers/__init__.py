"""The agent's access to the outside world. The modules know nothing of one another, and nothing of roles."""
