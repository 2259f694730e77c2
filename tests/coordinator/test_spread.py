"""Shards spread evenly over the members, whoever comes and goes, and move no more than they have to."""

from hypothesis import given
from hypothesis import strategies as st

from agent.coordinator.spread import Leader, View, member_to_hand_a_shard_to, shards_to_claim
from agent.coordinator.store.etcd_client import Event

SHARDS = 8


def settle(view: View) -> int:
    """Let each member act in turn until nobody does anything; how many leaderships have begun."""
    begun = 0
    acted = True
    while acted:
        acted = False
        for me in sorted(view.members):
            vacant = [n for n in range(SHARDS) if n not in view.leaders]
            for number in shards_to_claim(view, me, vacant, SHARDS):
                view.leaders[number] = Leader(me, view.members[me], 1)
                begun, acted = begun + 1, True
            to = member_to_hand_a_shard_to(view, me, SHARDS)
            if to is not None:
                number = max(n for n, leader in view.leaders.items() if leader.member == me)
                view.leaders[number] = Leader(to, view.members[to], 1)
                begun, acted = begun + 1, True
    return begun


def leave(view: View, member: str) -> None:
    del view.members[member]
    for number in [n for n, leader in view.leaders.items() if leader.member == member]:
        del view.leaders[number]


@given(st.lists(st.sampled_from("abcdefghijk"), max_size=20))
def test_every_shard_has_a_leader_and_no_member_has_two_more_than_another(moves: list[str]) -> None:
    view = View(members={"z": "http://z"})
    settle(view)
    for member in moves:
        if member in view.members:
            leave(view, member)
        else:
            view.members[member] = f"http://{member}"
        settle(view)
        counts = view.counts()
        assert sum(counts.values()) == SHARDS
        assert max(counts.values()) - min(counts.values()) <= 1


def test_a_member_that_comes_or_goes_moves_its_share_only() -> None:
    view = View(members={"a": "http://a"})
    assert settle(view) == SHARDS
    view.members["b"] = "http://b"
    assert settle(view) == SHARDS // 2
    view.members["c"] = "http://c"
    assert settle(view) == 2
    leave(view, "a")
    assert settle(view) == 3


def test_members_that_start_together_claim_different_shards_first() -> None:
    view = View(members={name: f"http://{name}" for name in "abcd"})
    claims = [shards_to_claim(view, me, list(range(SHARDS)), SHARDS) for me in "abcd"]
    assert sorted(number for some in claims for number in some) == list(range(SHARDS))


def test_a_view_follows_the_keys() -> None:
    view = View()
    leader = '{"Member": "7", "Url": "http://a"}'
    for event in (
        Event("/p/live/members/7", '{"Url": "http://a"}', 5),
        Event("/p/live/leaders/3", leader, 6),
        Event("/p/live/access", "x", 8),
        Event("/p/live/unknown/1", "x", 9),
    ):
        view.apply("/p/live/", event)
    assert view.members == {"7": "http://a"}
    assert view.leaders == {3: Leader("7", "http://a", 6)}
    assert view.access == 8
    assert view.counts() == {"7": 1}
    view.apply("/p/live/", Event("/p/live/leaders/3", None, 9))
    view.apply("/p/live/", Event("/p/live/members/7", None, 9))
    assert view == View(access=8)
