"""The main stories as text files: commands, ``----``, and what happens, line by line.

A file in scenarios/ is a list of steps, each with one command a line, a line ``----``, and the lines
that the world recorded since the previous step, ended by an empty line. ``#`` begins a comment. REWRITE=1
writes what happens now into the files: read each changed line as a reviewer before keeping it.

Commands (names are hosts; times are seconds):

    world [lease=2] [v1=yes] [forgets=yes] [stores=2] [hysteresis=10] [hold=2] [cooldown=2]
          [sessions=100] [retention=604800] [failsafe=yes]
    agents NAME...            | start NAME | stop NAME | kill NAME | freeze NAME | thaw NAME
    kill_agent NAME           | freeze_agent NAME | thaw_agent NAME (its hooks' work goes on)
    unfit NAME | fit NAME     | cut NAME [out|back] | heal NAME
    kill_both NAME (agent and guard)        | fail_start NAME (likewise; the next start fails)
    linger_agent NAME SECONDS (killed, and frozen in the kernel)
    hang_guard NAME SECONDS   | kill_guard NAME
    reload NAME all|none (hooks)            | upgrade NAME (reload with another version on disk)
    dies NAME join|follow|beat|release|leave|reload|loop (when it runs next)
    stop_confirming NAME (right after the next heartbeat by which it confirms)
    hook NAME ROLE OUTCOME    ok, fail, hang (heeds TERM), deaf (needs KILL), stuck (lingers)
    children NAME NATURE      what a promotion hook leaves (processes.py), or none
    slow NAME SECONDS         a message takes up to so long
    score NAME NUMBER         | override NAME Primary|Off [for SECONDS] | remove NAME
    stranger ACT NAME [WHICH] (strangers.py)
    coordinator kill|start|stop|continue|lose-data|restore [NUMBER of an older copy]
    outage (all lose the coordinator)       | healed (and reach it again)
    cut_lan NAME NAME         | heal_lan NAME NAME (questions of failsafe and their answers)
    plain NAME (kill its agent; the next start is without failsafe)
    lift (an operator, who looks whether anybody is active)
    run SECONDS               | status      | failsafe (its part of the status)
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.core.effects import StartHook
from agent.core.group_state import Policy, RemoveSession, SetOverride, status_of
from agent.model import Role, RoleOverride

from .host import ALL_HOOKS, AgentHost
from .strangers import ACTS
from .world import EPOCH_OF_WALL, World

FILES = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


class ScriptedHost(AgentHost):
    """A host whose hooks end as the scenario requires, role by role."""

    def start_hook(self, effect: StartHook) -> None:
        outcomes: dict[Role, str] = self.__dict__.setdefault("script", {})
        self.nature = replace(self.nature, outcomes=(outcomes.get(effect.facts.role, "ok"),))
        super().start_hook(effect)
        self.nature = replace(self.nature, outcomes=(outcomes.get(Role.SECONDARY, "ok"),))


class Story:
    """One scenario on its way."""

    def __init__(self, **planted: Any) -> None:
        self.planted = planted
        self.world = World(1, **planted)
        self.lines_seen = 0

    def do(self, command: str) -> None:
        verb, *words = command.split()
        act: Callable[..., None] = getattr(self, f"do_{verb}")
        act(*words)

    def new_lines(self) -> list[str]:
        lines = [line.rstrip() for line in self.world.transcript[self.lines_seen :]]
        self.lines_seen = len(self.world.transcript)
        return lines

    def host(self, name: str) -> AgentHost:
        return self.world.agents[name]

    # -- commands

    def do_world(self, *words: str) -> None:
        options = {"lease": "2", "v1": "no", "forgets": "no", "stores": "1"}
        options |= {"hysteresis": "10", "hold": "2", "cooldown": "2"}
        options |= {"sessions": "100", "retention": "604800", "failsafe": "no"}
        options |= dict(word.split("=") for word in words)
        self.world = World(
            1,
            lease_s=float(options["lease"]),
            plain_v1=options["v1"] == "yes",
            forgets=options["forgets"] == "yes",
            stores=int(options["stores"]),
            failsafe=options["failsafe"] == "yes",
            policy=Policy(
                float(options["hysteresis"]),
                float(options["hold"]),
                max_sessions=int(options["sessions"]),
                dead_session_retention_s=float(options["retention"]),
            ),
            cooldown_limit_s=float(options["cooldown"]),
            **self.planted,
        )

    def do_agents(self, *names: str) -> None:
        for name in names:
            self.world.agents[name] = agent = ScriptedHost(self.world, name)
            if len(self.world.coordinators) > 1:
                agent.state_file.store_id = self.world.coordinator.store_id
            agent.guard.late_s = 0.01
            agent.start()

    def do_run(self, seconds: str) -> None:
        self.world.run(float(seconds))

    def do_start(self, name: str) -> None:
        self.host(name).start()

    def do_stop(self, name: str) -> None:
        self.host(name).stop()

    def do_kill(self, name: str) -> None:
        self.host(name).kill()

    def do_freeze(self, name: str) -> None:
        self.host(name).freeze()

    def do_thaw(self, name: str) -> None:
        self.host(name).thaw()

    def do_kill_agent(self, name: str) -> None:
        self.host(name).kill_agent()

    def do_freeze_agent(self, name: str) -> None:
        self.host(name).freeze_agent()

    def do_thaw_agent(self, name: str) -> None:
        self.host(name).thaw_agent()

    def do_kill_both(self, name: str) -> None:
        self.host(name).kill_both()

    def do_fail_start(self, name: str) -> None:
        self.host(name).failing_starts = 1
        self.host(name).kill_both()

    def do_linger_agent(self, name: str, seconds: str) -> None:
        self.host(name).kill_agent(linger_s=float(seconds))

    def do_hang_guard(self, name: str, seconds: str) -> None:
        self.host(name).guard.hang(float(seconds))

    def do_kill_guard(self, name: str) -> None:
        self.host(name).guard.kill()

    def do_reload(self, name: str, hooks: str) -> None:
        self.host(name).reload(ALL_HOOKS if hooks == "all" else frozenset())

    def do_upgrade(self, name: str) -> None:
        self.host(name).upgrade()

    def do_dies(self, name: str, task: str) -> None:
        self.host(name).dying.append(task)

    def do_stop_confirming(self, name: str) -> None:
        self.host(name).stops_confirming = True

    def do_children(self, name: str, nature: str) -> None:
        self.host(name).nature = replace(self.host(name).nature, children=(nature,))

    def do_slow(self, name: str, seconds: str) -> None:
        self.host(name).net.spread_s = float(seconds)

    def do_stranger(self, act: str, name: str, which: str = "0") -> None:
        ACTS[act](self.world.coordinator, name, int(which))

    def do_unfit(self, name: str) -> None:
        self.world.record(name, "is unfit")
        self.host(name).unfit()

    def do_fit(self, name: str) -> None:
        self.world.record(name, "is fit")
        self.host(name).fit()

    def do_cut(self, name: str, way: str = "both") -> None:
        self.world.record(name, f"network cut: {way}")
        net = self.host(name).net
        net.cut_out, net.cut_back = way != "back", way != "out"

    def do_heal(self, name: str) -> None:
        self.world.record(name, "network healed")
        self.host(name).net.cut_out = self.host(name).net.cut_back = False

    def do_hook(self, name: str, role: str, outcome: str) -> None:
        self.host(name).__dict__.setdefault("script", {})[Role(role)] = outcome

    def do_score(self, name: str, score: str) -> None:
        self.host(name).score = float(score)

    def do_override(self, name: str, value: str, *period: str) -> None:
        until = None
        if period:
            until = EPOCH_OF_WALL + timedelta(seconds=self.world.now + float(period[1]))
        self.world.record(name, f"override: {' '.join([value, *period])}")
        what = SetOverride(name, RoleOverride(value), until)
        self.world.coordinator.submit(what, lambda _: None)

    def do_outage(self) -> None:
        for name in self.world.agents:
            self.do_cut(name)

    def do_healed(self) -> None:
        for name in self.world.agents:
            self.do_heal(name)

    def do_cut_lan(self, one: str, other: str) -> None:
        self.world.record(one, f"LAN to {other} cut")
        self.world.lan.cut(one, other)
        self.world.lan.cut(other, one)

    def do_heal_lan(self, one: str, other: str) -> None:
        self.world.record(one, f"LAN to {other} healed")
        self.world.lan.cut(one, other, cut=False)
        self.world.lan.cut(other, one, cut=False)

    def do_plain(self, name: str) -> None:
        self.host(name).failsafe = False
        self.host(name).kill_agent()

    def do_lift(self) -> None:
        self.world.coordinator.lift()

    def do_failsafe(self) -> None:
        status = status_of(self.world.coordinator.state)
        part = status.failsafe
        assert part is not None
        members = ",".join(member.id for member in part.members)
        choosable = ",".join(member.id for member in part.choosable or ())
        self.world.record(
            "failsafe",
            f"{part.state} cleared={status.cleared} members={members} choosable={choosable}"
            f" why={part.why}",
        )

    def do_remove(self, name: str) -> None:
        self.world.coordinator.submit(RemoveSession(name), lambda _: None)

    def do_coordinator(self, what: str, which: str = "0") -> None:
        coordinator = self.world.coordinator
        match what:
            case "kill":
                coordinator.crash()
            case "start":
                coordinator.restart()
            case "stop":
                coordinator.pause()
            case "continue":
                coordinator.resume()
            case "lose-data":
                coordinator.lose_data()
            case "restore":
                coordinator.restore_copy(int(which))
            case _:
                raise AssertionError(what)

    def do_status(self) -> None:
        state = self.world.coordinator.state
        status = status_of(state)
        sessions = ",".join(state.record.sessions)
        self.world.record(
            "status",
            f"primary={status.primary} pending={status.pending} epoch={status.epoch}"
            f" sessions={sessions}",
        )


def steps(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each part of a file up to its ``----``, as it is, and the commands in it."""
    for block in text.strip().split("\n\n"):
        head, separator, _ = block.partition("\n----")
        lines = [line for line in head.splitlines() if not line.startswith("#")]
        assert bool(separator) == bool(lines), f"commands without ----, or the reverse:\n{block}"
        yield head, lines


def played(text: str, **planted: Any) -> str:
    """The file as it would be if everything in it happened as it does now."""
    story = Story(**planted)
    blocks = []
    for head, commands in steps(text):
        for command in commands:
            story.do(command)
        blocks.append("\n".join([head, "----", *story.new_lines()] if commands else [head]))
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_scenario_has_its_transcript(path: Path) -> None:
    """Any broken promise raises on the way, too."""
    expected = path.read_text()
    happened = played(expected)
    if os.environ.get("REWRITE"):
        path.write_text(happened)
    else:
        assert happened.splitlines() == expected.splitlines()


def test_there_are_scenarios() -> None:
    """A glob that finds nothing would prove nothing."""
    assert len(FILES) >= 12


def test_a_wrong_line_is_found() -> None:
    assert played("agents a\nrun 1\n----\n  0.000 a  sleeps\n") != "agents a\nrun 1\n----\n"
    assert "a           PendingPrimary -> Primary" in played("agents a\nrun 1\n----\n")
