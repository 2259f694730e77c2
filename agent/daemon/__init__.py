"""The agent's daemon: one session in one process.

``loop`` has the one inbox, the one caller of ``Session.step`` and the one timer. ``requests`` asks the
server, ``role_runner`` runs hooks and the workload. Whatever waits is a task that ends by posting an event,
so no heartbeat is ever delayed. ``main.run`` is the entry point.

Nothing is imported here: ``release_helper`` is a program of its own, which has to start quickly.
"""
