"""The process that reads the settings of an agent, for the one that is going to be it (cli/apart.py).

Owns the flags of ``run`` and ``exec``, and their help.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from agent.cli.main import main as command_line
from agent.cli.options import load_agent, settings_flags, sources
from agent.errors import ConfigError
from agent.settings import exchange
from agent.settings.describe import describe
from agent.settings.models import AgentForm

Hand = Callable[[Mapping[str, Any]], int]


def main(descriptor: int, words: Sequence[str]) -> int:
    """Hand back the settings that the words say, or what is wrong with them; the exit code.

    Words that are no settings, or ask for help, are answered here: nothing is handed back.
    """

    def hand(given: Mapping[str, Any]) -> int:
        os.write(descriptor, _document(given))
        return 0

    return command_line(words, commands(hand))


def _document(given: Mapping[str, Any]) -> bytes:
    try:
        return exchange.dump(load_agent(sources(AgentForm, given)).value())
    except ConfigError as error:
        return exchange.dump_error(error)


def commands(hand: Hand) -> dict[str, click.Command]:
    """``run`` and ``exec`` with all their flags; ``hand`` is called with what they were given."""
    return {command.name or "": command for command in (_run(hand), _exec(hand))}


def _run(hand: Hand) -> click.Command:
    @click.command("run")
    @settings_flags(AgentForm)
    def command(**given: Any) -> int:
        """Be a member of a group: heartbeat, follow the role, run the hooks.

        Runs until SIGTERM or SIGINT, then demotes, gives the role back and leaves the group. Nothing is
        needed but a group and a coordinator: 'failover-agent run --group demo' finds one on this
        machine.
        """
        return hand(given)

    return command


def _exec(hand: Hand) -> click.Command:
    @click.command("exec")
    @settings_flags(AgentForm, [s.key for s in describe(AgentForm) if s.key != "workload"])
    @click.argument("words", metavar="-- COMMAND [ARGS]...", nargs=-1, required=True)
    def command(words: tuple[str, ...], **given: Any) -> int:
        """Run COMMAND only while this member is primary.

        It is started at a promotion and stopped at a demotion (TERM, then KILL within the demotion's
        budget), in its own process group, with the FAILOVER_ variables that a hook has. Its output is
        left alone. When it ends by itself --workload-restart says whether it is started again; if not,
        the agent gives the role back and ends with its exit code (128 + n for signal n).
        """
        return hand({**given, "workload": words})

    return command
