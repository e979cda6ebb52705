"""Sessions of ours through relays of rust-libp2p and go-libp2p with their own limits: 128 KiB and two minutes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kas_libp2p import Config, Node, open_node
from kas_libp2p.config import PunchConfig, RelayConfig, Role, SessionConfig
from kas_libp2p.events import CircuitNotRenewed, CircuitRenewed, SessionMoved, SessionOpened, SessionWaiting
from kas_libp2p.metadata import OverlayStream, PathKind
from tests.interop import ends
from tests.interop.ends import Programs
from tests.interop.protocols import both_ways
from tests.network import eventually
from tests.relay.scripted import Told

KIB = 1024


async def echo(stream: OverlayStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


@asynccontextmanager
async def private(address: str) -> AsyncIterator[Node]:
    """A node that nobody can dial, with a place on a relay whose operator has agreed."""
    config = Config(
        listen=(),
        role=Role.PRIVATE,
        relay=RelayConfig(relays=(address,)),
        punch=PunchConfig(enabled=False),
        session=SessionConfig(small_circuits=True),
    )
    async with open_node(config) as node:
        await node.serve(echo)
        await eventually(lambda: bool(node.relay_client.addresses()))
        yield node


@pytest.mark.parametrize("kind", ["rust", "go"])
async def test_a_stream_goes_on_over_many_circuits(kind: str, programs: Programs) -> None:
    """What a relay of theirs cuts after 128 KiB goes on over the next circuit, before it is cut; both ends ask."""
    async with (
        ends.relay(kind, programs, "--relay") as (address, _),
        private(address) as bob,
        private(address) as alice,
    ):
        told = Told(alice), Told(bob)
        stream = await alice.connect(f"{address}/p2p-circuit/p2p/{bob.peer_id}")
        limits = stream.metadata.limits
        assert limits is not None
        assert (limits.max_bytes, limits.max_seconds) == (128 * KIB, 120)
        received = await both_ways(stream, 200 * KIB)
        assert received.intact
        assert received.size == 200 * KIB
        for each in told:
            assert len(each.of(SessionOpened)) == 1
            assert not each.of(SessionWaiting)
            assert not each.of(CircuitNotRenewed)
            moves = each.of(SessionMoved)
            assert len(moves) >= 2
            assert all(move.path.kind is PathKind.RELAYED and not move.resent for move in moves)
            assert each.of(CircuitRenewed), "each has asked for some"
