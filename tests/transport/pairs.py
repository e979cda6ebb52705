"""Both ends of a connection in one test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from kas_libp2p.config import Config, DialConfig, YamuxConfig
from kas_libp2p.identity import Identity
from kas_libp2p.transport._noise import Handshake, sealed_size
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.upgrade import upgrade
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.memory import MemoryRaw, memory_pair

ALICE = Identity.from_seed(bytes(32))
BOB = Identity.from_seed(bytes(range(32)))
ECHO = "/echo/1.0.0"


def config(**yamux: float) -> Config:
    return Config(yamux=replace(YamuxConfig(), **yamux), dial=DialConfig())


class Pair:
    """Two connections that run.

    Attributes:
        alice, bob: the initiator's end and the responder's.
        alice_raw, bob_raw: the pipes under them.
        nursery: where tests start what runs beside.
    """

    def __init__(self, nursery: trio.Nursery, alice: Connection, bob: Connection, raws: tuple[MemoryRaw, MemoryRaw]):
        self.nursery = nursery
        self.alice = alice
        self.bob = bob
        self.alice_raw, self.bob_raw = raws
        self._inbox: dict[Connection, trio.MemorySendChannel[YamuxStream]] = {}
        self._outbox: dict[Connection, trio.MemoryReceiveChannel[YamuxStream]] = {}
        self.refused: list[str] = []
        for connection in (alice, bob):
            self._inbox[connection], self._outbox[connection] = trio.open_memory_channel[YamuxStream](1000)

    async def run(self) -> None:
        for connection in (self.alice, self.bob):
            await self.nursery.start(self._run_one, connection)

    async def _run_one(self, connection: Connection, task_status: trio.TaskStatus[None]) -> None:
        await connection.run(self._inbox[connection].send_nowait, on_limit=self.refused.append, task_status=task_status)

    async def inbound(self, connection: Connection) -> YamuxStream:
        """The next stream that the other side opened."""
        return await self._outbox[connection].receive()

    async def accept(self, connection: Connection, *protocols: str) -> YamuxStream:
        stream = await self.inbound(connection)
        await connection.accept(stream, protocols or (ECHO,))
        return stream

    async def streams(self) -> tuple[YamuxStream, YamuxStream]:
        """A stream that alice opened, and bob's end of it."""
        mine = await self.alice.open_stream(ECHO)
        return mine, await self.accept(self.bob)


async def upgraded(
    raws: tuple[MemoryRaw, MemoryRaw], alice: Config | None = None, bob: Config | None = None
) -> tuple[Connection, Connection]:
    found: dict[int, Connection] = {}

    async def one(index: int) -> None:
        found[index] = await upgrade(
            raws[index],
            identity=(ALICE, BOB)[index],
            initiator=index == 0,
            expected=BOB.peer_id if index == 0 else None,
            config=(alice, bob)[index] or Config(),
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, 0)
        nursery.start_soon(one, 1)
    return found[0], found[1]


@asynccontextmanager
async def connected(
    *, delay: float = 0.0, capacity: int = 1 << 20, alice: Config | None = None, bob: Config | None = None
) -> AsyncIterator[Pair]:
    raws = memory_pair(delay=delay, capacity=capacity)
    ends = await upgraded(raws, alice, bob)
    # A test that waits for what never comes would let the clock jump from ping to ping for ever.
    with trio.fail_after(20_000):
        async with trio.open_nursery() as nursery:
            pair = Pair(nursery, *ends, raws)
            await pair.run()
            yield pair
            nursery.cancel_scope.cancel()


class Foreign:
    """A peer, bob if nobody else, that speaks Noise but whatever it likes behind it: raw plaintext in and out."""

    def __init__(
        self,
        raw: MemoryRaw,
        *,
        initiator: bool = False,
        muxers: tuple[str, ...] = ("/yamux/1.0.0",),
        identity: Identity = BOB,
    ) -> None:
        self.raw = raw
        self._handshake = Handshake(identity, initiator=initiator, muxers=muxers)
        self._held = bytearray()

    async def read_exactly(self, count: int) -> bytes:
        while len(self._held) < count:
            buffer = bytearray(65536)
            got = await self.raw.receive_into(memoryview(buffer))
            if not got:
                raise EOFError(bytes(self._held))
            self._held += buffer[:got]
        data = bytes(self._held[:count])
        del self._held[:count]
        return data

    async def read_message(self) -> bytes:
        return await self.read_exactly(int.from_bytes(await self.read_exactly(2), "big"))

    async def shake_first(self) -> None:
        """As the initiator, with everything that can leave together."""
        greeting = b"\x13/multistream/1.0.0\n\x07/noise\n"
        await self.raw.send_all(greeting + self._handshake.write())
        await self.read_exactly(len(greeting))
        self._handshake.read(await self.read_message())
        await self.raw.send_all(self._handshake.write())
        self.secured = self._handshake.secured()

    async def shake(self, *, answer: bytes = b"\x13/multistream/1.0.0\n\x07/noise\n", finish: bool = True) -> None:
        """As the responder, one step after the other; without ``finish`` not waiting for the last message."""
        await self.read_exactly(len(answer))
        await self.raw.send_all(answer)
        self._handshake.read(await self.read_message())
        await self.raw.send_all(self._handshake.write())
        if finish:
            self._handshake.read(await self.read_message())
            self.secured = self._handshake.secured()

    async def say(self, plain: bytes) -> None:
        wire = bytearray(sealed_size(len(plain)))
        self.secured.sealer.seal_into(plain, memoryview(wire))
        await self.raw.send_all(wire)

    async def hear(self) -> bytes:
        """The plaintext of the next message; ``b""`` at the end."""
        try:
            message = await self.read_message()
        except EOFError:
            return b""
        wire = len(message).to_bytes(2, "big") + message
        plain = bytearray(len(wire))
        _, made = self.secured.opener.open_into(memoryview(wire), memoryview(plain))
        return bytes(plain[:made])
