"""The links between the members of a simulated world: the questions of failsafe and their answers.

Owns the way of a question to a member and of its answer back; each may be late, lost or repeated. What is
answered is not its business: ``Session.vote`` decides.
"""

from typing import TYPE_CHECKING

from agent.core.effects import Ask, Vote
from agent.core.events import Answered, Asked

from .network import Net

if TYPE_CHECKING:
    from .host import AgentHost
    from .world import World

RETRY_S = 0.01
"""Poll interval of a question that waits in the socket of a frozen agent."""


class Lan:
    """The links between all pairs of members."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.nets: dict[tuple[str, str], Net] = {}
        self.loss = self.repeat = 0.0
        self.patient = False
        """Whether late answers are waited for, instead of failing a question at its timeout."""

    def net(self, asker: str, voter: str) -> Net:
        """The link by which one member asks another one."""
        if (asker, voter) not in self.nets:
            self.nets[asker, voter] = Net(loss=self.loss, repeat=self.repeat)
        return self.nets[asker, voter]

    def cut(self, sender: str, receiver: str, *, cut: bool = True) -> None:
        """Lose all messages of one member to another one, both questions and answers."""
        self.net(sender, receiver).cut_out = cut
        self.net(receiver, sender).cut_back = cut

    def ask(self, host: "AgentHost", effect: Ask) -> None:
        """Send one question."""
        question = Question(self, host, effect)
        self.world.send(question.net, back=False, deliver=question.arrive, args=())
        if not self.patient:
            self.world.after(host.session.timing.question_interval_s, question.time_out)


class Question:
    """One question on its way; its answer may come twice, and late."""

    def __init__(self, lan: Lan, host: "AgentHost", effect: Ask) -> None:
        self.lan = lan
        self.world = lan.world
        self.host = host
        self.life = host.life
        self.effect = effect
        to = effect.member.url.removeprefix("http://")
        self.net = lan.net(host.name, to)
        self.voter = self.world.agents.get(to)
        self.over = False

    def arrive(self) -> None:
        """The question has come to its member, if that has a listener."""
        if self.voter is not None:
            self._receive(self.voter, self.voter.life)

    def _receive(self, voter: "AgentHost", life: int) -> None:
        if not voter.up or voter.life != life:
            return  # its listener is closed, and so is the connection
        if not voter.works:
            self.world.after(RETRY_S, self._receive, voter, life)
            return
        effect = self.effect
        vote = voter.vote(Asked(self.host.session_id, effect.epoch, effect.rehearsal))
        self.world.send(self.net, back=True, deliver=self._answer, args=(vote,))

    def _answer(self, vote: Vote) -> None:
        if self.lan.patient or not self.over:
            self._end(yes=vote.yes, why=vote.why)

    def time_out(self) -> None:
        """The asker waits no longer."""
        if not self.over:
            self._end(yes=False, why="no answer in time")

    def _end(self, *, yes: bool, why: str) -> None:
        self.over = True
        self.host.post(Answered(self.effect.nonce, yes, why), self.life)
