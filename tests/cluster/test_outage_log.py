"""An outage of etcd, however long, is a few lines of the log."""

from collections import Counter

import pytest

from .world import World, run_virtually


def test_an_outage_of_etcd_is_logged_once_by_each_coordinator(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        world = World(1, coordinators=2)
        await world.begin()
        await world.run_for(5.0)
        caplog.clear()
        for node in world.nodes.values():
            node.link.cut = True
        await world.run_for(600.0)
        lines = Counter(caplog.messages)
        assert lines["session with etcd ended, retrying"] == 2
        assert lines.total() < 20
        for node in world.nodes.values():
            node.link.cut = False
        await world.until(lambda: world.primary() is not None, 20.0, "a primary")
        for node in world.nodes.values():
            node.link.cut = True
        await world.run_for(60.0)
        assert Counter(caplog.messages)["session with etcd ended, retrying"] == 4
        await world.end()

    run_virtually(main())
