"""``failover-agent exec``: the agent, with a command that runs only while this member is primary."""

from agent.cli.run import agent_command

command = agent_command("exec")
