"""The ``tcp`` check: whether something accepts connections."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from agent.drivers.checks.kind import Check, CheckFailed, Run
from agent.ops.clock import Clock
from agent.schema.formats import Peer


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpCheck(Check):
    """Passes if a connection is accepted."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "name": "plc",
        "type": "tcp",
        "address": "192.0.2.10:502",
        "weight": 3,
    }

    type: Literal["tcp"] = "tcp"
    address: Peer
    """What to connect to. Nothing is sent."""

    def runner(self, clock: Clock) -> Run:  # noqa: ARG002 - as every kind
        return self._connect

    async def _connect(self) -> None:
        try:
            _, writer = await asyncio.open_connection(*self.address)
        except OSError as error:
            why = error.strerror or str(error)
            raise CheckFailed(f"{self.address} takes no connection: {why}") from error
        writer.close()
        with suppress(OSError):  # an error after the accept does not matter
            await writer.wait_closed()
