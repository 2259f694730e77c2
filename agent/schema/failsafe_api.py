"""The JSON shapes of failsafe in the group API: sets of members, the status, and the lift.

The rules of api.py apply. The messages between members are in agent/drivers/failsafe/messages.py.
"""

from dataclasses import replace
from typing import Annotated, Literal

from msgspec import Meta, field

from agent import model
from agent.schema.values import Confirmed, Count, Mirror, Name, NeededMoment, Shape

Cleared = Annotated[
    Count | None,
    "each tenure up to this epoch is over. Left out in groups and for sessions without failsafe",
]
MAX_FAILSAFE_URL = 256
"""Characters of a FailsafeUrl. Bounded, since the URLs of all members are in the record and in each answer."""

GivenFailsafeUrl = Annotated[
    Annotated[
        str,
        Meta(
            max_length=MAX_FAILSAFE_URL, pattern=r"^https?://[^/\x00-\x20\x7f][^\x00-\x20\x7f]*\Z"
        ),
    ]
    | None,
    "the http or https URL at which the other members reach the failsafe listener of this process",
]


class FailsafeMember(Mirror[model.Member], frozen=True, kw_only=True):
    """A member of a group in which every member has a failsafe listener."""

    id: Annotated[Name, "the session"]
    url: Annotated[Name, "the URL of its failsafe listener"]


Members = Annotated[list[FailsafeMember] | None, "whom the primary has to ask"]


class FailsafeSet(Mirror[model.MemberSet], frozen=True, kw_only=True):
    """The members that a primary has to ask while it cannot reach the coordinator, or why it asks none."""

    revision: Annotated[Count, "it grows with each set of the group"]
    members: Members = field(default_factory=list)
    off: Annotated[Name | None, "why failsafe is off; left out while it is on"] = None

    def to_model(self) -> model.MemberSet:
        """Convert the set. One without members and without a reason is off, too: it lacks even the holder."""
        known = Mirror.to_model(self)
        if known.off is None and known.members:
            return known
        return model.MemberSet(known.revision, off=known.off or "the coordinator names no members")


class LapsedTenure(Mirror[model.Lapsed], frozen=True, kw_only=True):
    """A tenure whose lease has ended while its primary may go on by failsafe."""

    session_id: Annotated[Name, "the session that was primary"]
    epoch: Annotated[Count, "the epoch of the tenure"]
    since: Annotated[NeededMoment, "when its lease ended"]


class FailsafeStatus(Mirror[model.FailsafeStatus], frozen=True, kw_only=True):
    """Whether the primary of a group may go on without the coordinator, and what that restricts."""

    state: Annotated[
        Literal["Off", "Ready", "Restricted"],
        "while Restricted nobody is primary, and only Choosable may be promoted",
    ]
    why: Annotated[Name | None, "the reason of the state, for people"] = None
    revision: Annotated[Count | None, "the revision of Members"] = None
    members: Members = field(default_factory=list)
    choosable: Annotated[
        list[FailsafeMember] | None, "those that may be promoted while the group is restricted"
    ] = None
    lapsed: Annotated[LapsedTenure | None, "the tenure that may still go on by failsafe"] = None

    def to_model(self) -> model.FailsafeStatus:
        return replace(Mirror.to_model(self), state=model.FailsafeState(self.state))


class LiftRequest(Shape, frozen=True, kw_only=True):
    """An operator has made sure that no member of a group is active: all of them may be promoted."""

    epoch: Annotated[Count, "the newest epoch of the group"]
    reason: Annotated[str, Meta(min_length=1, max_length=256), ", for the history"]
    nobody_is_active: Annotated[
        Confirmed, "the caller has made sure of it, on every host of the group"
    ]
