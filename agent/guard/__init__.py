"""The guard (R12): a small process beside the agent that demotes when the agent cannot.

The agent sends it each new deadline. A deadline that passes means that the agent is frozen or hung; a
connection that closes while a deadline is set means that the agent is dead. The guard then

1. stops the agent (SIGSTOP), so that it does not wake up in between,
2. kills hooks that still run, with their process trees, so that they cannot restart the workload,
3. stops the workload of ``exec``: TERM, and KILL at half of the time,
4. runs the demotion hook: TERM and KILL at its limit,
5. kills whatever else is left of the tenure, and then the agent,
6. has a helper release the role, if every step has succeeded.

All of it is done by ``kill_at``; only the hook, which has half of its budget at least, may go on after that. If the
guard itself is late (after a suspend, for example), it kills the tenure first: a late demotion is better than none.

Rules of this package: it imports only the smallest modules of the standard library, and
agent/proctree.py; no asyncio, no threads. It must stay small, and run when the agent cannot. Whatever may
block (a file on a dead disk, another process's environment, a cgroup) runs in a forked process and is
waited for only up to a limit. A step that fails does not prevent the next one. The guard decides nothing:
the agent has computed every moment.

Not promised: to act while the whole host is frozen; to call a webhook; to stop or kill an agent that is
process 1 of a container (its workload and its hooks' process groups are killed).

The agent runs these modules from memory: drivers/guardian/program.py lists them all.
"""

MESSAGE_BYTES = 65536
"""Longest message of the agent; a longer one would be truncated. An ordinary one has 2,000 bytes."""
