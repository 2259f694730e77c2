"""Hooks: the commands, directories of scripts and webhooks that run at events (docs/hooks.md).

Owns how a hook is checked, started and stopped, and its result. Knows nothing of roles, of when a hook has
to run and of what follows (R7, R8): the caller decides that.
"""
