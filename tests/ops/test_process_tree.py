"""The search for the processes of a tenure, when it does not end."""

import threading

import pytest

from agent.ops import process_tree
from agent.ops.blocking import StuckError
from agent.ops.process_tree import ProcessTree


async def test_a_search_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(process_tree, "SEARCH_S", 0.01)
    tree = ProcessTree("instance.1")
    monkeypatch.setattr(tree, "find", go_on.wait)
    with pytest.raises(StuckError) as caught:
        await tree.find_in_thread()
    assert str(caught.value) == "cannot list the processes of instance.1: no result within 0.01 s"
    go_on.set()
