"""The agent's daemon: one session in one process.

``loop`` has the only inbox, the only caller of ``Session.step`` and the only timer. ``requests`` sends requests to the
server, ``role_runner`` runs hooks and the workload. Everything that waits is a task that ends by posting an event,
so no heartbeat is ever delayed. ``main.run`` is the entry point.

Nothing is imported here: ``release_helper`` is a program of its own, which has to start quickly.
"""
