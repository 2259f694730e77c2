"""The agent's daemon: the session's life in one process.

``pump`` has the one inbox, the one caller of ``Session.step`` and the one timer; ``requests`` is what it
asks of the server, ``runs`` what it runs on this host. Whatever waits is a task that ends by putting
an event into the inbox, so a heartbeat waits for nothing. ``life.run`` is the whole of it.

Nothing is imported here: ``handback`` is a program of its own, which has to start quickly.
"""
