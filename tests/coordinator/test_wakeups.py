from math import inf

from agent.coordinator.wakeups import Wakeups


def due(wakeups: Wakeups[str], now: float) -> list[str]:
    return list(wakeups.due(now, 100))


def test_a_key_comes_up_once_at_its_moment() -> None:
    wakeups: Wakeups[str] = Wakeups()
    wakeups.set("a", 5.0)
    assert due(wakeups, 4.9) == []
    assert due(wakeups, 5.0) == ["a"]
    assert due(wakeups, 100.0) == []


def test_postponing_a_wakeup_costs_no_push_and_takes_effect() -> None:
    wakeups: Wakeups[str] = Wakeups()
    wakeups.set("a", 5.0)
    for later in range(6, 106):
        assert not wakeups.set("a", float(later))
    assert due(wakeups, 50.0) == []
    assert list(wakeups.due(105.0, 1)) == ["a"], "one step: it was pushed once"


def test_an_earlier_moment_counts_at_once_and_is_reported() -> None:
    wakeups: Wakeups[str] = Wakeups()
    wakeups.set("a", 50.0)
    assert wakeups.set("a", 5.0)
    assert wakeups.next_at() == 5.0
    assert due(wakeups, 60.0) == ["a"]


def test_never_and_forgotten_keys_do_not_come_up() -> None:
    wakeups: Wakeups[str] = Wakeups()
    wakeups.set("a", 5.0)
    wakeups.set("a", inf)
    wakeups.set("b", 5.0)
    wakeups.forget("b")
    assert due(wakeups, 10.0) == []
    assert wakeups.next_at() == inf


def test_a_forgotten_key_can_come_back() -> None:
    wakeups: Wakeups[str] = Wakeups()
    wakeups.set("a", 5.0)
    wakeups.forget("a")
    wakeups.set("a", 7.0)
    assert due(wakeups, 6.0) == []
    assert due(wakeups, 7.0) == ["a"]


def test_no_more_than_the_limit_comes_up_at_once() -> None:
    wakeups: Wakeups[int] = Wakeups()
    for key in range(10):
        wakeups.set(key, 1.0)
    assert len(list(wakeups.due(2.0, 4))) == 4
    assert len(list(wakeups.due(2.0, 100))) == 6
