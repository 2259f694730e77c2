"""Clocks and links of a simulated world.

Owns how long a message travels and whether it arrives. Knows nothing of what it carries.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Net:
    """The link between one agent and one coordinator."""

    delay_s: float = 0.002
    spread_s: float = 0.003
    loss: float = 0.0
    repeat: float = 0.0
    cut_out: bool = False
    cut_back: bool = False
    held_out: list[tuple[Callable[..., None], tuple[Any, ...]]] | None = None
    held_back: list[tuple[Callable[..., None], tuple[Any, ...]]] | None = None
    """Messages that wait until the link is released, in each direction; None while it is not stalled."""

    def mend(self) -> None:
        """From now on every message arrives, soon."""
        self.cut_out = self.cut_back = False
        self.delay_s, self.spread_s = Net.delay_s, Net.spread_s


@dataclass
class Clock:
    """A host's clock: an offset, and a rate within the promised drift."""

    rate: float = 1.0
    offset: float = 0.0

    def local(self, true: float) -> float:
        """The reading at a true time, in seconds."""
        return self.offset + self.rate * true

    def true(self, local: float) -> float:
        """The true time of a reading, in seconds."""
        return (local - self.offset) / self.rate


def send(
    chance: random.Random,
    after: Callable[..., None],
    net: Net,
    deliver: Callable[..., None],
    args: tuple[Any, ...],
    *,
    back: bool,
) -> None:
    """Send one message: it may be late, lost or repeated."""
    copies = 2 if chance.random() < net.repeat else 1
    for _ in range(copies):
        lost = net.cut_back if back else net.cut_out
        held = net.held_back if back else net.held_out
        if held is not None and not lost:
            held.append((deliver, args))
        elif not lost and chance.random() >= net.loss:
            after(net.delay_s + chance.random() * net.spread_s, deliver, *args)
