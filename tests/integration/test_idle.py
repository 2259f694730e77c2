"""Bounds on the CPU time and memory of an idle agent, against regressions.

The benchmark (tests/bench/idle.py) measures it for longer, and CPU more finely.
"""

from pathlib import Path

from tests.mosquitto import Authority, a_broker

from .resting import cost, everything, plain, resting, secure_coordinator
from .stage import Stage

MOST_PLAIN_MIB, MOST_MIB = 40, 45
MOST_CPU_PERCENT = 3
"""Six times the aim: over some seconds, beside other tests."""
REST_S = 6


def test_a_plain_agent_needs_little_memory_and_cpu(tmp_path: Path) -> None:
    with Stage(tmp_path) as stage, resting(stage, "plain", plain(stage, stage.serve())) as agent:
        agent.rest(2)
        before = cost(agent.pid).cpu_s
        agent.rest(REST_S)
        after = cost(agent.pid)
    assert 10 < after.peak_mib <= MOST_PLAIN_MIB
    assert 0 < 100 * (after.cpu_s - before) / REST_S <= MOST_CPU_PERCENT


def test_an_agent_with_every_feature_is_small_enough(tmp_path: Path) -> None:
    folder = tmp_path / "broker"
    folder.mkdir()
    with a_broker(folder) as broker, Stage(tmp_path) as stage:
        broker.secure()
        broker.start()
        authority = Authority(tmp_path)
        words = everything(stage, secure_coordinator(stage, authority), authority, broker)
        with resting(stage, "everything", words) as agent:
            agent.rest(REST_S)
            assert 10 < cost(agent.pid).peak_mib <= MOST_MIB
