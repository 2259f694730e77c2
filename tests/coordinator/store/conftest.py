"""What the tests of the stores share: records to keep."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from agent.model import (
    AccessEntry,
    AccessList,
    GroupConfig,
    GroupKey,
    GroupRecord,
    HoldOff,
    RoleOverride,
    SessionConfig,
    SessionRecord,
    Tenure,
    Trustee,
)

NOW = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
ADDITIONAL = '{"Site":["a",1,null,0.5]}'


@pytest.fixture
def key() -> GroupKey:
    return GroupKey("default", "default", "pumps")


@pytest.fixture
def make_record() -> Callable[[int], GroupRecord]:
    """Records that use every field, and differ by their epoch."""

    def make(epoch: int) -> GroupRecord:
        return GroupRecord(
            config=GroupConfig("pumps", 20_000_000, "Pumps", "all", ADDITIONAL),
            sessions={
                "a": SessionRecord(
                    SessionConfig("a", "A", '{"x":"é\\u0000"}'),
                    RoleOverride.PRIMARY,
                    NOW,
                    3,
                    HoldOff(NOW, 2.5),
                    epoch,
                    NOW,
                    "user:ann",
                ),
                "b": SessionRecord(SessionConfig("b")),
            },
            holder=Tenure("a", epoch, NOW, "sole member", "i1", revoked=True),
            pending="b",
            epoch=epoch,
            revision=2 * epoch,
            previous="b",
            last_data=NOW,
            acl=AccessList((AccessEntry(Trustee(1, "u", "t"), denied=True, rights=31),)),
            quiet=True,
            ended=Tenure("b", epoch - 1, NOW, "chosen", "i2"),
        )

    return make
