"""Which processes of earlier agents a start looks for, by what the state file has of them."""

from typing import Any

import pytest

from agent.daemon.previous_state import boot_id, previous_instances, previous_tenure


def state(**given: Any) -> dict[str, Any]:
    return {"boot": boot_id(), "store": "s", "stop_command": [], "instance": "b", **given}


def test_the_previous_agent_and_the_holder_of_an_unreleased_tenure_are_looked_for() -> None:
    assert previous_instances(state()) == ("b",)
    unreleased = {"epoch": 3, "instance": "a"}
    assert previous_instances(state(unreleased=unreleased)) == ("b", "a")
    assert previous_instances(state(unreleased=unreleased, boot="other")) == ()


def test_what_the_first_demotion_of_the_previous_agent_has_not_ended_is_looked_for_again() -> None:
    assert previous_instances(state(leftover=["a", "0"])) == ("a", "0")
    assert previous_instances(state(leftover=[])) == ("b",)


@pytest.mark.parametrize("wrong", [[1], "a", 7, True, {"instance": 7}, {"instance": "../../x"}])
def test_a_state_of_another_form_is_ignored(wrong: Any) -> None:
    assert previous_instances(state(unreleased=wrong)) == ("b",)
    assert previous_tenure(state(unreleased=wrong), []) is None


@pytest.mark.parametrize("wrong", ["", "../..", "a/b", "a\0", "\ud800", "x" * 65, None, [], {}])
def test_an_instance_that_could_be_another_path_or_no_variable_is_ignored(wrong: Any) -> None:
    assert previous_instances(state(instance=wrong)) == ()
    assert previous_instances(state(leftover=[wrong, "a"])) == ("a",)
    assert previous_tenure(state(unreleased={"epoch": 3, "instance": wrong}), []) is None
