"""What any daemon needs: clocks, logs, signals. Knows nothing of failover."""
