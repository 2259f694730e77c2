"""Tools for any daemon: clocks, logs, signals, processes. Knows nothing of failover."""
