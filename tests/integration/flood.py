"""A client that floods listeners with TLS connections at a rate, until it is killed.

    python tests/integration/flood.py finished|unfinished RATE PORT...

Each connection is held until the server closes it: after a complete handshake, or after a first message (ClientHello)
that the server has to answer.
"""

import asyncio
import contextlib
import ssl
import sys

READ_BYTES = 4096


def context() -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    return made


def first_message() -> bytes:
    """A ClientHello. The same one may be sent any number of times."""
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context().wrap_bio(received, sent).do_handshake()
    return sent.read()


async def hold(port: int, tls: ssl.SSLContext | None, sent: bytes) -> None:
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        writer.write(sent)
        while await reader.read(READ_BYTES):
            pass
        writer.transport.abort()


async def flood(rate: float, ports: list[int], tls: ssl.SSLContext | None, sent: bytes) -> None:
    loop = asyncio.get_running_loop()
    due = loop.time()
    async with asyncio.TaskGroup() as held:
        while True:
            for port in ports:
                held.create_task(hold(port, tls, sent))
            due = max(due + 1 / rate, loop.time())  # what was missed is not made up for by a burst
            await asyncio.sleep(due - loop.time())


if __name__ == "__main__":
    finished = sys.argv[1] == "finished"
    asyncio.run(
        flood(
            float(sys.argv[2]),
            [int(port) for port in sys.argv[3:]],
            context() if finished else None,
            b"" if finished else first_message(),
        )
    )
