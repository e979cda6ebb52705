"""Light Kaspa nodes as processes, for the demonstration: one has blocks, the other fetches them.

Each listens as a kaspad does, so a bridge joins it in the same way. ``python -m kas_bridge.light serve`` and
``… fetch COUNT`` print one JSON object a line.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable
from functools import lru_cache

import trio

from kas_libp2p.errors import KasError
from kas_libp2p.kaspa import p2p_pb2 as pb
from kas_libp2p.kaspa.peer import KaspaPeer, LightPeer

NETWORK = "kaspa-simnet"

TRANSACTIONS = 10
"""In one block."""

PAYLOAD = 24_000
"""Bytes of each transaction: 240 kB a block, 96 % of what consensus allows."""

BATCH = 99
"""Blocks that are asked for at a time, as kaspad does when it syncs."""

PINGS = 20
"""Round trips that are measured before the bulk."""

REPORT_EVERY = 0.1
"""Seconds between two lines of progress."""


def block_hash(number: int) -> bytes:
    """The name under which block ``number`` is asked for."""
    return hashlib.blake2b(number.to_bytes(8, "big"), digest_size=32).digest()


@lru_cache(maxsize=1)
def _transactions() -> tuple[list[pb.Transaction], bytes]:
    """The transactions of every block (random bytes: they do not compress), and their digest."""
    source = random.Random(1)  # noqa: S311 - the same on both sides
    made = [pb.Transaction(version=0, payload=source.randbytes(PAYLOAD)) for _ in range(TRANSACTIONS)]
    return made, _digest(made)


def _digest(transactions: object) -> bytes:
    digest = hashlib.blake2b()
    for each in transactions:  # type: ignore[attr-defined]
        digest.update(each.payload)
    return digest.digest()


def make_block(number: int) -> pb.Block:
    """Block ``number``: a header of its own and the same transactions as every other."""
    header = pb.BlockHeader(version=2, nonce=number, hashMerkleRoot=pb.Hash(bytes=block_hash(number)))
    return pb.Block(header=header, transactions=_transactions()[0])


def check_block(number: int, block: pb.Block) -> None:
    """Make sure that a block is the one that was asked for, byte by byte.

    Raises:
        ValueError: it is not.
    """
    if block.header.nonce != number or block.header.hashMerkleRoot.bytes != block_hash(number):
        raise ValueError(f"block {block.header.nonce} came where block {number} was asked for")
    if _digest(block.transactions) != _transactions()[1]:
        raise ValueError(f"block {number} arrived damaged")


def finder(count: int) -> Callable[[bytes], pb.Block | None]:
    """A function that finds a block by its hash."""
    numbers = {block_hash(number): number for number in range(count)}

    def find(wanted: bytes) -> pb.Block | None:
        number = numbers.get(wanted)
        return None if number is None else make_block(number)

    return find


class Fetch:
    """Fetches blocks, from the next peer where one is lost.

    Attributes:
        done: blocks that are here, each of them checked.
    """

    def __init__(self, count: int, tell: Callable[..., None]) -> None:
        self.done = 0
        self._count = count
        self._tell = tell
        self._size = 0
        self._begun = 0.0

    async def by(self, peer: KaspaPeer) -> None:
        """Measure round trips, fetch what is missing, and measure again.

        Raises:
            KasError: the peer is gone.
            ValueError: a block is not what was asked for.
        """
        tell = self._tell
        tell("joined", agent=peer.info.user_agent, protocol_version=peer.info.protocol_version)
        tell("pings", seconds=[await peer.ping() for _ in range(PINGS)])
        begun = last = trio.current_time()
        self._begun = self._begun or begun
        while self.done < self._count:
            numbers = range(self.done, min(self.done + BATCH, self._count))
            async for block in peer.request_blocks([block_hash(number) for number in numbers]):
                check_block(self.done, block)
                self.done += 1
                self._size += block.ByteSize()
                now = trio.current_time()
                if now - last >= REPORT_EVERY:
                    last = now
                    tell("progress", blocks=self.done, bytes=self._size, seconds=now - self._begun)
        tell("fetched", blocks=self.done, bytes=self._size, seconds=trio.current_time() - self._begun)
        tell("pings", seconds=[await peer.ping() for _ in range(PINGS)])


async def run(count: int, *, fetching: bool) -> None:
    """Listen, and fetch from whoever comes first, or serve everybody."""

    def tell(event: str, **values: object) -> None:
        sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
        sys.stdout.flush()

    kaspa = LightPeer(NETWORK, user_agent="/kas-light:0.1.0/", blocks=finder(0 if fetching else count))
    async with kaspa, trio.open_nursery() as nursery:
        tell("listening", port=await nursery.start(kaspa.listen))
        fetch = Fetch(count, tell)
        while fetching and fetch.done < count:
            while not kaspa.peers:  # noqa: ASYNC110 - a list without an event; nothing is measured here
                await trio.sleep(0.01)
            try:
                await fetch.by(kaspa.peers[-1])
            except KasError as error:  # it may come back, by another way
                tell("interrupted", reason=str(error))
            except ValueError as error:
                tell("failed", reason=str(error))
                break
        if fetching:
            tell("done")


def main() -> None:
    """``serve COUNT`` or ``fetch COUNT``."""
    count, fetching = int(sys.argv[2]), sys.argv[1] == "fetch"
    trio.run(lambda: run(count, fetching=fetching))


if __name__ == "__main__":
    main()
