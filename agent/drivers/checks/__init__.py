"""Health checks that gate the role (R9): the kinds, what runs them, and the verdict on their results."""
