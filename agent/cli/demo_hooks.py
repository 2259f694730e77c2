"""The hooks of ``failover-agent demo``: shell scripts that start and stop its collector."""

START_HOOK = """#!/bin/sh
# Promotion: start the collector, and remember which process it is.
cd {directory} || exit 1
{python} -m agent.cli.demo_collector {directory} {host} >> {host}.log 2>&1 &
echo $! > {host}.pid
"""

STOP_HOOK = """#!/bin/sh
# Demotion: stop the collector if it runs, and do not return before it is gone. A zombie is gone.
cd {directory} || exit 1
[ -f {host}.pid ] || exit 0
pid=$(cat {host}.pid)
kill -TERM "$pid" 2>/dev/null
tries=0
while grep -qs '^State:.[^ZX]' "/proc/$pid/status"; do
    tries=$((tries + 1))
    [ "$tries" -lt 20 ] || kill -KILL "$pid" 2>/dev/null
    sleep 0.01
done
rm -f {host}.pid
"""
