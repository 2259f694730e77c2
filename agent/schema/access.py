"""The JSON shapes of access-control lists. The rules of api.py apply."""

from typing import Annotated

import msgspec
from msgspec import Meta

from agent import model
from agent.model import Right
from agent.schema.values import AccessRights, AccessType, Mirror, TrusteeKind

MAX_ENTRIES = 1000
"""The most entries of an access-control list, as each request is checked against all of them."""

MAX_LIST_BYTES = 131_072
"""The most bytes of an access-control list as JSON, since each change of the group's roles writes it again."""


class Trustee(Mirror[model.Trustee], frozen=True):
    """The subject of an entry: a user, a client or a role."""

    kind: Annotated[TrusteeKind, "1 for a user, 2 for a client, 3 for a role"]
    object_id: Annotated[
        str, Meta(min_length=1, max_length=256, description="A string of 1 to 256 characters.")
    ]
    tenant_id: Annotated[str, Meta(max_length=256)] | None = None


class AccessControlEntry(Mirror[model.AccessEntry], frozen=True):
    """The rights that one trustee is allowed and denied. A denied right overrides an allowed one."""

    trustee: Annotated[Trustee, "whom the entry is about, with Type and ObjectId"]
    denied: Annotated[AccessType, "0 for allowed, 1 for denied"]
    rights: Annotated[
        AccessRights,
        "the sum of Read 1, Write 2, Delete 4, ManageAccessControl 8, Share 16",
    ]

    def to_model(self) -> model.AccessEntry:
        return model.AccessEntry(self.trustee.to_model(), bool(self.denied), self.rights)


class AccessControlList(Mirror[model.AccessList], frozen=True):
    """The rights of callers: an access-control list."""

    entries: Annotated[list[AccessControlEntry], Meta(max_length=MAX_ENTRIES)]


class AccessControlRequest(AccessControlList, frozen=True):
    """A new access-control list. At least one trustee has to keep ManageAccessControl."""

    entries: Annotated[
        list[AccessControlEntry],
        Meta(
            max_length=MAX_ENTRIES,
            extra_json_schema={
                "contains": {
                    "properties": {
                        "AccessType": {"const": 0},
                        "AccessRights": {"enum": [r for r in range(32) if r & Right.MANAGE]},
                    }
                }
            },
        ),
        ", of which at least one allows ManageAccessControl",
    ]

    def __post_init__(self) -> None:
        """Refuse a list that is too large, or after which nobody could change it."""
        if (size := len(msgspec.json.encode(self))) > MAX_LIST_BYTES:
            raise ValueError(
                f"the list has {size} bytes as JSON: RoleTrusteeAccessControlEntries must have at most"
                f" {MAX_LIST_BYTES}; name roles in place of their members"
            )
        managing = [entry for entry in self.to_model().entries if entry.rights & Right.MANAGE]
        denied = {entry.trustee for entry in managing if entry.denied}
        if all(entry.denied or entry.trustee in denied for entry in managing):
            raise ValueError(
                "nobody would keep the right ManageAccessControl: RoleTrusteeAccessControlEntries"
                " must allow (AccessType 0) it (AccessRights 8) to one trustee that is not denied it"
            )
